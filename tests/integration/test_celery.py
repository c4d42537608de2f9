"""Shards over Airflow's CeleryExecutor: on the workers of the queue that placement() names, one of which is killed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any

import pytest

from airflow_ai_provider.core.batch import PREDICTIONS, ROW_ID, BatchRef
from demo.services import stop_all
from tests.core.infer.dense import register_dense
from tests.integration.installation import AIRFLOW, Installation
from tests.servers.mlflow import MlflowServer
from tests.servers.process import ServerProcess

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

RUN = "by-hand"
PARTS, ROWS = 5, 400_100
"""A part has 100,000 rows; three shards have two, two and one of them."""
_DAGS = """
import os
from unittest.mock import patch

from airflow.sdk import DAG
from airflow_ai_provider import (
    BatchInferenceOperator, FileSource, GatherPredictionsOperator, PinModelOperator, ValidatedIngestOperator,
    load_pipelines, placement, shards,
)

def before():
    return (
        ValidatedIngestOperator(task_id="ingest", source=FileSource("FOLDER/rows.jsonl", key="id")).output,
        PinModelOperator(task_id="pin", model="wide/1").output,
    )

with DAG("whole", schedule=None):
    batch, pin = before()
    BatchInferenceOperator(task_id="infer", batch=batch, model=pin, device="cpu")

# what placement adds for pods, where the second executor has some, must not hinder the first
with patch.dict(os.environ, AIRFLOW__CORE__EXECUTOR="CeleryExecutor,KubernetesExecutor"):
    place = placement(gpu=1, pool="ai_gpu", queue="gpu")
assert "pod_override" in place["executor_config"]

with DAG("killed", schedule=None):
    batch, pin = before()
    scored = BatchInferenceOperator.partial(
        task_id="infer_shard", batch=batch, model=pin, device="cpu", **place
    ).expand(shard=shards(3))
    GatherPredictionsOperator(task_id="infer", batch=batch, model=pin, shards=scored.output)

globals().update(load_pipelines("FOLDER/project/pipelines"))
"""
_SHARDED = """
schedule: null
ingest: {files: FOLDER/rows.jsonl, key: id}
infer: {model: wide/1, device: cpu, shards: 3, pool: ai_gpu, queue: gpu}
decide: {act: 0.9, review: 0.9, otherwise: hold}
"""


class Celery(Installation):
    """An Airflow whose tasks go through Celery; its broker, as all else that it keeps, is a database of PostgreSQL."""

    def __init__(self, folder: Path, fresh_url: Callable[[], str], registry: str) -> None:
        url, queues = fresh_url(), fresh_url()
        options = {
            "CORE__EXECUTOR": "CeleryExecutor",
            "CORE__DEFAULT_TASK_RETRIES": 3,
            "CORE__DEFAULT_TASK_RETRY_DELAY": 0,
            "DATABASE__SQL_ALCHEMY_CONN": url,
            "DATABASE__SQL_ALCHEMY_CONN_ASYNC": url,  # psycopg does both; Airflow would take asyncpg
            "CELERY__BROKER_URL": f"sqla+{queues}",
            "CELERY__RESULT_BACKEND": f"db+{queues}",
            "CELERY__WORKER_ENABLE_REMOTE_CONTROL": False,  # this broker knows no broadcasts
            # a dead worker's tasks are found soon; a live one that is this slow is tried again, for the same bytes
            "SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": 10,
            "SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": 1,
        }
        extras = {"mlflow": {"tracking_uri": registry}}
        super().__init__(folder, _DAGS.replace("FOLDER", str(folder)), extras, ledger=fresh_url(), options=options)
        (self.folder / "workers").mkdir()
        (self.project / "pipelines").mkdir()
        (self.project / "pipelines" / "sharded.yaml").write_text(_SHARDED.replace("FOLDER", str(folder)))
        self.workers: dict[str, ServerProcess] = {}

    def start_workers(self) -> None:
        """One after the other: the first makes the tables of broker and results."""
        for name in ("default", "gpu"):
            self.start_worker(name, name)

    def start_worker(self, name: str, queue: str) -> None:
        """Start a worker of one queue, which shares nothing with others but the store: its models are its own."""
        self.workers[name] = worker = ServerProcess(
            [
                *(AIRFLOW, "celery", "worker", "--queues", queue, "--concurrency", "2", "--celery-hostname", name),
                *("--skip-serve-logs", "--without-mingle", "--without-gossip", "--pid", str(self.folder / name)),
            ],
            log=self.folder / "workers" / f"{name}.log",
            ready=lambda log: f"{name} ready" in log,
            env=self.env | {"AIRFLOW__AI_PROVIDER__MODEL_CACHE_FOLDER": str(self.folder / "models" / name)},
        )
        worker.start()

    def wait(self, ready: Callable[[], bool]) -> None:
        """Wait until it is so, as long as all parts and workers live."""

        def is_ready() -> bool:
            dead = [worker.log_tail() for worker in self.workers.values() if not worker.running]
            assert not dead, f"a worker ended by itself; its log ends:\n{dead[0]}"
            return ready()

        self.services.wait("airflow-scheduler", lambda _: is_ready(), 300)

    def finish(self, dag: str) -> list[dict[str, Any]]:
        """Wait until the run is over: its tasks."""
        self.wait(lambda: self.is_through(dag, RUN))
        return self.airflow.tasks(dag, RUN)

    def given_to(self, task: Mapping[str, Any]) -> list[str]:
        """The workers, dead ones too, whose logs say that they were given this try of a task."""
        return [log.stem for log in (self.folder / "workers").glob("*.log") if task["id"] in log.read_text()]

    def predictions(self, dag: str) -> dict[str, bytes]:
        """The files of a DAG's one prediction batch."""
        folder = Path(self.reference(dag, "infer").uri.removeprefix("file://"))
        return {path.name: path.read_bytes() for path in sorted(folder.rglob("*.parquet"))}

    def reference(self, dag: str, task_id: str) -> BatchRef:
        return BatchRef.from_dict(self.airflow.xcom(dag, RUN, task_id))

    def done_parts(self, dag: str) -> dict[Path, int]:
        """Each part of a DAG's predictions that is marked done: when it was written."""
        marks = (self.folder / "store" / dag).rglob("*.parquet.done")
        return {part: part.stat().st_mtime_ns for part in (mark.with_suffix("") for mark in marks)}


