"""The order of inference: every row accounted for, resumed, the same bytes, nothing left behind on failure."""

from __future__ import annotations

import resource
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from airflow_ai_provider.core.batch import ACCEPTED, PREDICTIONS, ROW_ID, BatchRef
from airflow_ai_provider.core.infer.engine import open_engine
from airflow_ai_provider.core.infer.flow import infer
from airflow_ai_provider.core.infer.progress import Progress
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.errors import (
    BatchRejectedError,
    CorruptBatchError,
    RowMismatchError,
    SignatureError,
    SourceUnavailableError,
    SpecError,
)
from airflow_ai_provider.testing import ArithmeticEngine
from tests.core.infer import models
from tests.core.infer.batches import PIN, land, part_files, rows


class PowerCutError(Exception):
    """What a test's engine raises in the middle."""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


@pytest.fixture
def batch(store: Store) -> BatchRef:
    return land(store, [rows(2500, start=0), rows(1, start=2500), rows(3000, start=2501)])


def predict(batch: BatchRef, store: Store, engine: ArithmeticEngine | None = None, **options: object) -> BatchRef:
    return infer(batch, PIN, store, engine or ArithmeticEngine(["x", "y"]), pipeline="p", **options)  # type: ignore[arg-type]


def fails_after(calls: int) -> Callable[[pa.Table], None]:
    lock, left = threading.Lock(), [calls]

    def before(rows: pa.Table) -> None:
        with lock:
            left[0] -= 1
            if left[0] < 0:
                raise PowerCutError

    return before


# --- what comes out ---


def test_parts_hold_the_rows_of_the_parts_they_came_from(store: Store, batch: BatchRef) -> None:
    ref = predict(batch, store)
    assert (ref.kind, ref.counts) == (PREDICTIONS, {"accepted": 5501, "predicted": 5501, "failed": 0})
    assert ref.batch_id.startswith("orders-1-")
    sources = list(store.read(batch, ACCEPTED))
    predicted = list(store.read(ref, PREDICTIONS))
    assert [p.num_rows for p in predicted] == [2500, 1, 3000]
    for given, got in zip(sources, predicted, strict=True):
        assert got.column_names == [ROW_ID, "prediction", "score", "probabilities", "error"]
        assert got[ROW_ID].equals(given[ROW_ID])
        for row, line in zip(given.to_pylist(), got.to_pylist(), strict=True):
            assert line["prediction"] == ("high" if row["x"] + row["y"] > 0 else "low")
    facts = store.manifest(ref).facts
    assert (facts["input"], facts["pin"]) == (batch.to_dict(), PIN.to_dict())
    assert facts["engine"] == {"engine": "arithmetic", "device": "cpu"}


def test_a_failed_row_is_counted_and_keeps_its_place(store: Store) -> None:
    broken = rows(100).set_column(1, "x", pa.array([None, float("inf"), *[1.0] * 98]))
    ref = predict(land(store, [broken, rows(10, start=100)]), store)
    assert ref.counts == {"accepted": 110, "predicted": 108, "failed": 2}
    first = next(store.read(ref)).to_pylist()
    assert [line["error"] is None for line in first] == [False, False] + [True] * 98


@pytest.mark.parametrize(
    ("limit", "passes"), [(None, True), (2, True), (1, False), (0.02, True), (0.01, False), (0, False)]
)
def test_too_many_failed_rows_land_nothing(store: Store, limit: float | None, passes: bool) -> None:
    broken = rows(100).set_column(1, "x", pa.array([None, float("inf"), *[1.0] * 98]))
    batch = land(store, [broken])
    if passes:
        assert predict(batch, store, max_failed=limit).counts["failed"] == 2
        return
    with pytest.raises(BatchRejectedError, match="2 of 100 rows.*not_finite: a column is null"):
        predict(batch, store, max_failed=limit)
    assert not list(Path(store.root).glob("p/predictions/*/manifest.json"))
    # more patience afterwards: nothing is predicted again
    engine = ArithmeticEngine(["x", "y"])
    assert predict(batch, store, engine, max_failed=5).counts["failed"] == 2
    assert engine.seen == []


@pytest.mark.parametrize("parts", [[], [rows(0)], [rows(0), rows(5), rows(0)]], ids=["no part", "no row", "holes"])
def test_a_batch_with_nothing_in_it_is_a_batch(store: Store, parts: list[pa.Table]) -> None:
    ref = predict(land(store, parts), store)
    assert ref.counts["accepted"] == sum(p.num_rows for p in parts)
    assert [p.row_count for p in store.manifest(ref).parts] == [p.num_rows for p in parts]


