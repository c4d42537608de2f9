"""Corrections of quarantined rows: how a person gets the rows to edit, and how the edited ones are read.

Invariants: what is exported and not edited reads back as the same rows; every line of a file is either a correction or
an error that names it; nothing here runs code.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from airflow_ai_provider.core.batch import ROW_ID
from airflow_ai_provider.core.ingest.contract import ORIGIN, PAYLOAD, REASONS, STAGE
from airflow_ai_provider.errors import SpecError


@dataclass(frozen=True)
class Corrections:
    """What a person wants changed.

    :param changed: row id → fields that are put over the row's own.
    :param whole: row id → the row as it shall be, all of it.
    """

    changed: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    whole: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def row_ids(self) -> set[str]:
        """The rows that are corrected."""
        return {*self.changed, *self.whole}

    def apply(self, row_id: str, fields: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return a row with its correction, or None when it has none."""
        if row_id in self.whole:
            return dict(self.whole[row_id])
        return {**fields, **self.changed[row_id]} if row_id in self.changed else None


def read_corrections(path: str | Path) -> Corrections:
    """Read a file of corrections: one JSON object of row id → changed fields, or exported JSON lines as edited.

    A line whose ``row`` is null corrects nothing: that row stays in quarantine.

    :raises SpecError: when it is missing or is not such a file, naming the line; a retry does not help.
    """
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, ValueError) as error:
        raise _fault(path, f"cannot be read: {error}") from error
    try:
        data = json.loads(text)
    except ValueError as error:
        lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
        if len(lines) > 1:
            return _read_lines(path, lines)
        raise _fault(path, f"cannot be read: {error}") from error
    if isinstance(data, dict) and {"row_id", "row"} <= set(data):
        return _read_lines(path, [(1, text)])
    if not isinstance(data, dict) or not all(isinstance(fields, dict) for fields in data.values()):
        raise _fault(path, "must hold a JSON object of objects, or JSON lines with row_id and row")
    return Corrections(changed=data)


def _read_lines(path: str | Path, lines: list[tuple[int, str]]) -> Corrections:
    whole: dict[str, dict[str, Any]] = {}
    for number, line in lines:
        try:
            found = json.loads(line)
            row_id, row = found["row_id"], found["row"]
        except (ValueError, KeyError, TypeError) as error:
            what = f"has no {error}" if isinstance(error, KeyError) else str(error)
            raise _fault(path, f"line {number}: {what}; each line is an object with row_id and row") from error
        if row_id in whole:
            raise _fault(path, f"line {number}: row {row_id} stands there twice")
        if row is None:
            continue
        if not isinstance(row, dict) or not isinstance(row_id, str):
            raise _fault(path, f"line {number}: row must be an object (or null, to leave it in quarantine)")
        whole[row_id] = row
    return Corrections(whole=whole)


def _fault(path: str | Path, what: str) -> SpecError:
    return SpecError(
        f"the corrections at {path}: {what}. Write a JSON object of row id → changed fields, or edit what "
        "'airflow ai quarantine export' wrote.",
        faults=[("corrections", what)],
    )


def export_rows(rows: Iterator[Mapping[str, Any]]) -> Iterator[str]:
    """Write quarantined rows as JSON lines that a person edits.

    ``row`` is the row as an object; null where its payload is none, which then stands beside it as it came.

    :param rows: rows of a quarantine table.
    """
    for row in rows:
        fields = _strict(read_fields(row[PAYLOAD]))
        line: dict[str, Any] = {"row_id": row[ROW_ID], "reasons": list(row[REASONS] or []), "stage": row[STAGE]}
        line["origin"] = {name[1:]: _text(row[name]) for name in ORIGIN if row.get(name) is not None}
        if row.get("replayed_into"):
            line["replayed_into"] = row["replayed_into"]
        line["row"] = fields
        if fields is None:
            line["payload"] = _text(row[PAYLOAD])
        yield json.dumps(line, ensure_ascii=False)


def read_fields(payload: bytes | None) -> dict[str, Any] | None:
    """Return the object that a payload holds, or None when it holds none."""
    try:
        found = json.loads((payload or b"").decode())
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _strict(fields: dict[str, Any] | None) -> dict[str, Any] | None:
    """The fields, if JSON can hold them: NaN, infinity and lone surrogates are read but cannot be written."""
    try:
        json.dumps(fields, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        return None
    return fields


def _text(value: Any) -> Any:
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return {"base64": base64.b64encode(value).decode()}
    return value if isinstance(value, str | int | float | None) else str(value)
