"""Records of one topic partition → the table that ingest reads, column by column.

Invariants: rows are the records, in their order; a row's id names topic, topic partition and offset, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from airflow_ai_provider.core.batch import ROW_ID
from airflow_ai_provider.core.ingest.column import flags, numbers
from airflow_ai_provider.core.ingest.contract import PAYLOAD

_TEN_THOUSAND = np.uint64(10_000)
_FOUR_DIGITS = np.frombuffer(b"".join(b"%04d" % i for i in range(10_000)), np.uint32)


class Record(Protocol):
    """One message of a topic, as the client gives it."""

    def partition(self) -> int | None: ...
    def offset(self) -> int | None: ...
    def key(self) -> bytes | str | None: ...
    def value(self) -> bytes | str | None: ...
    def timestamp(self) -> tuple[int, int]: ...


def table_of(topic: str, identity: str, messages: Sequence[Record]) -> pa.Table:
    """Return ``_row_id``, ``_payload``, ``_key``, ``_topic``, ``_partition``, ``_offset``, ``_timestamp``.

    :param identity: the topic's id; empty when the broker gives none.
    :param messages: records, not errors, of one topic partition; one at least.
    """
    count, kind, partition = len(messages), type(messages[0]), messages[0].partition()
    offsets = _offsets(messages)
    prefix = f"{topic}~{identity[:8]}/{partition}/" if identity else f"{topic}/{partition}/"
    return pa.table(
        {
            ROW_ID: numbered(prefix.encode(), offsets),
            PAYLOAD: pa.array(list(map(kind.value, messages)), pa.binary()),
            "_key": pa.array(list(map(kind.key, messages)), pa.binary()),
            "_topic": pa.repeat(pa.scalar(topic, pa.string()), count),
            "_partition": pa.repeat(pa.scalar(partition, pa.int32()), count),
            "_offset": numbers(offsets, pa.int64()),
            "_timestamp": _times(messages),
        }
    )


def numbered(prefix: bytes, values: npt.NDArray[np.int64]) -> pa.Array:
    """Make the texts of a prefix and a number, 0 or more, behind it.

    :param prefix: ASCII, three bytes or more.
    :param values: one at least; a number's digits are written four at a time when all have as many.
    """
    count, size = len(values), len(str(values.max()))
    if len(str(values.min())) != size:
        texts = numbers(values, pa.int64()).cast(pa.string())
        return pc.binary_join_element_wise(prefix.decode(), texts, "")
    left, width = values.view(np.uint64), len(prefix) + size
    out = np.empty(count * width, np.uint8)
    for end in range(width, len(prefix), -4):
        rest, left = left, left // _TEN_THOUSAND
        np.ndarray(count, np.uint32, out, end - 4, (width,))[:] = _FOUR_DIGITS[rest - left * _TEN_THOUSAND]
    # last, for the first four digits may begin with zeros that lie where it ends
    np.ndarray(count, f"V{len(prefix)}", out, 0, (width,))[:] = np.void(prefix)
    edges = np.arange(count + 1, dtype=np.int32) * np.int32(width)
    return pa.Array.from_buffers(pa.string(), count, [None, pa.py_buffer(edges), pa.py_buffer(out)])


def _offsets(messages: Sequence[Record]) -> npt.NDArray[np.int64]:
    count, kind = len(messages), type(messages[0])
    first, last = kind.offset(messages[0]) or 0, kind.offset(messages[-1]) or 0
    if last - first == count - 1:  # they rise from record to record, so none is left out
        return np.arange(first, last + 1)
    # fromiter: Arrow takes five times as long over an iterator
    return np.fromiter(map(kind.offset, messages), np.int64, count)


def _times(messages: Sequence[Record]) -> pa.Array:
    # one flat run of kind, time, kind, time …: transposing the pairs would make two tuples as long as the messages
    pairs = chain.from_iterable(map(type(messages[0]).timestamp, messages))
    kinds, times = np.fromiter(pairs, np.int64, 2 * len(messages)).reshape(-1, 2).T
    column = numbers(times, pa.timestamp("ms", tz="UTC"))
    if kinds.all():
        return column
    return pc.if_else(flags(kinds != 0), column, pa.scalar(None, column.type))  # 0: the record has no time
