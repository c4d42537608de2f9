"""``airflow ai quarantine``: see what was rejected and why, hand it out to be mended, replay it."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow.cli.cli_config import ActionCommand, Arg, GroupCommand

from airflow_ai_provider.cli.terminal import (
    FORMAT,
    LEDGER,
    STORE,
    arg,
    command,
    count,
    duration,
    pairs,
    plain,
    print_table,
    read_age,
    say,
    short,
    text,
    to_json,
)
from airflow_ai_provider.errors import SpecError

if TYPE_CHECKING:
    from airflow_ai_provider.core.ingest.quarantine import Quarantine
    from airflow_ai_provider.core.ledger import Claim, Ledger
    from airflow_ai_provider.core.store import Store

_PIPELINE = arg(("--pipeline",), help="DAG id of the pipeline")
_BATCH = arg(("batch",), help="Id of the batch (with --pipeline when two pipelines have such a batch), or its URI")
_REASON = arg(("--reason",), help="Only rows with a reason of this code, such as out_of_range")
_STAGE = arg(("--stage",), help="Only rows that failed at this stage", choices=("decode", "validate"))
_REPLAYED = arg(("--all",), help="Also rows that were replayed or dismissed already", action="store_true")
_SHOWN = 200  # characters of a payload in a table


def quarantine_command() -> GroupCommand:
    """Declare ``airflow ai quarantine``."""
    return GroupCommand(
        name="quarantine",
        help="See what was rejected and why, mend it, replay it, or dismiss it",
        description="list → show → export → (edit) → replay, or dismiss. Only replay and dismiss change something.",
        subcommands=(
            _action(
                list_batches,
                "list",
                "Batches with rows that wait in quarantine, oldest first",
                _PIPELINE,
                arg(("--run",), help="Only batches landed by this run"),
                _REASON,
                _STAGE,
                arg(("--older-than",), help="Only batches that landed so long ago: 90s, 30m, 4h, 2d"),
                arg(("--all",), help="Also batches none of whose rows waits any more", action="store_true"),
                FORMAT,
            ),
            _action(
                show,
                "show",
                "Counts by reason, then the first rows with reasons and payload",
                _BATCH,
                _PIPELINE,
                _REASON,
                _STAGE,
                arg(("--row",), help="Only this row"),
                _REPLAYED,
                arg(("--limit",), help="Rows to print (default 20; 0 prints all)", type=int, default=20),
                FORMAT,
            ),
            _action(
                export,
                "export",
                "Rows as JSON lines to edit: row id, reasons, origin, the row (null when its payload is no object)",
                _BATCH,
                _PIPELINE,
                _REASON,
                _STAGE,
                _REPLAYED,
                arg(("--output",), help="File to write; without it, to standard output"),
            ),
            _action(
                dismiss,
                "dismiss",
                "Note that rows need wait no more: they are counted no more, rest where they are and can be replayed",
                _BATCH,
                _PIPELINE,
                _REASON,
                arg(("--row",), help="Only this row; may be given again", action="append", default=None),
                arg(("--why",), help="Why, for whoever asks later", required=True),
                arg(("--who",), help="Who says so (default: the user of this terminal)"),
            ),
            _action(
                replay,
                "replay",
                "Store mended rows and trigger the pipeline's DAG with them, under the same row ids",
                _BATCH,
                _PIPELINE,
                arg(("--corrections",), help="Edited export, or a JSON object of row id to changed fields"),
                arg(("--fix",), help="package.module:function that takes a row's fields and returns them mended"),
                _REASON,
                arg(("--no-trigger",), help="Only store them, and print how to trigger", action="store_true"),
            ),
        ),
    )


def _action(work: Callable[[Namespace], None], name: str, help: str, *args: Arg) -> ActionCommand:
    return ActionCommand(name=name, help=help, description=f"{help}.", func=work, args=(*args, STORE, LEDGER))


@command
def list_batches(args: Namespace) -> int:
    """List the batches with rows in quarantine."""
    from airflow_ai_provider.core.ingest.quarantine import find_quarantines

    store, ledger = _open(args)
    now, age = datetime.now(UTC), read_age(args.older_than)
    lines = []
    for quarantine in find_quarantines(ledger, args.pipeline, args.run):
        if (age is None or quarantine.age(now) >= age) and (quarantine.waiting or args.all):
            reasons = _reasons(quarantine, store, args)
            if reasons or args.all:
                lines.append(_line(quarantine, reasons, now))
    print_table(lines, args.format == "json")
    if args.format == "table":
        oldest = f"; the oldest for {duration(max(line['age'] for line in lines))}" if lines else ""
        say(
            f"{count(sum(line['waiting'] for line in lines), 'row')} in {count(len(lines), 'batch', 'batches')}{oldest}"
        )
    return 0


def _line(quarantine: Quarantine, reasons: Mapping[str, int], now: datetime) -> dict[str, Any]:
    return {
        "pipeline": quarantine.claim.pipeline,
        "batch": quarantine.ref.batch_id,
        "run": quarantine.claim.run_id,
        "age": quarantine.age(now),
        "waiting": sum(reasons.values()),
        "replayed": len(quarantine.replayed),
        "dismissed": len(quarantine.given_up),
        "reasons": reasons,
    }


def _reasons(quarantine: Quarantine, store: Store, args: Namespace) -> dict[str, int]:
    """Waiting rows by reason: from the manifest, or from the rows when only those of one stage are asked for."""
    if args.stage is None:
        found = quarantine.reasons(store) or {}
        return {code: number for code, number in found.items() if args.reason in (None, code)}
    counts: dict[str, int] = {}
    for row in quarantine.rows(store, args.reason, args.stage, columns=[]):
        if row["replayed_into"] is None and row["dismissed"] is None:
            code = row["_reasons"][0].partition(":")[0]
            counts[code] = counts.get(code, 0) + 1
    return counts


@command
def show(args: Namespace) -> int:
    """Show the rejected rows of a batch."""
    from airflow_ai_provider.core.ingest.replay import rows_of

    store, ledger = _open(args)
    quarantine = _find(store, ledger, args)
    as_json = args.format == "json"
    if not as_json:
        claim = quarantine.claim
        print(plain(f"{quarantine.ref.batch_id}: {pairs(store.manifest(quarantine.ref).counts)}"))
        print(plain(f"          run {claim.run_id}, {claim.span.source}{_ago(claim)}"))
        for code, number in (quarantine.reasons(store) or {}).items():
            print(plain(f"{number:>8}  {code}"))
        for done in quarantine.replays:
            print(plain(f"{len(rows_of(done.span)):>8}  replayed into {_batch(done)} by run {done.run_id}"))
        if quarantine.given_up:
            print(plain(f"{len(quarantine.given_up):>8}  dismissed"))
    rows = (
        r
        for r in quarantine.rows(store, args.reason, args.stage)
        if r["_row_id"] == args.row or (args.row is None and (args.all or not r["dismissed"] or r["replayed_into"]))
    )
    for row in islice(rows, args.limit or None):
        if as_json:
            print(json.dumps(row, ensure_ascii=False, default=to_json))
            continue
        replayed = f"  (replayed into {row['replayed_into']})" if row["replayed_into"] else _dismissed(row)
        print(plain(f"{row['_row_id']}  {row['_stage']}: {'; '.join(row['_reasons'] or [])}{replayed}"))
        print(plain(f"          {short(text(row['_payload']), _SHOWN)}"))
    return 0


def _dismissed(row: Mapping[str, Any]) -> str:
    note = row["dismissed"]
    return f"  (dismissed by {note['who']}: {note['why']})" if note else ""


def _ago(claim: Claim) -> str:
    return f", landed {duration(datetime.now(UTC) - claim.updated_at)} ago" if claim.updated_at else ""


def _batch(claim: Claim) -> str:
    return claim.ref.batch_id if claim.ref else "-"


@command
def export(args: Namespace) -> int:
    """Write rejected rows as JSON lines."""
    from airflow_ai_provider.core.ingest.correction import export_rows

    store, ledger = _open(args)
    quarantine = _find(store, ledger, args)
    rows = (
        r
        for r in quarantine.rows(store, args.reason, args.stage)
        if args.all or not (r["replayed_into"] or r["dismissed"])
    )
    lines = export_rows(rows)
    if args.output is None:
        for line in lines:
            print(line)
        return 0
    try:
        with Path(args.output).open("x", encoding="utf-8") as file:
            number = sum(bool(file.write(f"{line}\n")) for line in lines)
    except FileExistsError as error:
        raise SpecError(f"{args.output} is there already, perhaps edited. Name another file, or remove it.") from error
    except OSError as error:
        raise SpecError(f"{args.output} cannot be written: {error}. Name another file.") from error
    say(f"{count(number, 'row')} in {args.output}. Edit 'row' of each, remove the lines that shall stay, then:")
    batch = f"{quarantine.ref.batch_id} --pipeline {quarantine.claim.pipeline}"
    say(f"airflow ai quarantine replay {batch} --corrections {args.output}")
    return 0


@command
def dismiss(args: Namespace) -> int:
    """Note that rows need wait no more."""
    from getpass import getuser

    from airflow_ai_provider.core.ingest.quarantine import dismiss as note

    store, ledger = _open(args)
    found, who = _find(store, ledger, args), args.who or getuser()
    rows = tuple(args.row or ())
    number = note(store, ledger, found, rows=rows, reason=args.reason, who=who, why=args.why, now=datetime.now(UTC))
    say(f"{count(number, 'row')} dismissed. They rest in {found.ref.uri}; 'show --all' shows them.")
    return 0


@command
def replay(args: Namespace) -> int:
    """Store mended rows, and trigger the DAG that lands them."""
    from airflow_ai_provider.core.ingest.correction import Corrections, read_corrections
    from airflow_ai_provider.core.ingest.replay import ReplaySource, demand_free, prepare_replay

    if (args.corrections is None) == (args.fix is None):
        raise SpecError("give either --corrections or --fix.", faults=[("corrections", "give either this or --fix")])
    store, ledger = _open(args)
    quarantine = _find(store, ledger, args)
    pipeline = quarantine.claim.pipeline
    corrections = read_corrections(args.corrections) if args.corrections else Corrections()
    fix = _load(args.fix) if args.fix else None
    leave = {
        row["_row_id"]
        for row in (quarantine.rows(store, columns=[]) if fix else ())
        if row["replayed_into"] or row["dismissed"] or not _has(row, args.reason)
    }
    prepared = prepare_replay(store, quarantine.ref, fix, pipeline=pipeline, corrections=corrections, leave=leave)
    if not prepared.counts["mended"]:
        say("No row is mended: nothing to replay.")
        return 1
    demand_free(ledger, pipeline, ReplaySource(store, pipeline, prepared.batch_id))
    say(f"{count(prepared.counts['mended'], 'mended row')} stored as replay {prepared.batch_id}.")
    return _trigger(pipeline, prepared.batch_id, args.no_trigger)


def _has(row: Mapping[str, Any], code: str | None) -> bool:
    return code is None or any(reason.partition(":")[0] == code for reason in row["_reasons"] or [])


def _load(name: str) -> Any:
    """Import a function that the person at the terminal names; a run's conf never names code."""
    from importlib import import_module

    module, _, function = name.partition(":")
    try:
        found = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise SpecError(f"--fix {name!r} cannot be imported: {error}. Write package.module:function.") from error
    if not callable(found):
        raise SpecError(f"--fix {name!r} is no function. Write package.module:function.")
    return found


