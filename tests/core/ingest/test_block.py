"""Blocks depend on the rows alone; progress speaks when it is time."""

from __future__ import annotations

from itertools import pairwise

import pyarrow as pa
import pytest

from airflow_ai_provider.core.ingest.block import cut, paused_gc
from airflow_ai_provider.core.ingest.progress import Progress


def rows(*sizes: int | None) -> pa.Table:
    payloads = [None if size is None else b"x" * size for size in sizes]
    return pa.table({"n": list(range(len(sizes))), "_payload": pa.array(payloads, pa.binary())})


@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
def test_blocks_are_the_same_however_the_rows_come(chunk: int) -> None:
    table = rows(1, 1, 1, 1, 1, 9, 50, None, None, 1, 10, 1)
    tables = [table.slice(at, chunk) for at in range(0, table.num_rows, chunk)]
    blocks = [b["n"].to_pylist() for b in cut(tables, row_count=4, byte_count=10)]
    assert blocks == [[0, 1, 2, 3], [4, 5], [6], [7, 8, 9], [10], [11]]


def test_a_change_of_columns_begins_a_new_block() -> None:
    other = pa.table({"m": ["x"]})
    assert [b.column_names for b in cut([rows(1), rows(1), other, rows(1)])] == [
        ["n", "_payload"],
        ["m"],
        ["n", "_payload"],
    ]
    assert list(cut([])) == list(cut([rows()])) == []
    assert [b.num_rows for b in cut([rows(1, 20), other, rows(1)], byte_count=10)] == [1, 1, 1, 1]
    assert [b.num_rows for b in cut([rows(1, 1, 1, 7, 1)], row_count=4, byte_count=10)] == [4, 1]
    assert [b.num_rows for b in cut([rows(20), other], row_count=1, byte_count=10)] == [1, 1]


def test_the_collector_is_paused_and_comes_back() -> None:
    import gc

    with pytest.raises(KeyError), paused_gc():
        assert not gc.isenabled()
        raise KeyError
    assert gc.isenabled()


def test_progress_speaks_about_every_five_seconds_and_at_the_end() -> None:
    lines: list[str] = []
    now = [0.0]
    progress = Progress(1000, lines.append, clock=lambda: now[0])
    for second in range(1, 12):
        now[0] = float(second)
        progress.note(50, accepted=second * 40, quarantined=second * 10)
    progress.end(440, 110)
    assert lines == [
        "read 250 of 1,000 rows (50 rows/s, about 15 s left): 200 accepted, 50 quarantined",
        "read 500 of 1,000 rows (50 rows/s, about 10 s left): 400 accepted, 100 quarantined",
        "read 550 rows in 11.0 s (50 rows/s): 440 accepted, 110 quarantined",
    ]
    assert all(len(a) < 120 for a, _ in pairwise(lines))