def test_only_the_columns_that_the_engine_reads_reach_it(store: Store, batch: BatchRef) -> None:
    seen: list[list[str]] = []
    predict(batch, store, ArithmeticEngine(["y"], before=lambda table: seen.append(table.column_names)))
    assert set(map(tuple, seen)) == {(ROW_ID, "y")}


def test_rows_that_do_not_fit_are_told_before_the_first(store: Store, batch: BatchRef) -> None:
    engine = ArithmeticEngine(["x", "absent"])
    with pytest.raises(SignatureError, match="absent"):
        predict(batch, store, engine)
    assert engine.seen == []


# --- the same bytes ---


@pytest.mark.parametrize("batch_size", [1, 7, 1000, 10**9])
def test_the_same_rows_give_the_same_bytes_at_every_batch_size(store: Store, batch: BatchRef, batch_size: int) -> None:
    other = Store(store.root + "-again")
    again = land(other, list(store.read(batch)))
    first = predict(batch, store)
    second = predict(again, other, batch_size=batch_size)
    assert part_files(store, first) == part_files(other, second)
    assert first.batch_id == second.batch_id


def test_real_engines_give_the_same_bytes_at_every_run(tmp_path: Path) -> None:
    for rows_, (pin, folder), sizes in (
        (models.cancer_rows(), models.cancer_onnx(), (None, 1, 50)),
        (models.digit_rows(), models.digit_torch(), (32, 32)),
    ):
        made = []
        for run, size in enumerate(sizes):
            store = Store(str(tmp_path / pin.name / str(run)))
            with open_engine(pin, folder, "cpu") as engine:
                ref = infer(land(store, [rows_, rows_.slice(0, 3)]), pin, store, engine, pipeline="p", batch_size=size)
            made.append((ref.batch_id, part_files(store, ref)))
        assert all(entry == made[0] for entry in made)


def test_where_bits_depend_on_the_batch_size_it_is_part_of_the_name(store: Store) -> None:
    batch = land(store, [models.digit_rows()])
    pin, folder = models.digit_torch()
    with open_engine(pin, folder, "cpu") as engine:
        refs = [infer(batch, pin, store, engine, pipeline="p", batch_size=size) for size in (16, 32, 32)]
    assert refs[0].batch_id != refs[1].batch_id and refs[1] == refs[2]
    assert store.manifest(refs[1]).facts["engine"] == {"engine": "torch", "device": "cpu", "batch_size": 32}


def test_predictions_are_read_back_as_plain_columns(store: Store) -> None:
    pin, folder = models.cancer_onnx()
    with open_engine(pin, folder, "cpu") as engine:
        ref = infer(land(store, [models.cancer_rows()]), pin, store, engine, pipeline="p")
    table = next(store.read(ref))
    assert table.schema.field("prediction").type == pa.string()
    assert table.schema.field("probabilities").type.value_type == pa.float32()
    right = models.cancer_model().predict(models.load_breast_cancer().data.astype("float32"))
    assert table["prediction"].to_pylist() == [("malignant", "benign")[label] for label in right]


# --- resume ---


def test_a_retry_keeps_what_was_done_and_lands_the_same(store: Store) -> None:
    parts = [rows(3000, start=i * 3000) for i in range(6)]
    batch = land(store, parts)
    whole = Store(store.root + "-whole")
    expected = predict(land(whole, parts), whole)
    with pytest.raises(PowerCutError):
        predict(batch, store, ArithmeticEngine(["x", "y"], before=fails_after(10)), batch_size=1000)
    done = sorted(path.name for path in Path(store.root).rglob("*.done"))
    assert 1 <= len(done) < 6
    assert not list(Path(store.root).glob("p/predictions/*/manifest.json"))
    engine, said = ArithmeticEngine(["x", "y"]), []
    ref = predict(batch, store, engine, progress=said.append)
    assert len(engine.seen) == (6 - len(done)) * 3000 == len(set(engine.seen))
    assert f"{len(done) * 3000:,} of them by an earlier try" in said[-1]
    assert part_files(store, ref) == part_files(whole, expected)
    assert store.manifest(ref).counts == whole.manifest(expected).counts


def test_a_part_counts_as_done_only_for_the_same_pin_and_input(store: Store, batch: BatchRef) -> None:
    predict(batch, store)
    engine = ArithmeticEngine(["x", "y"])
    infer(batch, replace(PIN, digest="sha256:" + "2" * 64), store, engine, pipeline="p")
    other = land(store, [rows(5501, seed=9)], "orders-2")
    predict(other, store, engine)
    assert len(engine.seen) == 2 * 5501


