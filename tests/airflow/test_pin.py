"""PinModelOperator as Airflow runs it: policy by kind of run, trust from task and connection, the link to MLflow."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk import DAG, BaseHook
from airflow.serialization.serialized_objects import DagSerialization

from airflow_ai_provider import PinModelOperator
from airflow_ai_provider.core.batch import Pin
from airflow_ai_provider.core.infer import pin as door
from airflow_ai_provider.core.infer.trust import Trust
from airflow_ai_provider.core.ledger_sql import open_ledger
from airflow_ai_provider.errors import ConnectionConfigError, ModelPinError, SpecError
from airflow_ai_provider.hooks.mlflow import MlflowRegistryHook
from airflow_ai_provider.operators.infer import ModelVersionLink
from airflow_ai_provider.testing import MemoryRegistry

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MemoryRegistry:
    """A registry in memory behind the connection, and a ledger of this test's own."""
    registry = MemoryRegistry()
    registry.register("triage")
    registry.register("triage")
    registry.point("triage", "champion", "1")
    monkeypatch.setenv("AIRFLOW_CONN_MLFLOW_DEFAULT", json.dumps({"conn_type": "mlflow", "host": "http://mlflow"}))
    url = f"sqlite:///{tmp_path}/ledger.db"
    ledger = json.dumps({"conn_type": "ai_ledger", "extra": {"url": url}})
    monkeypatch.setenv("AIRFLOW_CONN_AI_LEDGER_DEFAULT", ledger)
    monkeypatch.setattr(door, "MlflowRegistry", lambda uri, cache_dir, trust: registry)
    return registry


def run(run_id: str, at: datetime | None = NOON, run_type: str = "scheduled", **options: Any) -> tuple[Pin, Any]:
    """Execute the task in a run of the hour from ``at``, and return its pin and what it handed on besides."""
    with DAG("p"):
        task = PinModelOperator(task_id="pin", model="triage@champion", **options)
    handed: dict[str, Any] = {}
    ti = SimpleNamespace(
        dag_id="p", task_id="pin", map_index=-1, xcom_push=lambda key, value: handed.update({key: value})
    )
    dag_run = SimpleNamespace(
        run_id=run_id,
        run_type=run_type,
        data_interval_start=at,
        data_interval_end=at + timedelta(hours=1) if at else None,
        logical_date=at,
        run_after=NOON + timedelta(hours=9),
    )
    return Pin.from_dict(task.execute({"ti": ti, "dag_run": dag_run, "params": {}})), handed


def test_a_backfill_takes_what_the_window_used_and_other_runs_what_is_current(models: MemoryRegistry) -> None:
    assert run("r1")[0].version == "1"
    models.point("triage", "champion", "2")
    assert run("r1")[0].version == "1", "cleared"
    assert run("again", run_type="backfill")[0].version == "1"
    assert run("caught up", NOON + timedelta(hours=5), "backfill")[0].version == "2"
    assert run("rescored", run_type="backfill", model_policy="current")[0].version == "2"
    assert run("manual", NOON + timedelta(hours=6), "manual")[0].version == "2"
    assert run("by event", None, "asset_triggered")[0].version == "2"


def test_the_policy_may_come_from_the_trigger_form(models: MemoryRegistry) -> None:
    assert {"model", "model_policy"} <= set(PinModelOperator.template_fields)
    run("r1")
    models.point("triage", "champion", "2")
    assert run("r2", model_policy="as_run, current")[0].version == "1"
    with pytest.raises(ModelPinError, match="was never run by p"):
        run("r3", NOON - timedelta(days=9), model_policy="as_run")
    with pytest.raises(SpecError, match="model_policy 'newest' is not"):
        run("r4", model_policy="newest")


def test_the_ledger_says_for_which_window_and_why(models: MemoryRegistry, tmp_path: Path) -> None:
    run("r1")
    (told,) = open_ledger(f"sqlite:///{tmp_path}/ledger.db").pin_history("triage")
    assert (told["window_start"], told["window_end"], told["policy"]) == (
        "2026-11-22T12:00:00.000000+00:00",
        "2026-11-22T13:00:00.000000+00:00",
        "current",
    )


