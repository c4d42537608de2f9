"""Clusters that are not there, without starting one."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from airflow_ai_provider.core.infer.cluster import Job, demand_answer, infer_on_cluster, parts_of
from airflow_ai_provider.core.infer.runner import Runner
from airflow_ai_provider.core.infer.worker import Worker
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.errors import EngineUnavailableError
from tests.core.infer.batches import PIN, land, rows


@pytest.mark.parametrize(
    ("engine", "address"),
    [
        ("ray", "ray://127.0.0.1:1"),
        ("ray", "127.0.0.1:1"),
        ("spark", "spark://127.0.0.1:1,127.0.0.1:2"),
        ("spark", "sc://127.0.0.1:1/;use_ssl=true"),
    ],
)
def test_a_cluster_that_is_not_there_is_noticed_at_once(engine: str, address: str, tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    runner = Runner(engine=engine, cluster=address)
    job = Job(land(store, [rows(3)]), PIN, store, "p", "cpu", runner, Worker(str(tmp_path / "models")))
    with pytest.raises(EngineUnavailableError, match="nobody answers at"):
        infer_on_cluster(job)


@pytest.mark.parametrize("address", [None, "auto", "local", "local[2]", "yarn", "k8s://https://10.0.0.1:443"])
def test_what_is_no_place_is_left_to_the_client(address: str | None) -> None:
    demand_answer(address)


def test_one_master_that_answers_is_enough() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        demand_answer(f"spark://127.0.0.1:1,127.0.0.1:{server.getsockname()[1]}")


def test_a_shard_names_its_parts() -> None:
    assert parts_of("2/3", 5) == "parts 1, 4"
    assert parts_of("1/1", 1) == "part 0"
    assert parts_of("1/2", 100) == "parts 0, 2, 4, 6, 8, 10, 12, 14, 16, 18 …"
