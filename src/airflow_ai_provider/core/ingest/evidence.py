"""Ask the whole-batch rules, once, over all shards: in memory is what they need, never a column of the whole batch.

Invariants: what a rule about repeated values is shown are all rows that share their values with another one, so its
verdict is that over all rows; equal values have equal hashes, and unequal ones that share a hash only cost time; what
other rules read lies on the local disk, mapped into memory, in files without a name that end with the process, however
it ends; the verdict does not depend on how the batch was cut.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from airflow_ai_provider.core.batch import ROW_ID
from airflow_ai_provider.core.ingest.contract import BatchRules, Validator, merge_texts

Tables = Callable[[], Iterator[pa.Table]]
"""Yields the evidence of a batch, block by block; may be called again."""
_AT_ONCE = 1 << 20
"""Hashes sorted in memory at a time."""


@dataclass
class Findings:
    """What the whole-batch rules said.

    :param reasons: row id → why that row is rejected.
    :param failures: rules broken for which the batch is refused.
    :param warnings: rule → rows that broke it and stay accepted.
    """

    reasons: dict[str, list[str]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    warnings: Counter[str] = field(default_factory=Counter)


def judge(validator: Validator, tables: Tables) -> Findings:
    """Ask each group of whole-batch rules about all decoded rows of a batch.

    :param tables: ``_row_id`` and the columns that the rules read.
    """
    found = Findings()
    for rules in validator.batch_rules:
        few = rules.repeats and _are_there(tables, rules)
        shown = (find_repeated if few else _spool)(tables, rules)
        if few and not shown.num_rows:
            continue
        judgement = validator.judge(shown, rules)
        for row_id, reasons in judgement.reasons.items():
            found.reasons.setdefault(row_id, []).extend(reasons)
        found.failures = merge_texts(found.failures, judgement.failures)
        found.warnings.update(judgement.warnings)
    return found


def find_repeated(tables: Tables, rules: BatchRules, at_once: int = _AT_ONCE) -> pa.Table:
    """Return the rows that share their values in the rules' columns with another row; by chance some more.

    One pass writes a hash per row to the local disk, eight bytes each; one finds those that occur twice, one picks
    their rows.

    :param at_once: hashes in memory at a time.
    """
    columns, kept = list(rules.columns or ()), []
    with tempfile.TemporaryFile() as file:
        for table in tables():
            _hashes(table, columns).tofile(file)
        repeated = _repeated(file, at_once)
        file.seek(0)
        for table in tables() if len(repeated) else ():
            hit = np.isin(np.fromfile(file, np.int64, table.num_rows), repeated)
            if hit.any():
                rows = table.select([ROW_ID, *columns]).filter(pa.array(hit))
                kept.append(rows.drop_null() if len(columns) == 1 else rows)
    return pa.concat_tables(kept) if kept else _nothing()


def _are_there(tables: Tables, rules: BatchRules) -> bool:
    """True when the batch has the rules' columns; if not, what that means is for the validator to say."""
    first = next(tables(), None)
    return first is not None and set(rules.columns or ()) <= set(first.column_names)


def _hashes(table: pa.Table, columns: Sequence[str]) -> npt.NDArray[np.int64]:
    """One hash per row. Python's, for it has the one property that is needed: what is equal has the same."""
    keys = [_plain(table[name]).to_pylist() for name in columns]
    rows = keys[0] if len(keys) == 1 else zip(*keys, strict=True)
    return np.fromiter(map(hash, rows), np.int64, table.num_rows)


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Values that Python hashes alike when they are equal: NaN does not equal itself there, lists have no hash."""
    if pa.types.is_floating(column.type):
        return pc.if_else(pc.is_nan(column), None, column)
    if pa.types.is_temporal(column.type):
        return column.cast(pa.int64()) if column.type.bit_width == 64 else column.cast(pa.int32())
    return (
        pa.chunked_array([[repr(value) for value in column.to_pylist()]]) if pa.types.is_nested(column.type) else column
    )


def _repeated(file: IO[bytes], at_once: int) -> npt.NDArray[np.int64]:
    """The hashes of a file that occur more than once; sorted in so many turns that each fits into memory."""
    count = file.seek(0, os.SEEK_END) // 8
    turns = -(-count // at_once)
    found = [np.empty(0, np.int64)]
    for turn in range(turns):
        mine = np.concatenate([h[h % turns == turn] for h in _chunks(file, at_once)])
        mine.sort()
        found.append(np.unique(mine[1:][mine[1:] == mine[:-1]]))
    return np.concatenate(found)


def _chunks(file: IO[bytes], at_once: int) -> Iterator[npt.NDArray[np.int64]]:
    file.seek(0)
    while len(chunk := np.fromfile(file, np.int64, at_once)):
        yield chunk


def _spool(tables: Tables, rules: BatchRules) -> pa.Table:
    """Lay the columns that rules read on the local disk, and return them as a table that is read from there."""
    writer = None
    with tempfile.TemporaryFile() as file:
        for table in tables():
            names = None if rules.columns is None else [ROW_ID, *(n for n in rules.columns if n in table.column_names)]
            rows = table if names is None else table.select(names)
            writer = writer or pa.ipc.new_file(pa.PythonFile(file, "w"), rows.schema)
            writer.write_table(rows)
        if writer is None:
            return _nothing()
        writer.close()
        file.flush()
        shown = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # stays while the table does
    return pa.ipc.open_file(pa.py_buffer(shown)).read_all()


def _nothing() -> pa.Table:
    return pa.table({ROW_ID: pa.array([], pa.string())})
