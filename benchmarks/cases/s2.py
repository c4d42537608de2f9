"""S2: peak memory of infer must not grow with the rows: a tenth of the rows, and all of them.

Both contenders run the whole verb over a landed batch (parts of 100 000 rows, as ingest lands them) with the model of
I1; each in a process of its own, whose peak is read after its run. The check demands that the peaks are alike, below
the goal, and that every row is there once, in its place.
"""

from __future__ import annotations

import json
import resource
import shutil

from benchmarks.cases.i1 import CLASSES, NAMES, PART_ROWS
from benchmarks.harness import Case, Place, Run

MOST_MB = 500


def make(place: Place) -> None:
    """Pin the model, land both batches."""
    import numpy as np
    import pyarrow as pa

    from airflow_ai_provider.core.batch import ACCEPTED, ROW_ID
    from airflow_ai_provider.core.store import Store
    from tests.core.infer.dense import columns_signature, dense_onnx, fresh_folder, pin_folder

    folder = fresh_folder("dense")
    (folder / "model.onnx").write_bytes(dense_onnx([12, 256, 256, 3]))
    pin = pin_folder(folder, "onnx", columns_signature(NAMES), classes=CLASSES)
    shutil.copytree(folder, place.folder / "model")
    (place.folder / "pin.json").write_text(json.dumps(pin.to_dict()), encoding="utf-8")
    for name, row_count in (("tenth", place.size // 10), ("ours", place.size)):
        random = np.random.default_rng(0)
        writer = Store(str(place.folder / "store")).open_batch("bench", "batch", name)
        for start in range(0, row_count, PART_ROWS):
            count = min(PART_ROWS, row_count - start)
            ids = [f"rows~0a1b2c3d/0/{i}" for i in range(start, start + count)]
            columns = {name: random.standard_normal(count, np.float32) for name in NAMES}
            writer.write(ACCEPTED, pa.table({ROW_ID: ids, **columns}))
        ref = writer.land({"read": row_count, "accepted": row_count, "quarantined": 0}, {})
        (place.folder / f"{name}.json").write_text(json.dumps(ref.to_dict()), encoding="utf-8")


def _open(place: Place, who: str) -> Run:
    from airflow_ai_provider.core.batch import BatchRef, Pin
    from airflow_ai_provider.core.infer.engine import open_engine
    from airflow_ai_provider.core.infer.flow import infer
    from airflow_ai_provider.core.store import Store

    pin = Pin.from_dict(json.loads((place.folder / "pin.json").read_text(encoding="utf-8")))
    batch = BatchRef.from_dict(json.loads((place.folder / f"{who}.json").read_text(encoding="utf-8")))
    store = Store(str(place.folder / "store"))
    engine = open_engine(pin, place.folder / "model", "cpu")

    def run() -> None:
        shutil.rmtree(place.folder / "store" / who, ignore_errors=True)
        ref = infer(batch, pin, store, engine, pipeline=who)
        assert ref.counts == {"accepted": batch.counts["accepted"], "predicted": batch.counts["accepted"], "failed": 0}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        (place.folder / f"{who}.peak").write_text(str(peak), encoding="utf-8")

    return run


def open_tenth(place: Place) -> Run:
    """A tenth of the rows."""
    return _open(place, "tenth")


def open_ours(place: Place) -> Run:
    """All rows."""
    return _open(place, "ours")


def check(place: Place) -> None:
    """Ten times the rows take no more memory, but for the allocator's moods; each row is there once, in its place."""
    import pyarrow.parquet as pq

    tenth, whole = (
        int((place.folder / f"{who}.peak").read_text(encoding="utf-8")) // 1024 for who in ("tenth", "ours")
    )
    assert whole < 1.15 * tenth and whole <= MOST_MB, f"{tenth} MB for a tenth of the rows, {whole} MB for all"
    files = sorted((place.folder / "store/ours/predictions").glob("*/predictions/*.parquet"))
    start = 0
    for path in files:
        ids = pq.read_table(path, columns=["_row_id"])["_row_id"].to_pylist()
        assert ids == [f"rows~0a1b2c3d/0/{i}" for i in range(start, start + len(ids))], path
        start += len(ids)
    assert start == place.size


CASE = Case(
    title="infer over a tenth of the rows (limit) and over all: the column to read is peak MB, not the ratio",
    unit="s",
    sizes=(10_000_000, 4_000_000),
    size_unit="rows",
    goal=f"peak memory as with a tenth of the rows, ≤ {MOST_MB} MB",
    make=make,
    check=check,
    contenders={"limit": open_tenth, "ours": open_ours},
    packages=("onnxruntime", "pyarrow", "numpy"),
)