# --- the link ---


def test_the_link_opens_the_version_in_mlflow(models: MemoryRegistry) -> None:
    link = "http://mlflow/#/models/triage/versions/1"
    assert run("r1")[1] == {ModelVersionLink.key: link}


def test_the_link_survives_the_round_trip_as_the_name_of_its_xcom() -> None:
    with DAG("p") as dag:
        PinModelOperator(task_id="pin", model="triage@champion")
    twin = DagSerialization.from_dict(DagSerialization.to_dict(dag)).get_task("pin")
    (link,) = twin.operator_extra_links
    assert (link.name, link.xcom_key) == ("Model version", ModelVersionLink.key)


@pytest.mark.parametrize(
    ("connection", "link"),
    [
        (
            {"host": "https://me:secret@m.example.com", "port": 5000, "login": "u", "password": "p"},
            "https://m.example.com:5000",
        ),
        ({"host": "mlflow", "extra": {"ui_url": "https://ml.example.com/ui/"}}, "https://ml.example.com/ui"),
        ({"extra": {"tracking_uri": "sqlite:////data/mlflow.db"}}, ""),
        (
            {"extra": {"tracking_uri": "sqlite:////data/m.db", "ui_url": "http://localhost:5000"}},
            "http://localhost:5000",
        ),
    ],
)
def test_where_people_open_mlflow(connection: dict[str, Any], link: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW_CONN_MLFLOW_DEFAULT", json.dumps({"conn_type": "mlflow", **connection}))
    expected = f"{link}/#/models/a%2Fb/versions/3" if link else ""
    assert MlflowRegistryHook().ui_link("a/b", "3") == expected


# --- trust ---


def trust(monkeypatch: pytest.MonkeyPatch, extra: dict[str, Any], *arguments: Any) -> Trust:
    monkeypatch.setenv(
        "AIRFLOW_CONN_MLFLOW_DEFAULT", json.dumps({"conn_type": "mlflow", "host": "http://m", "extra": extra})
    )
    found: Trust = MlflowRegistryHook().get_registry("/models", *arguments)._trust
    return found


def test_task_and_connection_each_name_what_may_be_unpickled(monkeypatch: pytest.MonkeyPatch) -> None:
    assert trust(monkeypatch, {}).allow_pickle == frozenset()
    assert trust(monkeypatch, {"allow_pickle": "a, b,"}, ["c"]).allow_pickle == {"a", "b", "c"}
    assert not trust(monkeypatch, {}).served and trust(monkeypatch, {}, (), True).served


def test_the_key_is_a_file_or_its_text_and_the_tasks_own_goes_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text, site = "-----BEGIN PUBLIC KEY-----\nAAA\n", "-----BEGIN PUBLIC KEY-----\nBBB\n"
    (tmp_path / "team.pem").write_text(text)
    assert trust(monkeypatch, {}, (), False, str(tmp_path / "team.pem")).signed_by == text
    assert trust(monkeypatch, {"signed_by": site}).signed_by == site
    assert trust(monkeypatch, {"signed_by": site}, (), False, text).signed_by == text
    with pytest.raises(ConnectionConfigError, match=r"the key '.*absent.pem' .* cannot be read"):
        trust(monkeypatch, {"signed_by": str(tmp_path / "absent.pem")})


def test_a_key_file_is_looked_for_beside_the_dag(models: MemoryRegistry) -> None:
    with pytest.raises(SpecError, match="file 'team.pem' not found.*/keys/team.pem"):
        run("r1", signed_by="team.pem")


def test_the_connection_is_looked_up_by_the_name_that_was_given() -> None:
    with pytest.raises(ConnectionConfigError, match="'elsewhere' is not defined"):
        MlflowRegistryHook("elsewhere").get_registry("/models")
    assert issubclass(MlflowRegistryHook, BaseHook)
