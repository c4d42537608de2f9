"""S1: peak memory of ingest must not grow with the rows: a fifth of the rows, and all of them.

All contenders run the whole verb over blocks made on the spot (nothing waits in memory), with ten expectations, to
Parquet; each in a process of its own, whose peak is read after its run. Two of them demand of a column besides that it
be unique over the whole batch, which one row in a hundred thousand is not. The check demands each pair of peaks to be
alike.
"""

from __future__ import annotations

import resource
import shutil
from collections.abc import Iterator, Mapping
from datetime import datetime

import pyarrow as pa
import pyarrow.compute as pc

from airflow_ai_provider.core.batch import Slice, Span
from benchmarks import readings
from benchmarks.harness import Case, Place, Run

BLOCK = 20_000
_ID, _DOUBLE = b"reading-%09d", 100_000
UNIQUE = {
    "name": "unique",
    "expectations": [
        *readings.SUITE["expectations"],
        {"type": "expect_column_values_to_be_unique", "kwargs": {"column": "reading_id"}},
    ],
}


class _Repeated:
    """The same messages again and again, at rising offsets.

    :param fresh: whether each has a ``reading_id`` of its own, but for the doubles.
    """

    name, key, format = "kafka:readings", "reading_id", "json"

    def __init__(self, rows: int, *, fresh: bool = False) -> None:
        self._rows, self._fresh = rows, fresh
        self._payloads = pa.array(readings.payloads(BLOCK), pa.binary())

    def identity(self) -> str:
        return "one"

    def plan(
        self,
        position: Mapping[str, int],
        taken: Mapping[str, str],
        window: tuple[datetime, datetime] | None,
        row_limit: int | None,
    ) -> Span:
        return Span(self.name, "one", (Slice("0", 0, self._rows),))

    def read(self, span: Span) -> Iterator[pa.Table]:
        for first in range(0, self._rows, BLOCK):
            offsets = pa.array(range(first, first + BLOCK), pa.int64())
            ids = pc.binary_join_element_wise("readings/0/", offsets.cast(pa.string()), "")
            payloads = self._renamed(first) if self._fresh else self._payloads
            yield pa.table({"_row_id": ids, "_payload": payloads, "_offset": offsets})

    def _renamed(self, first: int) -> pa.Array:
        """The messages with other ids of the same length; each double has the id of the row before it."""
        named = enumerate(self._payloads.to_pylist())
        renamed = [
            payload.replace(_ID % at, _ID % (first + at - ((first + at) % _DOUBLE == 1)), 1) for at, payload in named
        ]
        return pa.array(renamed, pa.binary())

    def commit(self, span: Span) -> None: ...

    def close(self) -> None: ...


def make(place: Place) -> None:
    """Nothing: the rows are made as they are read."""


def _open(place: Place, who: str, rows: int, *, unique: bool = False) -> Run:
    from airflow_ai_provider.core.ingest.flow import IngestRun, ingest
    from airflow_ai_provider.core.ingest.validate import GxValidator
    from airflow_ai_provider.core.store import Store
    from airflow_ai_provider.testing import MemoryLedger

    validator, home = GxValidator(UNIQUE if unique else readings.SUITE), place.folder / who
    source = _Repeated(rows, fresh=unique)

    def run() -> None:
        ref = ingest(source, validator, Store(f"file://{home}"), MemoryLedger(), IngestRun("bench", "run", "run"))
        assert ref.counts["read"] == rows
        if unique:
            told = Store(f"file://{home}").manifest(ref).facts["reasons"]
            assert told["not_unique"] >= 2 * (rows // _DOUBLE) * 0.9, told  # some doubles break another rule first
        shutil.rmtree(home)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        (place.folder / f"{who}.peak").write_text(str(peak), encoding="utf-8")

    return run


def open_fifth(place: Place) -> Run:
    """A fifth of the rows."""
    return _open(place, "fifth", place.size // 5)


def open_ours(place: Place) -> Run:
    """All rows."""
    return _open(place, "ours", place.size)


def open_fifth_unique(place: Place) -> Run:
    """A fifth of the rows, with a rule about the whole batch."""
    return _open(place, "fifth_unique", place.size // 5, unique=True)


def open_unique(place: Place) -> Run:
    """All rows, with a rule about the whole batch."""
    return _open(place, "unique", place.size, unique=True)


def check(place: Place) -> None:
    """Five times the rows take no more memory, but for the allocator's moods."""
    for few, all_rows in (("fifth", "ours"), ("fifth_unique", "unique")):
        fifth, whole = (int((place.folder / f"{who}.peak").read_text(encoding="utf-8")) for who in (few, all_rows))
        assert whole < 1.15 * fifth, f"{fifth // 1024} MB for a fifth of the rows, {whole // 1024} MB for all ({few})"


CASE = Case(
    title="ingest of a fifth of the rows (limit) and of all: the column to read is peak MB",
    unit="s",
    sizes=(5_000_000, 1_000_000),
    size_unit="rows",
    goal="peak memory as with a fifth of the rows",
    make=make,
    check=check,
    contenders={"limit": open_fifth, "ours": open_ours, "fifth, unique": open_fifth_unique, "all, unique": open_unique},
    packages=("pyarrow", "msgspec", "great-expectations"),
)
