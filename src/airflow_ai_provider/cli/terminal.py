"""What every command shares: how it is declared, how it ends, and how it prints what came from outside.

Invariants: an error is one message and exit status 1, without a traceback; what came from outside cannot control the
terminal; importing this loads no library of ours.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from functools import wraps
from typing import Any

from airflow.cli.cli_config import Arg

from airflow_ai_provider.errors import AiProviderError, SpecError

arg: Callable[..., Arg] = Arg  # untyped in Airflow
JSON = arg(("--json",), help="Print JSON, one object a line", action="store_true")
FORMAT = arg(("--format",), help="table or json (one object a line)", choices=("table", "json"), default="table")
STORE = arg(("--store-conn-id",), help="Connection of the store", default="ai_store_default")
LEDGER = arg(("--ledger-conn-id",), help="Connection of the ledger", default="ai_ledger_default")
YES = arg(("-y", "--yes"), help="Do not ask", action="store_true")


def command(work: Callable[[Namespace], int]) -> Callable[[Namespace], None]:
    """Make a command of a function that returns the exit status."""

    @wraps(work)
    def run(args: Namespace) -> None:
        try:
            status = work(args)
            sys.stdout.flush()
        except BrokenPipeError:  # who reads has seen enough, as head does: that is no error of ours
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            status = 128 + signal.SIGPIPE
        except AiProviderError as error:
            print(plain(str(error)), file=sys.stderr)
            status = 1
        if status:
            raise SystemExit(status)

    return run


def say(line: str) -> None:
    """Print to the person beside the answer, which may go to a file or another program."""
    print(plain(line), file=sys.stderr)


def confirm(question: str, yes: bool) -> bool:
    """Ask a person; without anybody to ask (no terminal) the answer is no.

    :param yes: True when ``--yes`` was given: nobody is asked.
    """
    if yes:
        return True
    if not sys.stdin.isatty():
        say("Nobody is there to answer: give --yes.")
        return False
    say(f"{question} [y/N]")
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def print_table(rows: Sequence[Mapping[str, Any]], as_json: bool) -> None:
    """Print rows of the same columns: aligned under their names, or as JSON, one object a line."""
    if as_json:
        for row in rows:
            print(json.dumps(row, ensure_ascii=False, default=to_json))
        return
    if not rows:
        return
    lines = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[at]) for line in lines) for at in range(len(lines[0]))]
    for line in lines:
        print(plain("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()))


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {count}" for name, count in value.items()) or "-"
    if isinstance(value, timedelta):
        return duration(value)
    return "-" if value is None or value == "" else str(value)


def duration(value: timedelta) -> str:
    """Write an age in its two largest units: ``3 d 4 h``, ``12 min 5 s``."""
    seconds = max(int(value.total_seconds()), 0)
    found: list[str] = []
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        number, seconds = divmod(seconds, size)
        if number or (unit == "s" and not found):
            found.append(f"{number} {unit}")
    return " ".join(found[:2])


def read_age(value: str | None) -> timedelta | None:
    """Read ``90s``, ``30m``, ``4h``, ``2d`` as ``--older-than`` takes it.

    :raises SpecError: when it is none; a retry does not help.
    """
    from airflow_ai_provider.core.ingest.limit import read_duration

    try:
        return None if value is None else read_duration(value)
    except ValueError as error:
        raise SpecError(f"--older-than: {error}.", faults=[("older_than", str(error))]) from error


def text(value: Any) -> str:
    """Return a value as text; bytes that are no text as their hexadecimal digits."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return f"0x{value.hex()}"
    return value if isinstance(value, str) else str(value)


def plain(value: str) -> str:
    """Show control characters instead of sending them: a payload must not drive the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in value)


def short(value: str, limit: int) -> str:
    """Cut a text, saying how much is left out."""
    return value if len(value) <= limit else f"{value[:limit]}… ({len(value):,} characters)"


def pairs(values: Mapping[str, Any]) -> str:
    """Return ``name value, name value`` of what has a value."""
    return ", ".join(f"{name} {text(value)}" for name, value in values.items() if value is not None)


def to_json(value: Any) -> Any:
    """Return what JSON has no form for: bytes as text or base64, ages in seconds."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return {"base64": base64.b64encode(value).decode()}
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, datetime):
        return value.isoformat()
    return vars(value) if hasattr(value, "__dataclass_fields__") else str(value)


def count(number: int, what: str, many: str = "") -> str:
    """Return ``1 file``, ``2 files``."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {many or f'{what}s'}"
