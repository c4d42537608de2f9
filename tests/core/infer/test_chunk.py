"""How a part is cut for the workers: every row once, whole calls, and ever smaller ones where somebody would wait."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_ai_provider.core.batch import Pin
from airflow_ai_provider.core.infer.batching import Calls, run_inputs
from airflow_ai_provider.core.infer.chunk import Abreast, chunk_lengths, chunk_rows, shared_rows
from airflow_ai_provider.core.infer.engine import open_engine
from airflow_ai_provider.core.infer.flow import infer
from airflow_ai_provider.core.infer.inputs import Array, Inputs, Sequences
from airflow_ai_provider.core.infer.onnx import OnnxEngine
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.testing import ArithmeticEngine
from tests.core.infer.batches import land, part_files
from tests.core.infer.nets import sequence_pin, sequence_rows

IMAGE = 4 * 3 * 64 * 64


class Sized(ArithmeticEngine):
    """Arithmetic with rows of another size."""

    def __init__(self, row_bytes: int, workers: int = 2, *, steady: bool = True) -> None:
        super().__init__(["x"])
        self.row_bytes, self.workers, self.steady = row_bytes, workers, steady


@pytest.mark.parametrize(
    ("row_count", "batch_size", "row_bytes", "workers", "expected"),
    [
        (1_000_000, 1024, 48, 2, 16_384),
        (1_000_000, 1024, 4 * 3 * 224 * 224, 2, 1024),  # one batch is the least
        (1_000_000, 64, IMAGE, 2, 640),  # as many images as 32 MiB hold
        (10_000, 1024, 48, 8, 1024),  # shared among the workers
        (10, 1024, 48, 2, 1024),
        (100, 1, 48, 2, 25),
    ],
)
def test_chunks_are_whole_batches_within_memory(
    row_count: int, batch_size: int, row_bytes: int, workers: int, expected: int
) -> None:
    assert chunk_rows(row_count, batch_size, row_bytes, workers) == expected


@given(
    row_count=st.integers(0, 20_000),
    batch_size=st.integers(1, 2_000),
    row_bytes=st.integers(1, 1 << 20),
    workers=st.integers(1, 16),
    is_last=st.booleans(),
    steady=st.booleans(),
)
def test_every_row_is_in_one_chunk_and_only_the_last_parts_chunks_shrink(
    *, row_count: int, batch_size: int, row_bytes: int, workers: int, is_last: bool, steady: bool
) -> None:
    engine = Sized(row_bytes, workers, steady=steady)
    lengths = list(chunk_lengths(row_count, batch_size, engine, is_last=is_last))
    assert sum(lengths) == row_count and (min(lengths) > 0 or lengths == [0])
    assert lengths == sorted(lengths, reverse=True)
    if not (is_last and steady):
        assert all(length % batch_size == 0 for length in lengths[:-1])


def test_the_last_images_are_shared_out_in_small_calls_and_the_last_numbers_are_not() -> None:
    images = list(chunk_lengths(500, 64, Sized(IMAGE), is_last=True))
    assert images[:4] == [64] * 4 and images[-2] == (256 << 10) // IMAGE and len(images) < 25
    assert list(chunk_lengths(500, 64, Sized(IMAGE), is_last=False)) == [64] * 7 + [52]
    assert list(chunk_lengths(500, 64, Sized(IMAGE, workers=1), is_last=True)) == [192, 192, 116]
    assert list(chunk_lengths(10_000, 1024, Sized(48), is_last=True)) == [2048] * 4 + [1808]


def test_calls_of_sequences_are_full_first_then_the_largest_first() -> None:
    widths = np.array([8] * 70 + [0] + [16] * 37 + [32] * 3)
    given: list[tuple[int, ...]] = []

    def run(arrays: list[Array]) -> list[Array]:
        given.append(arrays[0].shape)
        return [arrays[0][:, :1]]

    def fill(chosen: Array, width: int) -> list[Array]:
        return [np.repeat(chosen[:, None], width, axis=1)]

    inputs = Inputs([], {70: "no row"}, Sequences(widths, fill))
    (found,) = run_inputs(run, inputs, 256, Calls(0, True), lambda: [])
    assert found.reshape(-1).tolist() == [*range(70), 0, *range(71, 111)]
    assert given[:-3] == [(32, 8)] * 2 + [(16, 16)] * 2
    assert given[-3:] == [(3, 32), (5, 16), (6, 8)]


def test_shared_rows_are_bounded_by_the_memory_of_their_input() -> None:
    assert shared_rows(8) == 16_384
    assert shared_rows(512 * 8 * 3) * 512 * 8 * 3 <= 64 << 20
    assert shared_rows(1 << 40) == 1


def test_calls_are_made_by_all_workers_at_once_and_their_time_is_added_up() -> None:
    both = threading.Barrier(2, timeout=10)
    with ThreadPoolExecutor(2) as pool:
        calls = Abreast(pool)
        assert list(calls(lambda item: (both.wait(), item * 2)[1], range(6))) == [0, 2, 4, 6, 8, 10]
    assert calls.seconds > 0


# --- a transformer ---


@pytest.fixture(scope="module")
def bert() -> tuple[Pin, Path]:
    return sequence_pin(hidden=32, vocabulary=50, longest=64)


def test_who_makes_a_call_changes_no_bit(bert: tuple[Pin, Path]) -> None:
    rows = sequence_rows(300, vocabulary=50, longest=64, median=12)
    with open_engine(*bert, "cpu") as engine, ThreadPoolExecutor(3) as pool:
        expected = engine.predict(rows, 512)
        assert all(engine.predict(rows, budget, pool.map).equals(expected) for budget in (64, 512, 4096))


def test_calls_that_do_not_fit_into_memory_are_made_smaller_and_no_byte_changes(
    bert: tuple[Pin, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = sequence_rows(200, vocabulary=50, longest=64, median=12)

    def predicted(name: str) -> dict[str, bytes]:
        store = Store(str(tmp_path / name))
        with open_engine(*bert, "cpu") as engine:
            batch = land(store, [rows.slice(0, 150), rows.slice(150)])
            ref = infer(batch, bert[0], store, engine, pipeline="p", progress=lambda line: None)
        return part_files(store, ref)

    expected, plain, most = predicted("plain"), OnnxEngine._run, 128

    def cramped(engine: OnnxEngine, arrays: list[Array]) -> list[Array]:
        if arrays[0].size > most:
            raise MemoryError(f"no room for {arrays[0].size} tokens")
        return plain(engine, arrays)

    monkeypatch.setattr(OnnxEngine, "_run", cramped)
    assert predicted("cramped") == expected
