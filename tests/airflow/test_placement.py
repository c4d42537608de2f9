"""GPUs, pools and queues of a task, as each executor reads them; shards as mapped tasks of a real DAG run."""

from __future__ import annotations

import json
from typing import Any

import pytest
from airflow.sdk import DAG
from airflow.serialization.serialized_objects import DagSerialization

import airflow_ai_provider as face
from airflow_ai_provider.errors import SpecError


def test_only_what_is_asked_for_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW__CORE__EXECUTOR", "CeleryExecutor")
    assert face.placement() == {}
    assert face.placement(1) == {}, "no pod without a Kubernetes executor"
    assert face.placement(1, pool="ai_gpu", queue="gpu") == {"pool": "ai_gpu", "queue": "gpu"}
    assert face.placement(4, pool="ai_gpu") == {"pool": "ai_gpu", "pool_slots": 4}


@pytest.mark.parametrize("gpu", [-1, True, "1", 0.5])
def test_what_is_no_number_of_gpus(gpu: Any) -> None:
    with pytest.raises(SpecError, match="not a number of GPUs"):
        face.placement(gpu)


@pytest.mark.parametrize("executor", ["KubernetesExecutor", "LocalExecutor,team:KubernetesExecutor"])
def test_a_pod_asks_for_its_gpus_and_survives_the_scheduler(monkeypatch: pytest.MonkeyPatch, executor: str) -> None:
    monkeypatch.setenv("AIRFLOW__CORE__EXECUTOR", executor)
    with DAG("d", schedule=None) as dag:
        face.BatchInferenceOperator(task_id="infer", batch={}, model={}, **face.placement(2, pool="ai_gpu"))
    data = DagSerialization.to_dict(dag)
    task = DagSerialization.from_dict(json.loads(json.dumps(data))).get_task("infer")
    (container,) = task.executor_config["pod_override"].spec.containers
    assert (container.name, container.resources.limits) == ("base", {"nvidia.com/gpu": "2"})
    assert (task.pool, task.pool_slots) == ("ai_gpu", 2)
