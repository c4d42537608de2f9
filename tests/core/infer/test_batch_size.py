"""The batch size that is found: faster where it pays, smaller where memory ends, and never another byte."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_ai_provider.core.batch import BatchRef
from airflow_ai_provider.core.infer.batch_size import BatchSize, SizeMemory, next_size
from airflow_ai_provider.core.infer.engine import open_engine
from airflow_ai_provider.core.infer.flow import infer
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.errors import EngineMemoryError
from airflow_ai_provider.testing import ArithmeticEngine
from tests.core.infer import wide
from tests.core.infer.batches import PIN, land, part_files, rows


class Limited(ArithmeticEngine):
    """Arithmetic that takes so many rows per call and no more, and notes how many it was called with."""

    def __init__(self, most: int = 10**9, before: Callable[[pa.Table], None] = lambda rows: None) -> None:
        super().__init__(["x", "y"], before=before)
        self.most, self.sizes = most, list[int]()

    def predict(self, rows: pa.Table, batch_size: int) -> pa.Table:
        self.sizes.append(batch_size)
        if batch_size > self.most:
            raise MemoryError(f"no room for {batch_size} rows")
        return super().predict(rows, batch_size)


class Rounding(Limited):
    """One whose last bits depend on the batch size, as a GPU's do: here all bits of the score."""

    steady = False
    batch_size = 64

    def predict(self, rows: pa.Table, batch_size: int) -> pa.Table:
        predicted = super().predict(rows, batch_size)
        scores = pa.array(np.full(rows.num_rows, 1 / batch_size))
        return predicted.set_column(predicted.column_names.index("score"), "score", scores)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def run(store: Store, engine: ArithmeticEngine, batch: BatchRef, **options: object) -> BatchRef:
    return infer(batch, PIN, store, engine, pipeline="p", progress=lambda line: None, **options)  # type: ignore[arg-type]


def batch_in(store: Store, *sizes: int) -> BatchRef:
    return land(store, [rows(size, start=sum(sizes[:i])) for i, size in enumerate(sizes)])


def number_of(rows: pa.Table) -> int:
    return int(rows["_row_id"][0].as_py().rpartition("/")[2])


def size_of(store: Store, ref: BatchRef) -> int:
    return int(store.manifest(ref).facts["engine"]["batch_size"])


# --- the search ---


def climb(rate: Callable[[int], float], start: int, most: int) -> tuple[int, dict[int, float]]:
    """Search with exact measurements."""
    rates, size, goes_on = dict[int, float](), start, True
    while goes_on:
        rates[size] = rate(size)
        size, goes_on = next_size(rates, start, most)
    return size, rates


@given(
    peak=st.integers(4, 16),
    slope=st.floats(1.06, 3),
    start=st.integers(4, 14).map(lambda power: 1 << power),
)
def test_a_hill_is_climbed_from_either_side(peak: int, slope: float, start: int) -> None:
    found, rates = climb(lambda size: slope ** -abs(math.log2(size) - peak), start, 1 << 20)
    assert found == 1 << peak
    assert len(rates) <= abs(peak - math.log2(start)) + 3


def test_of_equally_fast_sizes_the_smallest_tried_is_taken_and_little_is_tried() -> None:
    found, rates = climb(lambda size: 1000.0, 256, 4096)
    assert (found, sorted(rates)) == (128, [128, 256, 512])
    assert climb(float, 256, 1000)[0] == 512  # never more than there are rows
    assert climb(lambda size: 1 / size, 16, 4096)[0] == 16


def test_only_the_fastest_of_three_counts_and_only_for_the_size_that_is_tried() -> None:
    told: list[int] = []
    size = BatchSize(64, 128, searches=True, settled=told.append)
    for seconds in (9.0, 1.0, 5.0):
        size.took(64, 64, seconds)
    assert size.now == 128
    size.took(64, 64, 0.001)  # one that started before the change
    for seconds in (1.97, 2.5, 9.9):
        size.took(128, 128, seconds)
    assert (size.now, size.searches, told) == (32, True, [])
    for _ in range(3):
        size.took(32, 32, 0.9)
    assert (size.now, size.searches, told) == (64, False, [64])