@pytest.mark.parametrize("harm", ["delete", "change", "unreadable mark", "foreign mark"])
def test_a_stored_part_that_is_not_what_its_mark_says_is_predicted_again(
    store: Store, batch: BatchRef, harm: str
) -> None:
    ref = predict(batch, store)
    part, mark = Path(ref.uri) / "predictions/00002.parquet", Path(ref.uri) / "predictions/00002.parquet.done"
    before = part.read_bytes()
    if harm == "delete":
        part.unlink()
    elif harm == "change":
        part.write_bytes(before[:-1] + b"!")
    elif harm == "unreadable mark":
        mark.write_bytes(mark.read_bytes()[:20])
    else:
        mark.write_bytes((Path(ref.uri) / "predictions/00000.parquet.done").read_bytes())
    engine = ArithmeticEngine(["x", "y"])
    assert predict(batch, store, engine) == ref
    assert len(engine.seen) == 3000
    assert part.read_bytes() == before


# --- engines that break their contract ---


def reordered(predicted: pa.Table) -> pa.Table:
    return predicted.take(list(range(predicted.num_rows))[::-1])


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda table: table.slice(1), "999 lines for 1000 rows"),
        (lambda table: pa.concat_tables([table, table.slice(0, 1)]), "1001 lines for 1000 rows"),
        (lambda table: pa.concat_tables([table.slice(1), table.slice(0, 1)]), "another order"),
        (reordered, "another order"),
        (lambda table: pa.concat_tables([table.slice(0, 999), table.slice(0, 1)]), "other rows"),
        (lambda table: table.drop_columns(["score"]), "columns"),
    ],
    ids=["lost", "doubled", "rotated", "reversed", "replaced", "a column lost"],
)
def test_an_engine_that_loses_doubles_or_reorders_rows_is_caught(
    store: Store, spoil: Callable[[pa.Table], pa.Table], said: str
) -> None:
    batch = land(store, [rows(4000)])
    with pytest.raises(RowMismatchError, match=said):
        predict(batch, store, ArithmeticEngine(["x", "y"], spoil=spoil), batch_size=1000)
    assert not list(Path(store.root).glob("p/predictions/*/manifest.json"))


# --- failures anywhere surface, nothing is left behind ---


def test_a_failure_of_the_model_stops_everything(store: Store) -> None:
    batch = land(store, [rows(1000, start=i * 1000) for i in range(20)])
    engine = ArithmeticEngine(["x", "y"], before=fails_after(3))
    with pytest.raises(PowerCutError):
        predict(batch, store, engine, batch_size=1000)
    assert len(engine.seen) < 10_000, "what was not running yet should not have been started"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("infer")]


def test_a_failure_of_the_writer_surfaces(store: Store, batch: BatchRef) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # as a full disk: the system takes no longer file
    try:
        with pytest.raises(SourceUnavailableError, match="did not take .*predictions/00000.parquet"):
            predict(batch, store)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(Path(store.root).glob("p/predictions/*/manifest.json"))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("infer")]
    engine = ArithmeticEngine(["x", "y"])
    assert predict(batch, store, engine).counts["predicted"] == len(engine.seen) == 5501


def test_a_failure_of_the_reader_surfaces(store: Store) -> None:
    batch = land(store, [rows(1000, start=i * 1000) for i in range(5)])
    path = Path(batch.uri) / "accepted/00003.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(CorruptBatchError, match="00003"):
        predict(batch, store)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("infer")]


def test_a_batch_size_below_one_is_refused(store: Store, batch: BatchRef) -> None:
    with pytest.raises(SpecError, match="batch_size is 0"):
        predict(batch, store, batch_size=0)


# --- sizes and lines ---


def test_progress_speaks_every_few_seconds_and_at_the_end() -> None:
    said: list[str] = []
    clock = iter([0.0, 1.0, 5.0, 6.0, 10.0, 12.0])
    progress = Progress(said.append, 1000, now=lambda: next(clock))
    progress.kept(100)
    for count in (100, 200, 100, 200):
        progress.advance(count)
    progress.finish(3, "onnx, cpu")
    assert said == [
        "400 of 1,000 rows (40%), 60 rows/s, about 10 s left",
        "700 of 1,000 rows (70%), 60 rows/s, about 5 s left",
        "1,000 rows in 12.0 s (50 rows/s) on onnx, cpu: 997 predicted, 3 failed, 100 of them by an earlier try",
    ]


def test_stored_parts_are_plain_parquet(store: Store, batch: BatchRef) -> None:
    ref = predict(batch, store)
    schema = pq.read_schema(Path(ref.uri) / "predictions/00000.parquet")
    assert schema.metadata is None
