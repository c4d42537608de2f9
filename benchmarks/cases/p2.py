"""P2: what importing every operator and the factory costs a DAG file, beside ``import airflow.sdk``.

Each run is a process of its own that measures its own imports. The limit imports Airflow's names that any DAG file
uses (DAG, BaseOperator, Param) and the standard provider's HITL operator, which ReviewOperator is.
"""

from __future__ import annotations

import os
import subprocess
import sys

from benchmarks.harness import Case, Place, Run

AIRFLOW = """
from airflow.sdk import DAG, BaseOperator, Param, XComArg, ExceptionRetryPolicy, CronDataIntervalTimetable
from airflow.providers.standard.operators.hitl import HITLOperator
"""
OURS = """
import airflow_ai_provider as face
for name in face.__all__:
    getattr(face, name)
"""
GIANTS = "great_expectations mlflow onnxruntime torch pandas pyarrow numpy confluent_kafka ray aiohttp polars"


def make(place: Place) -> None:
    """Nothing to prepare."""


def _timed(place: Place, who: str, script: str) -> Run:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "AIRFLOW_HOME": str(place.folder)}
    code = f"import sys, time\nstart = time.perf_counter()\n{script}\nprint(time.perf_counter() - start)\n"
    code += f"print(*[g for g in {GIANTS.split()!r} if g in sys.modules])"

    def run() -> float:
        ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr
        seconds, giants = ran.stdout.splitlines()[-2:]
        (place.folder / f"{who}.txt").write_text(giants, encoding="utf-8")
        return float(seconds)

    run()
    return run


def open_limit(place: Place) -> Run:
    """Import Airflow's own names."""
    return _timed(place, "limit", AIRFLOW)


def open_ours(place: Place) -> Run:
    """Import Airflow's own names and all of our public face."""
    return _timed(place, "ours", AIRFLOW + OURS)


def check(place: Place) -> None:
    """Our face loads no giant that Airflow does not load."""
    loaded = [set((place.folder / f"{who}.txt").read_text(encoding="utf-8").split()) for who in ("limit", "ours")]
    assert loaded[1] <= loaded[0], loaded[1] - loaded[0]


CASE = Case(
    title="import of all operators and the factory, beside Airflow's own imports",
    unit="s",
    sizes=(1, 1),
    size_unit="process",
    goal="less than 50 ms more than Airflow alone, no giant loaded",
    make=make,
    check=check,
    contenders={"limit": open_limit, "ours": open_ours},
    packages=("apache-airflow", "pydantic"),
)