def test_a_better_size_is_found_while_predicting_and_remembered(store: Store, tmp_path: Path) -> None:
    class Slow(Limited):
        batch_size = 16

        def predict(self, rows: pa.Table, batch_size: int) -> pa.Table:
            time.sleep(0.002 * math.ceil(rows.num_rows / batch_size))
            return super().predict(rows, batch_size)

    memory, engine = SizeMemory(tmp_path / "models"), Slow()
    batch = batch_in(store, *[600] * 12)
    expected = run(
        Store(f"{store.root}-plain"), ArithmeticEngine(["x", "y"]), batch_in(Store(f"{store.root}-plain"), *[600] * 12)
    )
    found = run(store, engine, batch, memory=memory)
    assert part_files(store, found) == part_files(Store(f"{store.root}-plain"), expected)
    assert max(engine.sizes) > 16
    kept = memory.find(PIN.digest, engine)
    if kept is not None:  # the search came to its end on these rows
        again, third = Slow(), Store(f"{store.root}-3")
        run(third, again, batch_in(third, 600), memory=memory)
        assert set(again.sizes) == {kept}


# --- memory ends ---


def test_a_call_that_does_not_fit_is_made_smaller_and_no_byte_changes(store: Store) -> None:
    engine, other = Limited(most=100), Store(f"{store.root}-2")
    found = run(store, engine, batch_in(store, 2000, 0, 500))
    expected = run(other, ArithmeticEngine(["x", "y"]), batch_in(other, 2000, 0, 500))
    assert part_files(store, found) == part_files(other, expected)
    assert found.batch_id == expected.batch_id
    assert sorted(engine.seen) == sorted(f"orders/0/{i}" for i in range(2500)), "each row predicted once"
    assert engine.sizes[-1] == 62 and max(engine.sizes) == 1000


def test_the_authors_size_is_made_smaller_too_where_bits_do_not_depend_on_it(store: Store) -> None:
    engine = Limited(most=10)
    assert run(store, engine, batch_in(store, 300), batch_size=64).counts["predicted"] == 300
    assert engine.sizes[-1] == 8


def test_one_row_that_does_not_fit_says_so(store: Store) -> None:
    with pytest.raises(EngineMemoryError, match="even with one row per call"):
        run(store, Limited(most=0), batch_in(store, 30))
    assert not list(Path(store.root).rglob("manifest.json"))[1:]


# --- where bits depend on it ---


def test_all_tries_of_a_batch_go_by_the_number_that_was_written_down_first(store: Store, tmp_path: Path) -> None:
    batch = batch_in(store, *[300] * 6)

    def cut(rows: pa.Table) -> None:
        if number_of(rows) >= 900:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(store, Rounding(before=cut), batch)
    memory = SizeMemory(tmp_path / "models")
    memory.keep(PIN.digest, Rounding(), 7)  # what the next worker remembers must not matter now
    found = run(store, Rounding(), batch, memory=memory)
    scores = {s for table in store.read(found) for s in table["score"].to_pylist()}
    assert scores == {1 / size_of(store, found)} and size_of(store, found) != 7
    assert run(store, Rounding(), batch, memory=memory) == found


def test_what_a_worker_remembers_is_taken_for_a_new_batch(store: Store, tmp_path: Path) -> None:
    memory = SizeMemory(tmp_path / "models")
    memory.keep(PIN.digest, Rounding(), 7)
    assert size_of(store, run(store, Rounding(), batch_in(store, 300), memory=memory)) == 7


def test_a_batch_of_a_few_calls_is_not_worth_a_trial(store: Store) -> None:
    engine = Rounding()
    assert size_of(store, run(store, engine, batch_in(store, 300))) == 64
    assert set(engine.sizes) == {64} and len(engine.seen) == 300


def test_the_author_decides_without_a_trial_or_a_record(store: Store) -> None:
    engine = Rounding()
    assert size_of(store, run(store, engine, batch_in(store, 3000), batch_size=50)) == 50
    assert set(engine.sizes) == {50}
    assert not list(Path(store.root).rglob("batch_sizes"))


