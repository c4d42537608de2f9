"""I1: a dense net (12-256-256-3) over rows in Parquet, predictions to Parquet.

The limit is ``session.run`` alone, on arrays that lie in memory, with the best of several batch sizes and ways of using
the cores. Ours reads a landed batch (parts of 100 000 rows, as ingest lands them), proves digests, predicts, accounts
for every row, writes and lands. The neighbours have the same model and the same files: MLflow's pyfunc, the session
called row by row, and Ray Data on this machine.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, Case, Place, Run

PART_ROWS = 100_000
NAMES = [f"f{i}" for i in range(12)]
CLASSES = ["low", "middle", "high"]


def make(place: Place) -> None:
    """Register the model, pin it, land the input batch."""
    import mlflow
    import numpy as np
    import onnx
    import pyarrow as pa
    from mlflow import MlflowClient
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema

    from airflow_ai_provider.core.batch import ACCEPTED, ROW_ID
    from airflow_ai_provider.core.infer.pin import resolve_pin
    from airflow_ai_provider.core.store import Store
    from tests.core.infer.dense import dense_onnx

    logging.disable(logging.WARNING)
    uri = f"sqlite:///{place.folder}/mlflow.db"
    os.chdir(place.folder)
    mlflow.set_tracking_uri(uri)
    mlflow.set_experiment("bench")
    mlflow.onnx.log_model(
        onnx.load_from_string(dense_onnx([12, 256, 256, 3])),
        name="model",
        registered_model_name="dense",
        signature=ModelSignature(Schema([ColSpec("float", name) for name in NAMES])),
        metadata={"classes": CLASSES},
        pip_requirements=[],
    )
    MlflowClient(uri).set_registered_model_alias("dense", "champion", "1")
    pin = resolve_pin("dense@champion", uri, place.folder / "cache")
    (place.folder / "pin.json").write_text(json.dumps(pin.to_dict()), encoding="utf-8")
    random = np.random.default_rng(0)
    writer = Store(str(place.folder / "store")).open_batch("bench", "batch", "rows")
    for start in range(0, place.size, PART_ROWS):
        count = min(PART_ROWS, place.size - start)
        ids = [f"rows~0a1b2c3d/{(start + i) % 4}/{(start + i) // 4}" for i in range(count)]
        columns = {name: random.standard_normal(count, np.float32) for name in NAMES}
        writer.write(ACCEPTED, pa.table({ROW_ID: ids, **columns}))
    ref = writer.land({"read": place.size, "accepted": place.size, "quarantined": 0}, {})
    (place.folder / "batch.json").write_text(json.dumps(ref.to_dict()), encoding="utf-8")


def parts(place: Place) -> list[Path]:
    """Return the input's files, in order."""
    return sorted((place.folder / "store/bench/batch/rows/accepted").glob("*.parquet"))


def output(place: Place, who: str) -> Path:
    """Return a new folder for a contender's files; those of its run before are removed."""
    folder = place.folder / "out" / who
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def model_path(place: Place) -> Path:
    """Return the model file in the cache that pinning filled."""
    return next((place.folder / "cache").glob("*/model.onnx"))


# --- contenders ---


