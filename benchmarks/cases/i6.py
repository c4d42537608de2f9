"""I6: cold start, from the start of a process to its first prediction.

The limit hashes the model's file and its weights, imports ONNX Runtime, opens them and predicts one row. Ours opens the
pinned model from the cache, every file proved, and predicts one row of a table. The neighbour imports mlflow and loads
the model from its local files (no download, no registry), which is the least that its users pay.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

from benchmarks.cases import i1
from benchmarks.harness import Case, Place, Run

LIMIT = """
import hashlib, pathlib, sys, time
for path in sys.argv[1:]:
    hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()
import numpy as np
import onnxruntime as ort
session = ort.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
answer = session.run(None, {"X": np.ones((1, 12), np.float32)})[0]
print(time.monotonic_ns(), float(answer[0, 0]))
"""
OURS = """
import json, sys, time
from airflow_ai_provider.core.batch import Pin
from airflow_ai_provider.core.infer.cache import fetch
from airflow_ai_provider.core.infer.engine import open_engine
pin = Pin.from_dict(json.loads(sys.argv[1]))
engine = open_engine(pin, fetch(pin, sys.argv[2]), "cpu")
import pyarrow as pa
names = json.loads(sys.argv[3])
one = pa.Array.from_buffers(pa.float32(), 1, [None, pa.py_buffer(b"\\x00\\x00\\x80\\x3f")])
ends = pa.py_buffer(b"\\x00\\x00\\x00\\x00\\x01\\x00\\x00\\x00")
ids = pa.Array.from_buffers(pa.string(), 1, [None, ends, pa.py_buffer(b"r")])
rows = pa.Table.from_arrays([ids, *[one] * len(names)], names=["_row_id", *names])
answer = engine.predict(rows, engine.batch_size)
print(time.monotonic_ns(), answer["probabilities"][0][0].as_py())
"""
PEER = """
import json, sys, time
import mlflow
model = mlflow.pyfunc.load_model(sys.argv[1])
import pandas as pd
import numpy as np
answer = model.predict(pd.DataFrame(np.ones((1, 12), np.float32), columns=json.loads(sys.argv[2])))
print(time.monotonic_ns(), float(np.asarray(answer["probabilities"]).reshape(-1)[0]))
"""


def make(place: Place) -> None:
    """The model of I1, pinned, and one row."""
    i1.make(Place(place.folder, 1))


def _opened(place: Place, who: str, script: str, *arguments: str) -> Run:
    """Return a run that starts a process and takes the time until its first prediction."""
    command = [sys.executable, "-c", script, *arguments]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }

    def run() -> float:
        started = time.monotonic_ns()
        ran = subprocess.run(command, env=env, capture_output=True, text=True, check=False, cwd=place.folder)
        assert ran.returncode == 0, ran.stderr
        first, answer = ran.stdout.split()[-2:]
        (place.folder / f"{who}.txt").write_text(answer, encoding="utf-8")
        return (int(first) - started) / 1e9

    for _ in range(2):  # byte-compiled files and the page cache are warm on a worker, too
        run()
    return run


def open_limit(place: Place) -> Run:
    """Import onnxruntime, open the verified file, predict."""
    model = i1.model_path(place)
    return _opened(place, "limit", LIMIT, str(model), *map(str, model.parent.glob("*.data")))


def open_ours(place: Place) -> Run:
    """Fetch from a warm cache, open the engine, predict."""
    pin = (place.folder / "pin.json").read_text(encoding="utf-8")
    return _opened(place, "ours", OURS, pin, str(place.folder / "cache"), json.dumps(i1.NAMES))


def open_peer(place: Place) -> Run:
    """Import mlflow, load the same files, predict."""
    return _opened(place, "peer", PEER, str(i1.model_path(place).parent), json.dumps(i1.NAMES))


def check(place: Place) -> None:
    """All say the same about the same row."""
    said = [float((place.folder / f"{who}.txt").read_text(encoding="utf-8")) for who in ("limit", "ours", "peer")]
    assert max(said) - min(said) < 1e-6, said
    assert 0 < said[0] < 1


CASE = Case(
    title="cold start of a pinned model, process start to first prediction",
    unit="s",
    sizes=(1, 1),
    size_unit="row",
    goal="≤ 1.3 of the limit, ≥ 8 times faster than through mlflow",
    make=make,
    check=check,
    contenders={"limit": open_limit, "ours": open_ours, "mlflow.pyfunc.load_model": open_peer},
    packages=("onnxruntime", "pyarrow", "numpy", "mlflow"),
)