def _trigger(pipeline: str, replay_id: str, only_say: bool) -> int:
    """Trigger the DAG through Airflow's own command: the run's name is the replay's, so there is one run of it."""
    from airflow.cli.cli_parser import get_parser
    from airflow.sdk.exceptions import AirflowException

    run_id, conf = f"replay__{replay_id}", json.dumps({"replay": replay_id})
    words = ["dags", "trigger", pipeline, "--run-id", run_id, "--conf", conf]
    if only_say:
        print(f"airflow dags trigger {pipeline} --run-id {run_id} --conf '{conf}'")
        return 0
    asked = get_parser().parse_args(words)
    try:
        asked.func(asked)
    except AirflowException as error:
        say(f"{pipeline} was not triggered: {error}")
        say(f"The replay is stored. If run {run_id} is there already, clear its tasks to run it again.")
        return 1
    say("Its ingest task lands these rows instead of reading the source. A paused DAG leaves the run queued.")
    return 0


def _open(args: Namespace) -> tuple[Store, Ledger]:
    from airflow_ai_provider.hooks.ledger import LedgerHook
    from airflow_ai_provider.hooks.store import StoreHook

    return StoreHook(args.store_conn_id).get_store(), LedgerHook(args.ledger_conn_id).get_ledger()


def _find(store: Store, ledger: Ledger, args: Namespace) -> Quarantine:
    """Find the one batch that is meant; what the ledger does not know may still lie in the store."""
    from airflow_ai_provider.core.batch import Span
    from airflow_ai_provider.core.ingest.quarantine import Quarantine, find_quarantines
    from airflow_ai_provider.core.ledger import Claim

    pieces = args.batch.rstrip("/").removesuffix("/manifest.json").split("/")
    pipeline, batch_id = pieces[-3] if len(pieces) > 2 and pieces[-2] == "batch" else args.pipeline, pieces[-1]
    found = [q for q in find_quarantines(ledger, pipeline) if q.ref.batch_id == batch_id]
    if len(found) == 1:
        return found[0]
    if found:
        raise SpecError(f"{len(found)} pipelines have a batch {batch_id!r}. Give --pipeline.", faults=[])
    ref = store.find(pipeline, "batch", batch_id) if pipeline else None
    if pipeline is None or ref is None:
        where = f"of pipeline {pipeline!r} in {store.root}" if pipeline else "in the ledger; give --pipeline or its URI"
        raise SpecError(f"there is no batch {batch_id!r} {where}. See 'airflow ai quarantine list'.", faults=[])
    return Quarantine(Claim(pipeline, "", Span.from_dict(store.manifest(ref).facts["span"]), "landed", ref, "unknown"))
