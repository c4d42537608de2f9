"""``airflow ai pins``: which run used which version of a model, for which window, and why that one."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from airflow.cli.cli_config import ActionCommand

from airflow_ai_provider.cli.terminal import FORMAT, LEDGER, arg, command, count, print_table, say


def pins_command() -> ActionCommand:
    """Declare ``airflow ai pins``."""
    return ActionCommand(
        name="pins",
        help="Which run used which version of a model",
        description="Each run's pin of a registered model, oldest first, from the ledger.",
        func=list_pins,
        args=(
            arg(("model",), help="Registered model, without alias or version"),
            arg(("--pipeline",), help="Only runs of this DAG"),
            FORMAT,
            LEDGER,
        ),
    )


@command
def list_pins(args: Namespace) -> int:
    """List the pins of a model."""
    from airflow_ai_provider.hooks.ledger import LedgerHook

    pinned = LedgerHook(args.ledger_conn_id).get_ledger().pin_history(args.model, args.pipeline)
    print_table([_line(row) for row in pinned], args.format == "json")
    if args.format == "table":
        say(f"{count(len(pinned), 'pin')} of {args.model}")
    return 0


def _line(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "pinned_at": row["pinned_at"][:19],
        "pipeline": row["pipeline"],
        "run": row["run_id"],
        "window_start": (row["window_start"] or "")[:19],
        "window_end": (row["window_end"] or "")[:19],
        "policy": row["policy"] or "",
        "alias": row["alias"],
        "version": row["version"],
        "digest": row["digest"][:19],
    }
