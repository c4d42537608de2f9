"""Hooks against real things where there is one, and the message that each wrong connection gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from airflow_ai_provider.errors import ConnectionConfigError
from airflow_ai_provider.hooks.api import ApiHook
from airflow_ai_provider.hooks.kafka import KafkaConfigHook
from airflow_ai_provider.hooks.ledger import LedgerHook
from airflow_ai_provider.hooks.mlflow import MlflowRegistryHook
from airflow_ai_provider.hooks.store import StoreHook

Define = Callable[..., None]


@pytest.fixture
def connection(monkeypatch: pytest.MonkeyPatch) -> Define:
    """Define an Airflow connection for this test, as an operator would by environment."""

    def define(conn_id: str, **fields: Any) -> None:
        monkeypatch.setenv(f"AIRFLOW_CONN_{conn_id.upper()}", json.dumps(fields))

    return define


@pytest.mark.parametrize(
    ("use", "conn_type"),
    [
        (lambda: StoreHook("nowhere").get_store(), "ai_store"),
        (lambda: LedgerHook("nowhere").get_ledger(), "ai_ledger"),
        (lambda: MlflowRegistryHook("nowhere").tracking_uri(), "mlflow"),
        (lambda: ApiHook("nowhere").get_sender(), "ai_api"),
        (lambda: KafkaConfigHook("nowhere").get_config(), "kafka"),
    ],
)
def test_a_missing_connection_says_how_to_add_it(use: Callable[[], Any], conn_type: str, airflow_db: None) -> None:
    with pytest.raises(ConnectionConfigError, match=f"airflow connections add nowhere --conn-type {conn_type}"):
        use()


def test_store_and_ledger_have_embedded_defaults(airflow_db: None) -> None:
    store = StoreHook().get_store()
    assert store.root.startswith("file:///")
    assert store.root.endswith("/ai_provider/store")
    assert StoreHook().test_connection()[0]
    assert LedgerHook().test_connection() == (True, "the ledger answers")


def test_store_at_a_uri(connection: Define, tmp_path: Path) -> None:
    connection("disk", conn_type="ai_store", extra={"uri": f"file://{tmp_path}"})
    assert StoreHook("disk").test_connection() == (True, f"wrote and read back at file://{tmp_path}")
    connection("empty", conn_type="ai_store", extra={})
    with pytest.raises(ConnectionConfigError, match="no 'uri' in its extras"):
        StoreHook("empty").get_store()


def test_ledger_on_postgresql_by_url_and_by_fields(connection: Define, postgres_url: str) -> None:
    connection("by_url", conn_type="ai_ledger", extra={"url": postgres_url})
    assert LedgerHook("by_url").test_connection() == (True, "the ledger answers")
    login, _, place = postgres_url.partition("://")[2].rpartition("@")
    host, _, database = place.partition("/")
    user, _, password = login.partition(":")
    name, _, port = host.partition(":")
    connection(
        "by_fields",
        conn_type="ai_ledger",
        host=name,
        port=int(port),
        schema=database,
        login=user or "postgres",
        password=password or "any",
    )
    assert LedgerHook("by_fields").test_connection() == (True, "the ledger answers")
    connection("none", conn_type="ai_ledger")
    with pytest.raises(ConnectionConfigError, match="names no database"):
        LedgerHook("none").get_ledger()


def test_ledger_down_is_said_without_the_password(connection: Define) -> None:
    connection("down", conn_type="ai_ledger", host="127.0.0.1", port=1, schema="x", login="u", password="s3cret!")
    works, message = LedgerHook("down").test_connection()
    assert not works
    assert "s3cret" not in message


def test_registry_address(connection: Define, mlflow_server: Any) -> None:
    host, _, port = mlflow_server.uri.rpartition(":")
    connection("real", conn_type="mlflow", host=host, port=int(port))
    assert MlflowRegistryHook("real").tracking_uri() == mlflow_server.uri
    assert MlflowRegistryHook("real").test_connection()[0]
    connection("secret", conn_type="mlflow", host="https://mlflow", login="me", password="a/b")
    assert MlflowRegistryHook("secret").tracking_uri() == "https://me:a%2Fb@mlflow"
    connection("file", conn_type="mlflow", extra={"tracking_uri": "sqlite:////tmp/x.db"})
    assert MlflowRegistryHook("file").tracking_uri() == "sqlite:////tmp/x.db"
    connection("none", conn_type="mlflow")
    with pytest.raises(ConnectionConfigError, match="names no server"):
        MlflowRegistryHook("none").tracking_uri()
    connection("down", conn_type="mlflow", host="http://127.0.0.1", port=1)
    assert MlflowRegistryHook("down").test_connection()[0] is False


def test_kafka_refuses_auto_commit_and_uncommitted_records(connection: Define) -> None:
    extra = {"bootstrap.servers": "127.0.0.1:1", "group.id": "g"}
    connection("fine", conn_type="kafka", extra=extra)
    assert KafkaConfigHook("fine").get_config() == extra
    connection("auto", conn_type="kafka", extra=extra | {"enable.auto.commit": "true"})
    with pytest.raises(ConnectionConfigError, match="enable.auto.commit=true"):
        KafkaConfigHook("auto").get_config()
    connection("dirty", conn_type="kafka", extra=extra | {"isolation.level": "read_uncommitted"})
    with pytest.raises(ConnectionConfigError, match="isolation.level=read_uncommitted.*may yet be aborted"):
        KafkaConfigHook("dirty").get_config()
    connection("none", conn_type="kafka", extra={})
    with pytest.raises(ConnectionConfigError, match="bootstrap.servers"):
        KafkaConfigHook("none").get_config()


def test_api_sender(connection: Define, httpserver: Any) -> None:
    httpserver.expect_request("/").respond_with_data("hello")
    connection("real", conn_type="ai_api", host=f"http://{httpserver.host}", port=httpserver.port, password="t0ken")
    works, message = ApiHook("real").test_connection()
    assert works, message
    assert httpserver.log[0][0].headers["Authorization"] == "Bearer t0ken"
    assert "t0ken" not in message
    connection("down", conn_type="ai_api", host="http://127.0.0.1", port=1)
    assert ApiHook("down").test_connection()[0] is False
    connection("none", conn_type="ai_api")
    with pytest.raises(ConnectionConfigError, match="names no host"):
        ApiHook("none").get_sender()


def test_keys_to_a_sources_files(connection: Define, airflow_db: None) -> None:
    keys = {"login": "key", "password": "not-shown"}
    connection("lake", conn_type="aws", extra={"endpoint_url": "http://s3", "region_name": "eu-west-1"}, **keys)
    assert StoreHook("lake").get_options() == {
        "key": "key",
        "secret": "not-shown",
        "endpoint_url": "http://s3",
        "client_kwargs": {"region_name": "eu-west-1"},
    }
    connection("cloud", conn_type="ai_store", extra={"timeout_s": 3, "options": {"token": "anon"}})
    assert StoreHook("cloud").get_options() == {"timeout_s": 3, "token": "anon"}
    for wrong in ({"timeout_s": "soon"}, {"timeout_s": 0}, {"options": "secret text"}):
        connection("wrong", conn_type="ai_store", extra=wrong)
        with pytest.raises(ConnectionConfigError, match=f"'wrong' has {next(iter(wrong))}=.*it must be") as caught:
            StoreHook("wrong").get_options()
        assert "secret text" not in str(caught.value)
    with pytest.raises(ConnectionConfigError, match="connection 'nobody' is not defined"):
        StoreHook("nobody").get_options()
