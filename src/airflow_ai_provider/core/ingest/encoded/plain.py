"""Payloads that are plain text or bytes → one column, ``value``.

Invariants: a text is the payload's bytes read as UTF-8, with nothing added, dropped or changed (a byte order mark
stays); bytes are the payload itself; an empty payload is an empty value, no payload is a ``tombstone``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from airflow_ai_provider.core.ingest.contract import FAULT
from airflow_ai_provider.core.ingest.encoded.wire import Payloads

VALUE = "value"
_TOMBSTONE = "tombstone: the record has no payload"


@dataclass(frozen=True)
class PlainBlock:
    """One block of payloads, read.

    :param values: one per payload; null where there is a fault.
    :param faults: position → why that payload is not a value.
    """

    values: pa.Array
    faults: Mapping[int, str]

    def beside(self, table: pa.Table) -> pa.Table:
        """Put ``value`` and ``_fault`` beside the rows that the payloads came with."""
        reasons: list[str | None] = [None] * table.num_rows
        for position, reason in self.faults.items():
            reasons[position] = reason
        return table.append_column(VALUE, self.values).append_column(FAULT, pa.array(reasons, pa.string()))


class PlainDecoder:
    """Read payloads as ``text`` or ``bytes``."""

    facts: Sequence[Mapping[str, Any]] = ()

    def __init__(self, format: str) -> None:
        self._is_text = format == "text"

    def decode(self, payloads: Payloads) -> PlainBlock:
        """Read one block."""
        column = _one_array(payloads)
        faults = {i: _TOMBSTONE for i, valid in enumerate(column.is_valid().to_pylist()) if not valid}
        if not self._is_text:
            return PlainBlock(column, faults)
        try:
            return PlainBlock(column.cast(pa.string()), faults)  # Arrow checks UTF-8
        except pa.ArrowInvalid:
            texts = [_text(data, at, faults) for at, data in enumerate(column.to_pylist())]
            return PlainBlock(pa.array(texts, pa.string()), faults)


def _text(data: bytes | None, at: int, faults: dict[int, str]) -> str | None:
    try:
        return None if data is None else data.decode()
    except UnicodeDecodeError as error:
        faults[at] = f"broken_text: not UTF-8 from byte {error.start} on ({error.reason})"
        return None


def _one_array(payloads: Payloads) -> pa.Array:
    if isinstance(payloads, pa.ChunkedArray):
        return pa.concat_arrays(payloads.chunks) if payloads.num_chunks != 1 else payloads.chunk(0)
    return payloads if isinstance(payloads, pa.Array) else pa.array(payloads, pa.binary())
