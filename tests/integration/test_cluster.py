"""A batch predicted by real Ray and real Spark: the bytes of one process, the pin proved there, deaths survived."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest

from airflow_ai_provider.core.batch import BatchRef, Pin
from airflow_ai_provider.core.infer import cache
from airflow_ai_provider.core.infer.cluster import Job, infer_on_cluster
from airflow_ai_provider.core.infer.engine import open_engine
from airflow_ai_provider.core.infer.flow import infer
from airflow_ai_provider.core.infer.runner import Runner
from airflow_ai_provider.core.infer.worker import Worker
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.errors import EngineUnavailableError, ModelPinError, SpecError
from airflow_ai_provider.operators.infer import BatchInferenceOperator
from airflow_ai_provider.testing import ArithmeticEngine
from tests.core.infer import models
from tests.core.infer.batches import PIN, land, part_files, rows
from tests.integration.fragile import FragileWorker

pytestmark = [pytest.mark.slow, pytest.mark.integration]
PART_ROWS = 150
RUN = {
    "dag_run": SimpleNamespace(run_id="r1", run_type="manual"),
    "ti": SimpleNamespace(dag_id="p", task_id="infer", map_index=-1),
}


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[str]:
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
            object_store_memory=100 << 20,
            log_to_driver=False,
        )
        yield "ray"
        ray.shutdown()


@pytest.fixture(scope="module")
def spark_session() -> Iterator[str]:
    from pyspark.sql import SparkSession

    with (
        pytest.MonkeyPatch.context() as patch
    ):  # left behind, it would lead other servers' Pythons to this one's library
        patch.setenv("PYSPARK_PYTHON", sys.executable)
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        builder = SparkSession.builder.master("local[2,3]").config("spark.driver.host", "127.0.0.1")
        spark = builder.config("spark.ui.enabled", "false").getOrCreate()
        spark.sparkContext.setLogLevel("OFF")
        yield "spark"
        spark.stop()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def four_parts(store: Store) -> BatchRef:
    return land(store, [rows(PART_ROWS, start=PART_ROWS * number) for number in range(4)])


def the_same_bytes(name: str, store: Store, tmp_path: Path) -> None:
    """A real model, proved and loaded by the cluster's own processes, against one process here."""
    pin, folder = models.cancer_onnx()
    with cache.aside(tmp_path / "models") as fresh:
        shutil.copytree(folder, fresh, dirs_exist_ok=True)
        cache.place(fresh, cache.folder_of(pin.digest, tmp_path / "models"), pin.files)
    table = models.cancer_rows()
    cut = [table.slice(start, 100) for start in range(0, table.num_rows, 100)]
    batch, told = land(store, cut), list[str]()
    job = Job(batch, pin, store, "p", "cpu", Runner(engine=name), Worker(str(tmp_path / "models")))
    ref = infer_on_cluster(job, progress=told.append)
    assert len(told) == len(cut) and f"{len(cut)} of {len(cut)}" in told[-1]
    found = part_files(store, ref)
    shutil.rmtree(Path(ref.uri))
    with open_engine(pin, folder, "cpu") as engine:
        assert infer(batch, pin, store, engine, pipeline="p") == ref
    assert part_files(store, ref) == found


def as_a_task(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator on the cluster and on this worker; files, store and registry by Airflow's configuration."""
    table, (pin, _) = models.cancer_rows(), models.cancer_onnx()
    batch = land(Store(f"file://{tmp_path}/task"), [table.slice(0, 100), table.slice(100)]).to_dict()
    store = {"conn_type": "ai_store", "extra": {"uri": f"file://{tmp_path}/task"}}
    registry = {"conn_type": "mlflow", "extra": {"tracking_uri": "sqlite:////nowhere/at/all.db"}}
    monkeypatch.setenv("AIRFLOW_CONN_DISK", json.dumps(store))
    monkeypatch.setenv("AIRFLOW_CONN_MLFLOW_DEFAULT", json.dumps(registry))
    monkeypatch.setenv("AIRFLOW__AI_PROVIDER__MODEL_CACHE_FOLDER", str(tmp_path / "models"))
    made = [
        BatchInferenceOperator(
            task_id="infer", batch=batch, model=pin.to_dict(), device="cpu", runner=runner, store_conn_id="disk"
        )
        for runner in ({"engine": name, "workers": "1"}, Runner())
    ]
    there, here = (task.execute(RUN) for task in made)
    assert there == here
    made[0].shard = "1/2"
    with pytest.raises(SpecError, match="both share the batch out"):
        made[0].execute(RUN)


def a_changed_model_is_refused_there(name: str, store: Store, tmp_path: Path) -> None:
    files = {"model.onnx": "sha256:" + "2" * 64}
    forged = Pin("sum", "1", "", "sha256:" + "3" * 64, files, "onnx", {"inputs": [], "outputs": []})
    job = Job(four_parts(store), forged, store, "p", "cpu", Runner(engine=name), Worker(str(tmp_path / "empty")))
    with pytest.raises(ModelPinError, match=r"part \d \(shard \d/4\) on .*changed on its way"):
        infer_on_cluster(job)


def deaths(name: str, store: Store, tmp_path: Path) -> None:
    """A process that dies is replaced; one that dies again and again is named, nothing is landed, a retry goes on."""
    batch, graves = four_parts(store), tmp_path / "graves"
    graves.mkdir()
    worker = FragileWorker("", victim=f"orders/0/{2 * PART_ROWS + 7}", deaths=100, graves=str(graves))
    job = Job(batch, PIN, store, "p", "cpu", Runner(engine=name), worker)
    with pytest.raises(EngineUnavailableError, match=r"part 2"):
        infer_on_cluster(job)
    assert len(list(graves.iterdir())) == 3
    assert not list(Path(store.root).glob("p/predictions/*/manifest.json"))
    once = replace(job, worker=replace(worker, deaths=4))
    ref = infer_on_cluster(once)
    assert len(list(graves.iterdir())) == 4
    assert ref.counts == {"accepted": 4 * PART_ROWS, "predicted": 4 * PART_ROWS, "failed": 0}
    assert infer(batch, PIN, store, ArithmeticEngine(["x", "y"]), pipeline="p") == ref
    assert infer_on_cluster(replace(once, runner=Runner(engine=name, workers=1))) == ref


def test_ray(ray_cluster: str, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    the_same_bytes(ray_cluster, store, tmp_path)
    as_a_task(ray_cluster, tmp_path, monkeypatch)
    a_changed_model_is_refused_there(ray_cluster, Store(str(tmp_path / "second")), tmp_path)
    deaths(ray_cluster, Store(str(tmp_path / "third")), tmp_path)


def test_spark(spark_session: str, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    the_same_bytes(spark_session, store, tmp_path)
    as_a_task(spark_session, tmp_path, monkeypatch)
    a_changed_model_is_refused_there(spark_session, Store(str(tmp_path / "second")), tmp_path)
    deaths(spark_session, Store(str(tmp_path / "third")), tmp_path)


def test_a_job_can_be_sent_and_its_store_opened_there(store: Store) -> None:
    import pickle

    batch = four_parts(store)
    job = Job(batch, PIN, store, "p", "cpu", Runner(engine="ray"), FragileWorker("", graves=store.root))
    sent: Job = pickle.loads(pickle.dumps(job))
    answers = [sent.predict(f"{k}/2") for k in (1, 2)]
    assert [answer["report"]["failed"] for answer in answers] == [0, 0]
    assert isinstance(sent.store.read_part(batch, store.manifest(batch).parts[0]), pa.Table)