def open_limit(place: Place) -> Run:
    """session.run on arrays in memory, the best of batch sizes, threads and sessions."""
    import numpy as np
    import onnxruntime as ort
    import pyarrow.parquet as pq

    tables = [pq.read_table(path, columns=NAMES) for path in parts(place)]
    rows = np.concatenate([np.column_stack([table[name].to_numpy() for name in NAMES]) for table in tables])
    del tables
    cores = len(os.sched_getaffinity(0))

    def session(threads: int) -> Any:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        return ort.InferenceSession(str(model_path(place)), options, providers=["CPUExecutionProvider"])

    out = np.empty((len(rows), 3), np.float32)

    def run_stretch(one: Any, first: int, end: int, batch: int) -> None:
        for start in range(first, end, batch):
            stop = min(end, start + batch)
            out[start:stop] = one.run(None, {"X": rows[start:stop]})[0]

    shared, single = session(cores), session(1)
    pool = ThreadPoolExecutor(cores)

    def together(batch: int, end: int) -> None:
        run_stretch(shared, 0, end, batch)

    def abreast(batch: int, end: int) -> None:
        step = -(-end // cores)
        list(pool.map(lambda first: run_stretch(single, first, min(end, first + step), batch), range(0, end, step)))

    ways: list[tuple[Callable[[int, int], None], int]] = [
        (way, batch) for way in (together, abreast) for batch in (256, 512, 1024, 2048, 4096, 16384)
    ]
    few = min(len(rows), max(50_000, len(rows) // 10))

    def seconds(entry: tuple[Callable[[int, int], None], int]) -> float:
        way, batch = entry
        spent = []
        for _ in range(3):
            started = time.perf_counter()
            way(batch, few)
            spent.append(time.perf_counter() - started)
        return min(spent)

    way, batch = min(ways, key=seconds)
    way(batch, len(rows))
    np.save(output(place, "limit") / "probabilities.npy", out)

    def run() -> None:
        way(batch, len(rows))

    return run


def open_ours(place: Place) -> Run:
    """The verb itself: a landed batch in, landed predictions out."""
    from airflow_ai_provider.core.batch import BatchRef, Pin
    from airflow_ai_provider.core.infer.cache import fetch
    from airflow_ai_provider.core.infer.engine import open_engine
    from airflow_ai_provider.core.infer.flow import infer
    from airflow_ai_provider.core.store import Store

    pin = Pin.from_dict(json.loads((place.folder / "pin.json").read_text(encoding="utf-8")))
    batch = BatchRef.from_dict(json.loads((place.folder / "batch.json").read_text(encoding="utf-8")))
    store = Store(str(place.folder / "store"))
    engine = open_engine(pin, fetch(pin, place.folder / "cache"), "cpu")

    def run() -> float:
        shutil.rmtree(place.folder / "store/ours", ignore_errors=True)
        started = time.perf_counter()
        infer(batch, pin, store, engine, pipeline="ours")
        return time.perf_counter() - started

    return run


def _pyfunc(place: Place) -> Any:
    import mlflow

    logging.disable(logging.WARNING)
    mlflow.set_tracking_uri(f"sqlite:///{place.folder}/mlflow.db")
    return mlflow.pyfunc.load_model("models:/dense@champion")


def _predictions(frame: Any, answer: Any) -> Any:
    """Build what ours writes from what pyfunc returns: the quickest way for pandas, a column per class."""
    import numpy as np
    import pandas as pd

    # From a frame pyfunc returns the scores of all rows in one flat column.
    scores = np.asarray(answer["probabilities"]).reshape(len(frame), -1)
    chosen = scores.argmax(axis=1)
    return pd.DataFrame(
        {
            "_row_id": frame["_row_id"],
            "prediction": np.asarray(CLASSES, object)[chosen],
            "score": scores.max(axis=1).astype(float),
            **{name: scores[:, position] for position, name in enumerate(CLASSES)},
        }
    )


def open_whole(place: Place) -> Run:
    """pyfunc over one frame of everything."""
    import pandas as pd

    model = _pyfunc(place)

    def run() -> float:
        folder = output(place, "whole")
        started = time.perf_counter()
        frame = pd.concat([pd.read_parquet(path) for path in parts(place)], ignore_index=True)
        _predictions(frame, model.predict(frame[NAMES])).to_parquet(folder / "0.parquet")
        return time.perf_counter() - started

    return run


def open_chunks(place: Place) -> Run:
    """pyfunc over chunks of 10 000 rows, file by file."""
    import pandas as pd

    model = _pyfunc(place)

    def run() -> float:
        folder = output(place, "chunks")
        started = time.perf_counter()
        for number, path in enumerate(parts(place)):
            frame = pd.read_parquet(path)
            pieces = [frame.iloc[start : start + 10_000] for start in range(0, len(frame), 10_000)]
            done = [_predictions(piece, model.predict(piece[NAMES])) for piece in pieces]
            pd.concat(done, ignore_index=True).to_parquet(folder / f"{number:05d}.parquet")
        return time.perf_counter() - started

    return run


def open_row_by_row(place: Place) -> Run:
    """The session called with one row after the other: one row in a hundred, and the time a hundred times."""
    import numpy as np
    import onnxruntime as ort
    import pandas as pd

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(model_path(place)), options, providers=["CPUExecutionProvider"])

    def run() -> float:
        folder = output(place, "rows")
        started = time.perf_counter()
        for number, path in enumerate(parts(place)):
            frame = pd.read_parquet(path).iloc[::100]
            values = frame[NAMES].to_numpy(np.float32)
            scores = [session.run(None, {"X": values[i : i + 1]})[0] for i in range(len(values))]
            answer = {"probabilities": np.concatenate(scores)}
            _predictions(frame, answer).to_parquet(folder / f"{number:05d}.parquet")
        return (time.perf_counter() - started) * 100

    return run


class _OnRay:
    """What people write for Ray Data's ``map_batches``: a session per actor."""

    def __init__(self, path: str) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
        import numpy as np

        scores = self._session.run(None, {"X": np.column_stack([rows[name] for name in NAMES]).astype(np.float32)})[0]
        named = {name: scores[:, position] for position, name in enumerate(CLASSES)}
        chosen = np.asarray(CLASSES)[scores.argmax(axis=1)]
        return {"_row_id": rows["_row_id"], "prediction": chosen, "score": scores.max(axis=1).astype(float), **named}


def open_ray_data(place: Place) -> Run:
    """Ray Data on this machine: read, map in batches of 4 096 on an actor per core, write.

    Ray is started and ended around the measured time, so that it does not stand beside the other contenders. Its
    workers are no children of this process: their memory and processor time are not in the table.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    logging.disable(logging.WARNING)
    cores = len(os.sched_getaffinity(0))

    def run() -> float:
        folder = output(place, "ray")
        ray.init(
            address="local",
            num_cpus=cores,
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
            object_store_memory=1 << 30,
            log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
        )
        try:
            ray.data.DataContext.get_current().enable_progress_bars = False
            started = time.perf_counter()
            rows = ray.data.read_parquet([str(path) for path in parts(place)])
            predicted = rows.map_batches(
                _OnRay,
                fn_constructor_args=[str(model_path(place))],
                batch_size=4096,
                compute=ray.data.ActorPoolStrategy(size=cores),
                num_cpus=0.5,  # else the actors hold every core, and nobody reads
            )
            predicted.write_parquet(str(folder))
            return time.perf_counter() - started
        finally:
            ray.shutdown()

    return run


def check(place: Place) -> None:
    """Hold every contender's first output against the limit's probabilities, row by row."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    expected = np.load(place.folder / "out/limit/probabilities.npy")
    ids = pa.concat_tables([pq.read_table(path, columns=["_row_id"]) for path in parts(place)])["_row_id"].to_pylist()
    assert len(expected) == place.size == len(set(ids))
    place_of = {row: position for position, row in enumerate(ids)}
    sampled = [
        row for path in parts(place) for row in pq.read_table(path, columns=["_row_id"])["_row_id"].to_pylist()[::100]
    ]
    ours = (place.folder / "store/ours/predictions").glob("*/predictions/*.parquet")
    others = {who: (place.folder / "out" / who).glob("*.parquet") for who in ("whole", "chunks", "rows", "ray")}
    for who, files in {"ours": ours, **others}.items():
        found = pa.concat_tables([pq.read_table(path) for path in sorted(files)])
        rows = found["_row_id"].to_pylist()
        if who == "ray":  # which keeps no order
            assert sorted(rows) == sorted(ids), f"{who}: other rows"
        else:
            assert rows == (sampled if who == "rows" else ids), f"{who}: other rows, or another order"
        wanted = expected[[place_of[row] for row in rows]]
        if who == "ours":
            scores = np.asarray(found["probabilities"].combine_chunks().flatten()).reshape(-1, 3)
        else:
            scores = np.column_stack([found[name].to_numpy() for name in CLASSES])
        assert np.allclose(scores, wanted, atol=1e-6), f"{who}: other probabilities"
        chosen = [CLASSES[i] for i in wanted.argmax(axis=1)]
        assert found["prediction"].to_pylist() == chosen, f"{who}: other predictions"


CASE = Case(
    title="dense net 12-256-256-3 in ONNX, Parquet to predictions in Parquet",
    unit="rows/s",
    sizes=(1_000_000, 200_000),
    size_unit="rows",
    goal="≥ 0.78 of the limit, ≤ 500 MB, flat in rows",
    make=make,
    check=check,
    contenders={
        "limit": open_limit,
        "ours": open_ours,
        "pyfunc, whole frame": open_whole,
        "pyfunc, chunks of 10 000": open_chunks,
        "row by row (1 in 100, times 100)": open_row_by_row,
        "Ray Data (its workers' memory and processor not counted)": open_ray_data,
    },
    packages=("onnxruntime", "pyarrow", "numpy", "mlflow", "pandas", "ray"),
)
