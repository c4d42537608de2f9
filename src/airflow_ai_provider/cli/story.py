"""``airflow ai explain``: what was done for a row or a subject, and why."""

from __future__ import annotations

import json
from argparse import Namespace
from typing import TYPE_CHECKING

from airflow.cli.cli_config import ActionCommand

from airflow_ai_provider.cli.terminal import JSON, LEDGER, STORE, arg, command, pairs, plain, say, to_json

if TYPE_CHECKING:
    from airflow_ai_provider.core.ledger import Entry
    from airflow_ai_provider.core.pipeline.explain import Story


def explain_command() -> ActionCommand:
    """Declare ``airflow ai explain``."""
    return ActionCommand(
        name="explain",
        help="Explain what was done for a row or a subject, back to its offset",
        description="Action, decision, confidence and bar, model version, row and offset, from ledger and store.",
        func=explain,
        args=(
            arg(("--pipeline",), help="DAG id of the pipeline", required=True),
            arg(("--row",), help="Row id, such as biopsies~a1b2c3d4/0/17"),
            arg(("--subject",), help="Value of the pipeline's key column, such as B-17"),
            arg(("--run",), help="Look in this run only (needed for a row of a run that acted on nothing)"),
            STORE,
            LEDGER,
            JSON,
        ),
    )


@command
def explain(args: Namespace) -> int:
    """Explain what was done, and why."""
    from airflow_ai_provider.core.pipeline.explain import explain as tell
    from airflow_ai_provider.hooks.ledger import LedgerHook
    from airflow_ai_provider.hooks.store import StoreHook

    stories = tell(
        LedgerHook(args.ledger_conn_id).get_ledger(),
        StoreHook(args.store_conn_id).get_store(),
        args.pipeline,
        row_id=args.row or "",
        subject=args.subject or "",
        run_ids=[args.run] if args.run else [],
    )
    for story in stories:
        print(json.dumps(vars(story), ensure_ascii=False, default=to_json) if args.json else plain(_tell(story)))
    if not stories:
        where = f"run {args.run}" if args.run else "the runs that acted on something; give --run to look in another"
        say(f"{args.row or args.subject} was not found in {where}.")
    return 0 if stories else 1


def _tell(story: Story) -> str:
    lines = [f"{story.row_id}  in run {story.run_id}"]
    for entry in story.actions:
        lines.append(f"  action    {_entry(entry)}")
    if story.review:
        r = story.review
        lines.append(f"  review    {r['before']} → {r['after']} by {r['responder']} at {r['at']}")
    if story.decision:
        d = story.decision
        decided = f"; {d['decided_by']} decided {d['decision']}" if d["decided_by"] else ""
        lines += [f"  decision  {d['route']}: {d['reason']}{decided}"]
        lines += [f"  bar       confidence {d['confidence']}, bar {d['bar']}"]
    if story.fate:
        lines.append(f"  end       {story.fate}")
    for replay in story.replays:
        lines.append(
            f"  replayed  into {replay['batch']} by run {replay['run_id']} at {replay['at']}: {replay['became']}"
        )
    if story.fate.startswith("quarantined") and not story.replays:
        lines.append("  waits     to be replayed: airflow ai quarantine export")
    if story.model:
        m = story.model
        said = f"; predicted {m['prediction']}, score {m['score']}" if "prediction" in m else ""
        alias = f" (alias {m['alias']})" if m["alias"] else ""
        lines.append(f"  model     {m['name']} version {m['version']}{alias}, {m['digest']}{said}")
    lines.append("  row       " + pairs(story.row))
    lines.append("  origin    " + pairs(story.origin))
    return "\n".join(lines)


def _entry(entry: Entry) -> str:
    undo = " (undo)" if entry.undoes else ""
    answer = pairs(entry.outcome)
    return (
        f"{entry.action}{undo}: {entry.state}{f', {answer}' if answer else ''}; tries {entry.attempts}, key {entry.key}"
    )
