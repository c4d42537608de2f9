"""S1: peak memory of ingest must not grow with the rows: a fifth of the rows, and all of them.

Both contenders run the whole verb over blocks made on the spot (nothing waits in memory), with ten expectations, to
Parquet; each in a process of its own, whose peak is read after its run. The check demands the two peaks to be alike.
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


class _Repeated:
    """The same messages again and again, at rising offsets."""

    name, key, format = "kafka:readings", "reading_id", "json"

    def __init__(self, rows: int) -> None:
        self._rows = rows
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
            yield pa.table({"_row_id": ids, "_payload": self._payloads, "_offset": offsets})

    def commit(self, span: Span) -> None: ...

    def close(self) -> None: ...


def make(place: Place) -> None:
    """Nothing: the rows are made as they are read."""


def _open(place: Place, who: str, rows: int) -> Run:
    from airflow_ai_provider.core.ingest.flow import IngestRun, ingest
    from airflow_ai_provider.core.ingest.validate import GxValidator
    from airflow_ai_provider.core.store import Store
    from airflow_ai_provider.testing import MemoryLedger

    validator, home = GxValidator(readings.SUITE), place.folder / who
    source = _Repeated(rows)

    def run() -> None:
        ref = ingest(source, validator, Store(f"file://{home}"), MemoryLedger(), IngestRun("bench", "run", "run"))
        assert ref.counts["read"] == rows
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


def check(place: Place) -> None:
    """Five times the rows take no more memory, but for the allocator's moods."""
    fifth, whole = (int((place.folder / f"{who}.peak").read_text(encoding="utf-8")) for who in ("fifth", "ours"))
    assert whole < 1.15 * fifth, f"{fifth // 1024} MB for a fifth of the rows, {whole // 1024} MB for all"


CASE = Case(
    title="ingest of a fifth of the rows (limit) and of all: the column to read is peak MB",
    unit="s",
    sizes=(5_000_000, 1_000_000),
    size_unit="rows",
    goal="peak memory as with a fifth of the rows",
    make=make,
    check=check,
    contenders={"limit": open_fifth, "ours": open_ours},
    packages=("pyarrow", "msgspec", "great-expectations"),
)
