"""The example DAG files parse without errors, cheaply, and without any heavy library."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

DAGS = Path(__file__).resolve().parents[2] / "dags"
GIANTS = {
    *("aiohttp", "confluent_kafka", "great_expectations", "mlflow", "numpy", "onnxruntime", "pandas", "polars"),
    *("pyarrow", "sklearn", "torch"),
}
# A plain DAG with as many tasks, one of them with the operator that a review builds on: what parsing costs anyway.
_PLAIN = """
from airflow.providers.standard.operators.hitl import ApprovalOperator
from airflow.providers.standard.operators.python import PythonOperator
from airflow.sdk import DAG
for name in ("one", "two", "three"):
    with DAG(name, schedule="@hourly") as dag:
        ApprovalOperator(task_id="approve", subject="?")
        for number in range(7):
            PythonOperator(task_id=f"t{number}", python_callable=print)
"""
_PARSE = """
import json, runpy, sys, time
from airflow.sdk import DAG
runpy.run_path(sys.argv[1])
before, began = set(sys.modules), time.process_time()
found = [v for path in sys.argv[2:] for v in runpy.run_path(path).values() if isinstance(v, DAG)]
took = time.process_time() - began
loaded = {m.partition(".")[0] for m in set(sys.modules) - before}
tasks = {d.dag_id: sorted(t.task_id for t in d.tasks) for d in found}
tags = {d.dag_id: sorted(d.tags) for d in found}
print(json.dumps({"dags": tasks, "tags": tags, "seconds": took, "loaded": sorted(loaded)}))
"""


@pytest.fixture(scope="module")
def parsed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What parsing the example files finds, loads and costs, on top of a plain DAG file."""
    plain = tmp_path_factory.mktemp("plain") / "plain.py"
    plain.write_text(_PLAIN)
    files = [str(path) for path in sorted(DAGS.glob("*.py"))]
    done = subprocess.run(
        [sys.executable, "-c", _PARSE, str(plain), *files], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def test_each_example_is_a_dag_without_faults(parsed: dict[str, Any]) -> None:
    assert set(parsed["dags"]) == {"digit_sorting", "tumour_triage", "tumour_triage_by_hand"}
    assert not [name for name, tags in parsed["tags"].items() if "faulty" in tags]


def test_yaml_and_python_make_the_same_tasks(parsed: dict[str, Any]) -> None:
    assert parsed["dags"]["tumour_triage"] == parsed["dags"]["tumour_triage_by_hand"]


def test_parsing_loads_no_giant(parsed: dict[str, Any]) -> None:
    assert not GIANTS & set(parsed["loaded"])


def test_parsing_costs_little_over_plain_dags(parsed: dict[str, Any]) -> None:
    """Three DAGs with their package, once per process: a fraction of what importing airflow.sdk costs."""
    assert parsed["seconds"] < 1.5
