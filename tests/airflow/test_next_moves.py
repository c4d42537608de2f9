"""What a new user gets wrong first, through the operators: each error names the value and the next move, in time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from airflow.sdk import DAG

import airflow_ai_provider as face
from airflow_ai_provider.core.batch import ACCEPTED, BatchRef
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.errors import (
    ActionUnavailableError,
    AiProviderError,
    ConnectionConfigError,
    ModelPinError,
    RegistryUnavailableError,
    SourceError,
    SourceUnavailableError,
    SpecError,
)
from tests.servers.process import free_port

Fails = Callable[..., AiProviderError]


@pytest.fixture
def connections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Store and ledger in a folder of the test's own; define others by id."""

    def define(conn_id: str, **fields: Any) -> None:
        monkeypatch.setenv(f"AIRFLOW_CONN_{conn_id.upper()}", json.dumps(fields))

    define("ai_store_default", conn_type="ai_store", extra={"uri": f"file://{tmp_path}/store"})
    define("ai_ledger_default", conn_type="ai_ledger", extra={"url": f"sqlite:///{tmp_path}/ledger.db"})
    return define


@pytest.fixture
def fails(tmp_path: Path) -> Fails:
    """Run one operator as the only task of a DAG file in the test's folder; return its error."""

    def run(operator: type[Any], expected: type[AiProviderError], **arguments: Any) -> AiProviderError:
        with DAG("first_try", template_searchpath=[str(tmp_path)]):
            task = operator(task_id="task", **arguments)
        ti = SimpleNamespace(dag_id="first_try", task_id="task", map_index=-1, xcom_push=lambda **_: None)
        dag_run = SimpleNamespace(run_id="manual", run_type="manual", data_interval_start=None, data_interval_end=None)
        started = time.monotonic()
        with pytest.raises(expected) as caught:
            task.execute({"ti": ti, "dag_run": dag_run, "params": {}})
        assert time.monotonic() - started < 120
        return caught.value

    return run


def test_a_topic_that_is_not_there(connections: Callable[..., None], fails: Fails, kafka_broker: Any) -> None:
    connections("kafka_default", conn_type="kafka", extra={"bootstrap.servers": kafka_broker.bootstrap})
    error = fails(face.ValidatedIngestOperator, SourceError, source=face.KafkaSource("biopsys"))
    assert "topic biopsys" in str(error)
    assert "Create it, correct its name" in str(error)


def test_a_broker_that_is_down(connections: Callable[..., None], fails: Fails) -> None:
    address = f"127.0.0.1:{free_port()}"
    connections("kafka_default", conn_type="kafka", extra={"bootstrap.servers": address})
    error = fails(face.ValidatedIngestOperator, SourceUnavailableError, source=face.KafkaSource("biopsies"))
    assert address in str(error)
    assert "Check that the broker runs" in str(error)


def test_a_connection_that_is_not_defined(connections: Callable[..., None], fails: Fails, airflow_db: None) -> None:
    error = fails(face.PinModelOperator, ConnectionConfigError, model="triage@champion", mlflow_conn_id="nowhere")
    assert "airflow connections add nowhere --conn-type mlflow" in str(error)


def test_a_suite_that_is_missing(connections: Callable[..., None], fails: Fails, tmp_path: Path) -> None:
    source = face.KafkaSource("biopsies")
    error = fails(face.ValidatedIngestOperator, SpecError, source=source, expectations="biopsys.json")
    assert f"{tmp_path}/include/expectations/biopsys.json" in str(error)
    assert "Put it in one of these places" in str(error)


def test_a_model_and_an_alias_that_are_not_there(
    connections: Callable[..., None], fails: Fails, mlflow_server: Any
) -> None:
    connections("mlflow_default", conn_type="mlflow", extra={"tracking_uri": mlflow_server.uri})
    assert "tumours" in str(fails(face.PinModelOperator, ModelPinError, model="tumours@champion"))


def test_a_registry_that_is_down(connections: Callable[..., None], fails: Fails) -> None:
    connections("mlflow_default", conn_type="mlflow", host="http://127.0.0.1", port=free_port())
    error = fails(face.PinModelOperator, RegistryUnavailableError, model="triage@champion")
    assert "127.0.0.1" in str(error)


def test_a_ticket_service_that_is_down(connections: Callable[..., None], fails: Fails, tmp_path: Path) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    connections("ai_api_default", conn_type="ai_api", host=address, extra={"patience_s": 2})
    writer = Store(f"file://{tmp_path}/store").open_batch("first_try", "batch", "b")
    writer.write(ACCEPTED, pa.table({"_row_id": ["a", "b"], "x": [1, 2]}))
    rows: BatchRef = writer.land({"read": 2, "accepted": 2, "quarantined": 0}, {})
    error = fails(face.ApiActionOperator, ActionUnavailableError, rows=rows.to_dict(), endpoint="/tickets")
    assert address in str(error)
    assert "the retry sends only what is open" in str(error)