def test_of_many_workers_that_start_at_once_one_decides(store: Store) -> None:
    batch = batch_in(store, 500)

    def work(size: int) -> BatchRef:
        memory = SizeMemory(Path(store.root) / f"worker-{size}")
        memory.keep(PIN.digest, Rounding(), size)
        return run(Store(store.root), Rounding(), batch, memory=memory)

    with ThreadPoolExecutor(8) as pool:
        refs = list(pool.map(work, range(8, 40)))
    assert len({(ref.batch_id, ref.digest) for ref in refs}) == 1


def test_when_memory_ends_in_the_middle_the_next_try_starts_over_with_half(store: Store) -> None:
    batch = batch_in(store, *[300] * 8)

    def shrink(rows: pa.Table) -> None:
        if number_of(rows) >= 600:
            engine.most = 8

    engine = Rounding(before=shrink)
    with pytest.raises(EngineMemoryError, match="next try starts over with") as raised:
        run(store, engine, batch)
    halves = [raised.value.batch_size]
    while halves[-1] > 16:
        with pytest.raises(EngineMemoryError) as raised:
            run(store, Rounding(most=8), batch)
        halves.append(raised.value.batch_size)
    assert halves == [halves[0] >> i for i in range(len(halves))]
    found = run(store, Rounding(most=8), batch)
    scores = {s for table in store.read(found) for s in table["score"].to_pylist()}
    assert scores == {1 / 8} and size_of(store, found) == 8
    with pytest.raises(EngineMemoryError, match="set batch_size to 50"):
        run(store, Rounding(most=40), batch, batch_size=100)


# --- what is remembered ---


def test_a_memory_that_cannot_be_read_or_written_says_nothing(tmp_path: Path) -> None:
    memory, engine = SizeMemory(tmp_path / "models"), Limited()
    assert memory.find("sha256:1", engine) is None
    memory.keep("sha256:1", engine, 128)
    assert memory.find("sha256:1", engine) == 128
    assert memory.find("sha256:2", engine) is None
    (file,) = (tmp_path / "models").rglob("*.json")
    for spoilt in (b"", b"{", b"[]", b'{"batch_size": 0}', b'{"batch_size": "9"}'):
        file.write_bytes(spoilt)
        assert memory.find("sha256:1", engine) is None
    (tmp_path / "file").write_text("")
    SizeMemory(tmp_path / "file").keep("sha256:1", engine, 128)


def test_a_record_that_is_no_number_of_ours_is_replaced(store: Store) -> None:
    batch = batch_in(store, 300)
    run(store, Rounding(), batch)
    (record,) = Path(store.root).rglob("batch_sizes/*.json")
    record.write_bytes(b"")
    assert size_of(store, run(store, Rounding(), batch)) == 64
    assert record.read_bytes() == b'{"batch_size":64}'


# --- real libraries, real memory ---

_STARVED = """
import resource
from pathlib import Path
from airflow_ai_provider.core.infer.engine import open_engine
from tests.core.infer import wide
engine = open_engine(*wide.by_onnx(), "cpu")
expected = engine.predict(wide.rows(), 8)
now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + (1100 << 20),) * 2)
try:
    engine.predict(wide.rows(), 512)
except MemoryError as error:
    print("full:", error)
print(engine.predict(wide.rows(), 8).equals(expected))
"""


def test_onnx_runtime_says_that_it_finds_no_memory_and_goes_on_with_less() -> None:
    """Each row needs 4 MB between the layers: 512 of them 2 GB, more than this process may have."""
    done = subprocess.run([sys.executable, "-c", _STARVED], capture_output=True, text=True, timeout=120, check=False)
    said, goes_on = done.stdout.splitlines() or [done.stderr[-2000:], ""]
    assert said.startswith("full: ") and "allocate memory" in said
    assert goes_on == "True"


def test_torch_says_that_it_finds_no_memory(store: Store) -> None:
    """A call is filled up to its size: four terabytes that no machine gives."""
    pin, folder = wide.by_torch()
    with open_engine(pin, folder, "cpu") as engine, pytest.raises(EngineMemoryError, match="set batch_size to 524288"):
        infer(land(store, [wide.rows()]), pin, store, engine, pipeline="p", batch_size=1 << 20)
