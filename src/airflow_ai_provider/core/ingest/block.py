"""Cut a stream of tables into blocks that depend on the rows alone, never on how the source happened to chunk them.

Invariants: the same rows in the same order give the same blocks, so a retry writes the same files; memory is bounded by
one block, whatever the span's size.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce

import pyarrow as pa
import pyarrow.compute as pc

from airflow_ai_provider.core.ingest.contract import PAYLOAD

ROWS = 100_000
"""Rows of a block: Great Expectations costs about 55 ms a call, so fewer would make the calls the work."""
BYTES = 128 * 1024 * 1024
"""Payload bytes of a block; a row that is larger is a block by itself."""
_PIECE = 2048
"""Rows on the average from which the pieces that payloads came in are not copied together: they are the most bytes."""


def cut(tables: Iterable[pa.Table], row_count: int = ROWS, byte_count: int = BYTES) -> Iterator[pa.Table]:
    """Yield blocks of at most so many rows and payload bytes; a change of columns begins a new one.

    All columns of a block are in one piece, but for ``_payload``, which may be in some large ones.
    """
    held: list[pa.Table] = []
    rows_left, bytes_left = row_count, byte_count
    for table in tables:
        rest = table
        while rest.num_rows:
            fits, size = _fitting(rest, rows_left, bytes_left)
            if held and (fits == 0 or held[0].schema != rest.schema):
                yield _joined(held)
                held, rows_left, bytes_left = [], row_count, byte_count
                continue
            taken = max(fits, 1)
            held.append(rest.slice(0, taken))
            rest = rest.slice(taken)
            rows_left, bytes_left = rows_left - taken, bytes_left - size
    if held:
        yield _joined(held)


@contextmanager
def paused_gc() -> Iterator[None]:
    """Keep the cycle collector out of a stretch that makes many plain objects and no cycles."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _joined(tables: Sequence[pa.Table]) -> pa.Table:
    whole = pa.concat_tables(tables)
    if PAYLOAD not in whole.column_names or whole.num_rows < _PIECE * len(tables):
        return whole.combine_chunks()
    rest, at = whole.drop_columns([PAYLOAD]).combine_chunks(), whole.column_names.index(PAYLOAD)
    return rest.add_column(at, whole.schema.field(PAYLOAD), whole[PAYLOAD])


def _fitting(table: pa.Table, rows_left: int, bytes_left: int) -> tuple[int, int]:
    """How many of the next rows fit, and their payload bytes."""
    count = min(rows_left, table.num_rows)
    sizes = [
        pc.binary_length(table[name].slice(0, count))
        for name in (PAYLOAD, "bytes")
        if name in table.column_names and pa.types.is_binary(table.schema.field(name).type)
    ]
    size = sum(pc.sum(each).as_py() or 0 for each in sizes)
    if not sizes or not count or size <= bytes_left:
        return count, size
    sums = pc.cumulative_sum(reduce(pc.add, (pc.fill_null(each, 0).cast(pa.int64()) for each in sizes)))
    fits = pc.sum(pc.less_equal(sums, bytes_left)).as_py()
    return fits, sums[max(fits, 1) - 1].as_py()
