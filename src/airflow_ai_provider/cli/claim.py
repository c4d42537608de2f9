"""``airflow ai claims``: which runs hold which rows, and giving a claim up by hand."""

from __future__ import annotations

from argparse import Namespace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from airflow.cli.cli_config import ActionCommand, GroupCommand

from airflow_ai_provider.cli.terminal import (
    FORMAT,
    LEDGER,
    YES,
    arg,
    command,
    confirm,
    count,
    duration,
    plain,
    print_table,
    read_age,
    say,
)
from airflow_ai_provider.errors import SpecError

if TYPE_CHECKING:
    from airflow_ai_provider.core.batch import Span
    from airflow_ai_provider.core.ledger import Claim, Ledger


def claims_command() -> GroupCommand:
    """Declare ``airflow ai claims``."""
    return GroupCommand(
        name="claims",
        help="Runs that hold rows; give up a claim that will never land",
        description="A claim belongs to one ingest task. Clearing that task is the usual way; releasing is the last.",
        subcommands=(
            ActionCommand(
                name="list",
                help="Claims that have not landed, oldest first",
                description="Claims with age, run and span. One of a task that runs now is no reason to worry.",
                func=list_claims,
                args=(
                    arg(("--pipeline",), help="DAG id of the pipeline"),
                    arg(("--older-than",), help="Only claims so old: 90s, 30m, 4h, 2d"),
                    arg(("--all",), help="Also claims that have landed", action="store_true"),
                    FORMAT,
                    LEDGER,
                ),
            ),
            ActionCommand(
                name="release",
                help="Give up a claim that will never land",
                description="Says what becomes of its rows, then asks. A landed claim is not released.",
                func=release,
                args=(
                    arg(("run_key",), help="The claim's run key, as list shows it"),
                    arg(("--pipeline",), help="DAG id of the pipeline", required=True),
                    YES,
                    LEDGER,
                ),
            ),
        ),
    )


@command
def list_claims(args: Namespace) -> int:
    """List claims."""
    now, age = datetime.now(UTC), read_age(args.older_than)
    found = _ledger(args).claims(args.pipeline, None if args.all else "claimed")
    lines = [_line(claim, now) for claim in found]
    lines = [line for line in lines if age is None or line["age"] >= age]
    print_table(lines, args.format == "json")
    if args.format == "table":
        say(count(len(lines), "claim") + ("" if args.all else " not landed"))
    return 0


def _line(claim: Claim, now: datetime) -> dict[str, Any]:
    line = {
        "pipeline": claim.pipeline,
        "run_key": claim.run_key,
        "run": claim.run_id,
        "state": claim.state,
        "age": now - (claim.claimed_at or now),
        "source": claim.span.source,
        "span": _told(claim.span),
    }
    return line


def _told(span: Span) -> str:
    from airflow_ai_provider.core.ingest.replay import rows_of

    if span.source.startswith("replay:"):
        return count(len(rows_of(span)), "row")
    if any(s.digest for s in span.slices):
        return count(len(span.slices), "file")
    return " ".join(f"{s.partition}[{s.first}:{s.end}]" for s in span.slices)


@command
def release(args: Namespace) -> int:
    """Release a claim, after saying what follows."""
    ledger = _ledger(args)
    claim = ledger.claim_of(args.pipeline, args.run_key)
    if claim is None:
        raise SpecError(
            f"{args.run_key!r} of {args.pipeline!r} holds no claim: see 'airflow ai claims list'.", faults=[]
        )
    if claim.state == "landed":
        batch = claim.ref.batch_id if claim.ref else ""
        raise SpecError(f"{args.run_key!r} has landed batch {batch}: its rows are taken for good.", faults=[])
    age = duration(datetime.now(UTC) - claim.claimed_at) if claim.claimed_at else "?"
    say(f"Run {claim.run_id} has held {_told(claim.span)} of {claim.span.source} for {age}.")
    for line in _consequences(ledger, claim):
        say(f"- {line}")
    if not confirm("Release it?", args.yes):
        say("Nothing was changed.")
        return 1
    ledger.release(args.pipeline, args.run_key)
    print(plain(f"released {args.run_key}"))
    return 0


def _consequences(ledger: Ledger, claim: Claim) -> list[str]:
    lines = ["If its task still runs, what it has read is thrown away, and its retry claims anew what is free then."]
    span = claim.span
    if span.source.startswith("replay:"):
        return [*lines, "The rows wait in quarantine again and may be mended otherwise."]
    if any(s.digest for s in span.slices):
        return [*lines, "Its files are taken by the next run, as far as they are still there."]
    ends = ledger.position(claim.pipeline, span.source, span.identity)
    passed = sorted((s.partition for s in span.slices if s.end > s.first and ends.get(s.partition, 0) > s.end), key=int)
    if len(passed) < sum(s.end > s.first for s in span.slices):
        lines.append("The next run takes its rows of the topic partitions that no later run has claimed behind it.")
    if passed:
        lines.append(
            f"Later runs have gone on behind it in topic partition {', '.join(passed)}: no cursor comes back to its "
            "rows there. Only a window takes them (a backfill, or by='window'). Clearing its task loses nothing."
        )
    return lines


def _ledger(args: Namespace) -> Ledger:
    from airflow_ai_provider.hooks.ledger import LedgerHook

    return LedgerHook(args.ledger_conn_id).get_ledger()
