"""Shares of a batch, predicted one by one and landed together, against the batch that one task predicts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_ai_provider.core.batch import BatchRef
from airflow_ai_provider.core.infer.engine import Engine
from airflow_ai_provider.core.infer.flow import infer
from airflow_ai_provider.core.infer.gather import ShardReport, gather, predict_shard
from airflow_ai_provider.core.infer.shard import Shard, shards
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.errors import BatchRejectedError, CorruptBatchError, DeviceError, SpecError
from airflow_ai_provider.testing import ArithmeticEngine
from tests.core.infer.batches import PIN, land, part_files, rows


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def five_parts(store: Store) -> BatchRef:
    tables = [rows(200 + i, start=1000 * i) for i in range(5)]
    broken = pa.array([None, *tables[3]["x"].to_pylist()[1:]], pa.float64())
    tables[3] = tables[3].set_column(1, "x", broken)
    return land(store, tables)


def spread(batch: BatchRef, store: Store, count: int) -> tuple[list[ShardReport], int]:
    """Predict all shards; with the reports, how many engines were opened."""
    opened: list[ArithmeticEngine] = []

    def open_engine() -> Engine:
        opened.append(ArithmeticEngine(["x", "y"]))
        return opened[-1]

    reports = [
        predict_shard(batch, PIN, store, open_engine, Shard.parse(name), pipeline="p")
        for name in reversed(shards(count))
    ]
    seen = [row for engine in opened for row in engine.seen]
    assert len(seen) == len(set(seen)) == batch.counts["accepted"]
    return [ShardReport.from_dict(report.to_dict()) for report in reports], len(opened)


@given(parts=st.integers(0, 40), count=st.integers(1, 50))
def test_every_part_is_taken_once(parts: int, count: int) -> None:
    taken = [number for name in shards(count) for number in range(parts) if Shard.parse(name).takes(number)]
    assert sorted(taken) == list(range(parts))


@pytest.mark.parametrize("text", ["", "0/4", "5/4", "1/0", "2", "a/b", "1/2/3", "1/5000", None, 3, "-1/2"])
def test_what_is_no_shard_is_refused(text: object) -> None:
    with pytest.raises(SpecError, match="is not a share of a batch. Write K/N"):
        Shard.parse(text)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [0, -1, 1025, True, "4"])
def test_no_such_number_of_shards(count: int) -> None:
    with pytest.raises(SpecError, match="is not a share"):
        shards(count)


@pytest.mark.parametrize(("count", "opened"), [(1, 1), (2, 2), (3, 3), (5, 5), (9, 5)])
def test_shards_give_the_bytes_of_one_task(store: Store, tmp_path: Path, count: int, opened: int) -> None:
    whole = Store(str(tmp_path / "whole"))
    expected = infer(five_parts(whole), PIN, whole, ArithmeticEngine(["x", "y"]), pipeline="p")
    batch = five_parts(store)
    reports, engines = spread(batch, store, count)
    assert engines == opened, "a shard without parts opens no engine"
    assert store.find("p", "predictions", expected.batch_id) is None, "no shard lands anything"
    ref = gather(batch, PIN, store, reports, pipeline="p")
    assert (ref.batch_id, ref.counts, part_files(store, ref)) == (
        expected.batch_id,
        expected.counts,
        part_files(whole, expected),
    )
    # the manifests name the input's place, which differs here; a whole run beside the shards lands the same one
    assert infer(batch, PIN, store, ArithmeticEngine(["x", "y"]), pipeline="p") == ref


def test_a_batch_without_rows(store: Store, tmp_path: Path) -> None:
    batch = land(store, [])
    reports, engines = spread(batch, store, 3)
    assert engines == 1
    ref = gather(batch, PIN, store, reports, pipeline="p")
    assert ref.counts == {"accepted": 0, "predicted": 0, "failed": 0}
    assert infer(batch, PIN, store, ArithmeticEngine(["x", "y"]), pipeline="p") == ref


def test_the_limit_holds_for_the_whole_batch(store: Store) -> None:
    batch = five_parts(store)
    reports, _ = spread(batch, store, 2)
    assert [report.failed for report in reports] == [1, 0]
    with pytest.raises(BatchRejectedError, match="1 of 1010 rows .* not_finite"):
        gather(batch, PIN, store, reports, pipeline="p", max_failed=0)
    assert gather(batch, PIN, store, reports, pipeline="p", max_failed=0.01).counts["failed"] == 1


def test_a_part_that_is_gone_or_changed_lands_nothing(store: Store) -> None:
    batch = five_parts(store)
    reports, _ = spread(batch, store, 2)
    (part,) = Path(store.root).glob("p/predictions/*/predictions/00002.parquet")
    part.write_bytes(part.read_bytes() + b" ")
    with pytest.raises(CorruptBatchError, match=r"parts \[2\] of the predictions .* Clear the shards"):
        gather(batch, PIN, store, reports, pipeline="p")
    assert not list(Path(store.root).glob("p/predictions/*/manifest.json"))
    again, _ = Shard.parse("1/2"), part.unlink()
    engine = ArithmeticEngine(["x", "y"])
    predict_shard(batch, PIN, store, lambda: engine, again, pipeline="p")
    assert len(engine.seen) == 202, "only the part that was gone is predicted again"
    assert gather(batch, PIN, store, reports, pipeline="p").counts["accepted"] == 1010


def test_reports_that_do_not_belong_together(store: Store) -> None:
    batch = five_parts(store)
    reports, _ = spread(batch, store, 3)
    for some in ([], reports[:2], [*reports, reports[0]], [replace(reports[0], shard=Shard(3, 4)), *reports[1:]]):
        with pytest.raises(SpecError, match="are not all shares of a batch, each once"):
            gather(batch, PIN, store, some, pipeline="p")
    other = replace(reports[1], pin_digest="sha256:0")
    with pytest.raises(SpecError, match="shards 2/3 predicted another batch or with another model"):
        gather(batch, PIN, store, [reports[0], other, reports[2]], pipeline="p")
    elsewhere = replace(reports[1], options={"engine": "arithmetic", "device": "cuda", "batch_size": 8})
    with pytest.raises(DeviceError, match="did not all run alike: .*'device': 'cuda'"):
        gather(batch, PIN, store, [reports[0], elsewhere, reports[2]], pipeline="p")
    for data in ({}, {"shard": "1/2", "what": 1}, {**reports[0].to_dict(), "more": 1}):
        with pytest.raises(SpecError, match="is no report of a shard"):
            ShardReport.from_dict(data)