@pytest.fixture(scope="module")
def celery(
    fresh_postgres_url: Callable[[], str], mlflow_process: MlflowServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Celery]:
    """All of it, with a run of the DAG that predicts in one task."""
    folder = tmp_path_factory.mktemp("celery")
    made = Celery(folder, fresh_postgres_url, mlflow_process.uri)
    try:
        _write_rows(folder / "rows.jsonl")
        register_dense(mlflow_process.uri, "wide", ["x", "y"], hidden=[512, 512])
        made.start(["whole", "sharded", "killed"], ["scheduler", "dag-processor"], made.start_workers)
        made.airflow.add_pool("ai_gpu", 2)
        made.airflow.trigger("whole", RUN)
        yield made
    finally:
        for worker in made.workers.values():
            worker.kill()
        stop_all(folder)


def test_shards_run_on_the_workers_of_their_queue_and_predict_what_one_task_does(celery: Celery) -> None:
    celery.airflow.trigger("sharded", RUN)
    tasks = celery.finish("whole") + celery.finish("sharded")
    assert Counter((task["task_id"], task["queue"]) for task in tasks) == {
        ("ingest", "default"): 2,
        ("pin", "default"): 2,
        ("infer", "default"): 2,
        ("infer_shard", "gpu"): 3,
        ("decide", "default"): 1,
    }
    assert [task for task in tasks if celery.given_to(task) != [task["queue"]]] == []
    parts = celery.predictions("sharded")
    assert len(parts) == PARTS
    assert parts == celery.predictions("whole")
    assert celery.reference("sharded", "ingest").counts == {"read": ROWS, "accepted": ROWS - 1, "quarantined": 1}
    assert celery.reference("sharded", "infer").counts == {"accepted": ROWS - 1, "predicted": ROWS - 2, "failed": 1}
    ids = [
        row
        for table in celery.store.read(celery.reference("sharded", "infer"), PREDICTIONS)
        for row in table[ROW_ID].to_pylist()
    ]
    assert len(set(ids)) == len(ids) == ROWS - 1


def test_a_killed_worker_costs_a_try_and_no_byte(celery: Celery) -> None:
    def is_caught() -> bool:
        """Once a part is stored, freeze the worker; true when a shard runs on it, which then dies with it."""
        assert not celery.is_through("killed", RUN), "nothing was left to kill"
        if not celery.done_parts("killed"):
            return False
        worker.pause()
        caught.update(task["map_index"] for task in shards() if task["state"] == "running")
        if not caught:
            worker.resume()
        return len(caught) > 0

    def shards() -> list[dict[str, Any]]:
        return [task for task in celery.airflow.tasks("killed", RUN) if task["task_id"] == "infer_shard"]

    caught: set[int] = set()
    worker = celery.workers["gpu"]
    celery.finish("whole")
    celery.airflow.trigger("killed", RUN)
    celery.wait(is_caught)
    celery.workers.pop("gpu").kill()
    done = celery.done_parts("killed")
    celery.start_worker("gpu-2", "gpu")
    celery.finish("killed")
    again = [task for task in shards() if task["map_index"] in caught]
    assert all(task["try_number"] > 1 and celery.given_to(task) == ["gpu-2"] for task in again), again
    assert {task["queue"] for task in shards()} == {"gpu"}
    assert done.items() <= celery.done_parts("killed").items(), "what was done is not done again"
    assert celery.predictions("killed") == celery.predictions("whole")


def _write_rows(file: Path) -> None:
    """Rows of two numbers; one is no JSON, one lacks a number that the model needs."""
    random = Random(1)
    with file.open("w") as sink:
        for n in range(ROWS):
            sink.write(
                json.dumps({"id": n, "x": random.random(), "y": None if n == 8 else n}) + "\n" if n != 7 else "{\n"
            )
