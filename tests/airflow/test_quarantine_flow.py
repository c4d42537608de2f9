"""The ingest operators about quarantine: a run's conf names a replay, the log tells what waits."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk import DAG
from airflow.sdk.observability import stats

from airflow_ai_provider import (
    FileSource,
    IngestShardOperator,
    KafkaSink,
    LandBatchOperator,
    PlanIngestOperator,
    ReplayQuarantineOperator,
    ValidatedIngestOperator,
)
from airflow_ai_provider.core.batch import ACCEPTED, BatchRef, Slice, Span
from airflow_ai_provider.core.ingest.replay import prepare_replay
from airflow_ai_provider.core.ledger import Claim, Ledger
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.errors import SpecError
from airflow_ai_provider.operators.landed import send_dead_letters
from airflow_ai_provider.run import Run

SUITE = {
    "name": "rows",
    "expectations": [
        {"type": "expect_column_values_to_be_of_type", "kwargs": {"column": "x", "type_": "float"}},
        {"type": "expect_column_values_to_be_between", "kwargs": {"column": "x", "min_value": 0}},
    ],
}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What was sent to whoever collects metrics."""
    found: dict[str, float] = {}
    monkeypatch.setattr(stats, "gauge", lambda name, value, tags: found.update({f"{name} {tags['pipeline']}": value}))
    return found


@pytest.fixture
def arguments(tmp_path: Path, stored: tuple[Store, Ledger]) -> dict[str, Any]:
    """Four rows, two of which are below zero."""
    (tmp_path / "in.jsonl").write_text('{"x": 1}\n{"x": -2}\n{"x": 3}\n{"x": -4}\n')
    (tmp_path / "rows.json").write_text(json.dumps(SUITE))
    return {"source": FileSource(f"{tmp_path}/in.jsonl"), "expectations": f"{tmp_path}/rows.json"}


def context(run_id: str, task: str = "ingest", **params: Any) -> dict[str, Any]:
    dag_run = SimpleNamespace(run_id=run_id, run_type="manual", data_interval_start=None, data_interval_end=None)
    ti = SimpleNamespace(dag_id="p", task_id=task, map_index=-1, xcom_push=lambda key, value: None)
    return {"ti": ti, "dag_run": dag_run, "params": params}


def flip(row: dict[str, Any]) -> dict[str, Any] | None:
    return {"x": 2} if row["x"] == -2 else None


def test_a_run_whose_conf_names_a_replay_lands_it(
    arguments: dict[str, Any], stored: tuple[Store, Ledger], told: dict[str, float], caplog: pytest.LogCaptureFixture
) -> None:
    store, ledger = stored
    ingest = ValidatedIngestOperator(task_id="ingest", dag=DAG("p"), **arguments)
    with caplog.at_level(logging.INFO):
        first = BatchRef.from_dict(ingest.execute(context("r1")))
    assert first.counts == {"read": 4, "accepted": 2, "quarantined": 2}
    assert "in quarantine wait 2 rows of 1 batches, the oldest for 0:00:0" in caplog.text
    assert told["ai_provider.quarantine.rows p"] == 2
    assert told["ai_provider.quarantine.oldest_s p"] > 0

    replay = prepare_replay(store, first, flip, pipeline="p").batch_id
    mended = ingest.execute(context("r2", replay=replay, row_limit=0))
    ref = BatchRef.from_dict(mended)
    assert ref.counts == {"read": 1, "accepted": 1, "quarantined": 0}
    assert [row["x"] for part in store.read(ref, ACCEPTED) for row in part.to_pylist()] == [2.0]
    assert told["ai_provider.quarantine.rows p"] == 1
    assert ingest.execute(context("r3", replay=replay)) == mended
    with pytest.raises(SpecError, match="there is no replay 'absent'"):
        ingest.execute(context("r4", replay="absent"))

    plan = PlanIngestOperator(task_id="plan", dag=DAG("p"), source=arguments["source"])
    (shard,) = plan.execute(context("r5", "plan", replay=replay))
    done = IngestShardOperator(task_id="shard", dag=DAG("p"), shard=shard, expectations=arguments["expectations"])
    land = LandBatchOperator(task_id="land", dag=DAG("p"), parts=[done.execute(context("r5", "shard", replay=replay))])
    assert land.execute(context("r5", "land", replay=replay)) == mended

    by_operator = ReplayQuarantineOperator(
        task_id="replay", dag=DAG("p"), batch=first.to_dict(), fix=flip, expectations=arguments["expectations"]
    )
    assert by_operator.execute(context("r6", "replay")) == mended
    assert {claim.run_id for claim in ledger.claims("p")} == {"r1", "r2"}


def test_a_muted_run_sends_no_letters(arguments: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    ingest = ValidatedIngestOperator(task_id="ingest", dag=DAG("p"), dead_letters="dead", **arguments)
    with caplog.at_level(logging.INFO):
        assert ingest.execute(context("r1", dry_run=True))["counts"]["quarantined"] == 2
    assert "muted run: nothing is sent to topic dead" in caplog.text


def test_rejected_rows_are_not_sent_to_where_they_come_from(stored: tuple[Store, Ledger]) -> None:
    ref = BatchRef("batch", "t-1", "u", "sha256:0", {"read": 1, "accepted": 0, "quarantined": 1})
    landed = Claim("p", "k", Span("kafka:t", "", (Slice("0", 0, 1),)), "landed", ref, "r")
    with pytest.raises(SpecError, match="would come back for ever"):
        send_dead_letters(Run("p", "r", "k", "manual"), landed, *stored, KafkaSink("t"))


def test_a_sink_is_a_topic() -> None:
    assert KafkaSink.of("t") == KafkaSink.of({"topic": "t"}) == KafkaSink.of(KafkaSink("t"))
    with pytest.raises(SpecError, match="my topic"):
        KafkaSink("my topic")
