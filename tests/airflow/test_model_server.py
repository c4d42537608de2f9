"""A connection of a model server, and the operator that predicts through it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk.observability import stats

from airflow_ai_provider.core.infer.runner import Runner
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.errors import ConnectionConfigError, DeviceError, EngineUnavailableError
from airflow_ai_provider.hooks.model_server import ModelServerHook
from airflow_ai_provider.operators.infer import BatchInferenceOperator
from tests.core.infer.batches import land
from tests.core.infer.model_server import PIN, FakeServer, rows_of, serving, with_x

Define = Callable[..., None]
RUN = {
    "dag_run": SimpleNamespace(run_id="r1", run_type="manual"),
    "ti": SimpleNamespace(dag_id="p", task_id="infer", map_index=-1),
}


@pytest.fixture
def connection(monkeypatch: pytest.MonkeyPatch) -> Define:
    """Define an Airflow connection for this test, as an operator would by environment."""

    def define(conn_id: str, **fields: Any) -> None:
        monkeypatch.setenv(f"AIRFLOW_CONN_{conn_id.upper()}", json.dumps({"conn_type": "ai_model_server", **fields}))

    return define


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with serving() as made:
        yield made


def infer_task(store: Store, runner: Any = None, **arguments: Any) -> BatchInferenceOperator:
    batch = land(store, [with_x(rows_of(100), {4: 5000.0}), rows_of(20, seed=1)]).to_dict()
    runner = runner or Runner(endpoint="triton")
    return BatchInferenceOperator(
        task_id="infer", batch=batch, model=PIN.to_dict(), store_conn_id="disk", runner=runner, **arguments
    )


def test_a_batch_is_predicted_by_the_server(connection: Define, fake: FakeServer, tmp_path: Path) -> None:
    connection("disk", conn_type="ai_store", extra={"uri": f"file://{tmp_path}"})
    extra = {"in_flight": "4", "headers": {"X-Team": "oncology"}, "model": "sums", "outputs": "", "version": None}
    connection("triton", host="http://127.0.0.1", port=fake.port, password="t0ken", extra=extra)
    store = Store(f"file://{tmp_path}")
    ref = infer_task(store, {"endpoint": "triton", "batch_size": "30"}, max_failed="5%").execute(RUN)
    assert ref["counts"] == {"accepted": 120, "predicted": 119, "failed": 1}
    assert {(h["Authorization"], h["X-Team"]) for h in fake.headers} == {("Bearer t0ken", "oncology")}
    fake.seen.clear()
    assert infer_task(store, Runner(30, "triton")).execute(RUN) == ref
    assert fake.seen == [2, 2, 2], "a second try predicts the sample and keeps every part"


def test_how_fast_rows_are_predicted_goes_out_as_a_gauge(
    connection: Define, fake: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, float] = {}
    monkeypatch.setattr(stats, "gauge", lambda name, value, tags: found.update({f"{name} {tags['pipeline']}": value}))
    connection("disk", conn_type="ai_store", extra={"uri": f"file://{tmp_path}"})
    connection("triton", host="http://127.0.0.1", port=fake.port)
    infer_task(Store(f"file://{tmp_path}")).execute(RUN)
    (name,) = found
    assert name == "ai_provider.infer.rows_per_s p" and found[name] > 0


def test_what_the_connection_says_reaches_the_server(connection: Define, fake: FakeServer) -> None:
    place = f"127.0.0.1:{fake.port}"
    for fields in (
        {"host": f"http://{place}"},
        {"host": "127.0.0.1", "port": fake.port, "schema": "http"},
        {"host": f"http://{place}/", "login": "me", "password": "pw"},
    ):
        connection("triton", **fields)
        assert ModelServerHook("triton").test_connection() == (True, f"http://{place} answers with 200")
        with ModelServerHook("triton").open_engine(PIN) as engine:
            assert engine.proof == "its metadata lists version 3"
    assert fake.headers[-1]["Authorization"] == "Basic bWU6cHc="
    connection("path", host="https://gateway/models/", port=8443)
    assert ModelServerHook("path")._read()[0].url == "https://gateway:8443/models"


def test_connections_that_cannot_be(connection: Define, airflow_db: None) -> None:
    with pytest.raises(ConnectionConfigError, match="airflow connections add nowhere --conn-type ai_model_server"):
        ModelServerHook("nowhere").open_engine(PIN)
    connection("none")
    with pytest.raises(ConnectionConfigError, match="names no host"):
        ModelServerHook("none").open_engine(PIN)
    connection("odd", host="h", password="s3cret", extra={"protocol": "grpc", "timeout_s": 0})
    with pytest.raises(ConnectionConfigError, match="'odd'.*protocol 'grpc' is none of .*; timeout_s") as caught:
        ModelServerHook("odd").open_engine(PIN)
    assert "s3cret" not in str(caught.value)
    connection("down", host="http://127.0.0.1", port=1, extra={"patience_s": 0.2})
    assert ModelServerHook("down").test_connection()[0] is False
    with pytest.raises(EngineUnavailableError):
        ModelServerHook("down").open_engine(PIN)


def test_a_gpu_that_is_required_cannot_be_promised(connection: Define, tmp_path: Path) -> None:
    connection("disk", conn_type="ai_store", extra={"uri": f"file://{tmp_path}"})
    connection("triton", host="http://127.0.0.1", port=1)
    with pytest.raises(DeviceError, match="does not tell what it runs on"):
        infer_task(Store(f"file://{tmp_path}"), device="require_cuda").execute(RUN)
