"""A DAG that predicts landed batches again: its schedule, and how it finds them."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from airflow.sdk import DAG
from airflow.serialization.serialized_objects import DagSerialization

from airflow_ai_provider import FindBatchesOperator, on_model
from airflow_ai_provider.core.batch import BatchRef, Slice, Span
from airflow_ai_provider.core.ledger_sql import open_ledger
from airflow_ai_provider.errors import SpecError


@pytest.fixture
def landed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Three batches landed by one pipeline, one by another, one claimed and not landed."""
    url = f"sqlite:///{tmp_path}/ledger.db"
    monkeypatch.setenv("AIRFLOW_CONN_AI_LEDGER_DEFAULT", json.dumps({"conn_type": "ai_ledger", "extra": {"url": url}}))
    ledger, refs = open_ledger(url), []
    for number in range(5):
        pipeline = "other" if number == 3 else "triage"
        ledger.claim(pipeline, f"run-{number}", Span("kafka:t", "", (Slice("0", number, number + 1),)), f"run-{number}")
        if number < 4:
            ref = BatchRef("batch", f"t-{number}", f"store/t-{number}", "sha256:0", {"read": 1, "accepted": 1})
            ledger.landed(pipeline, f"run-{number}", ref)
            refs.append(ref.to_dict())
    return refs[:3]


@pytest.mark.parametrize(("newest", "first"), [(2, 1), ("2", 1), (0, 0), (None, 0), (99, 0)])
def test_the_newest_landed_batches_come_oldest_first(newest: Any, first: int, landed: list[dict[str, Any]]) -> None:
    found = FindBatchesOperator(task_id="find", pipeline="triage", newest=newest).execute({})
    assert found == landed[first:]
    assert json.loads(json.dumps(found)) == found


def test_a_pipeline_that_landed_nothing_gives_nothing(landed: list[dict[str, Any]]) -> None:
    assert FindBatchesOperator(task_id="find", pipeline="unknown").execute({}) == []


@pytest.mark.parametrize("newest", ["all", "-1", -2])
def test_what_is_no_number_is_named(newest: Any, landed: list[dict[str, Any]]) -> None:
    with pytest.raises(SpecError, match="no number of batches"):
        FindBatchesOperator(task_id="find", pipeline="triage", newest=newest).execute({})


def test_the_schedule_survives_the_scheduler() -> None:
    with DAG("rescore", schedule=on_model("triage@champion", every=timedelta(seconds=30))) as dag:
        pass
    again = DagSerialization.from_dict(json.loads(json.dumps(DagSerialization.to_dict(dag))))
    (asset,) = (asset for _, asset in again.timetable.asset_condition.iter_assets())
    (watcher,) = asset.watchers
    told = json.dumps(watcher.trigger if hasattr(watcher, "trigger") else watcher, default=str)
    assert "ModelAliasTrigger" in told
    assert "triage@champion" in told
