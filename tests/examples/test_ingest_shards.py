"""An ingest in shards through ``dag.test()``: plan, mapped shards, landing, with nothing but XCom between them."""

from __future__ import annotations

import copy
import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Producer

from airflow_ai_provider.core.batch import Slice, Span
from airflow_ai_provider.core.ledger_sql import open_ledger
from airflow_ai_provider.errors import SpanConflictError
from tests.examples.conftest import Runner, World

pytestmark = [pytest.mark.slow, pytest.mark.integration]

DAG, ROWS = "pieces", 20_500
FILE = """
    from airflow.sdk import DAG
    from airflow_ai_provider import IngestShardOperator, KafkaSource, LandBatchOperator, PlanIngestOperator

    with DAG("pieces", schedule=None) as pieces:
        plan = PlanIngestOperator(
            task_id="ingest_plan", source=KafkaSource("pieces", key="n"), shards=4, limits={"rows": "{{ 20000 + 500 }}"}
        )
        each = IngestShardOperator.partial(task_id="ingest_shard", expectations="pieces.json")
        parts = each.expand(shard=plan.output)
        LandBatchOperator(task_id="ingest", parts=parts.output, max_rejected="1%")
"""
SUITE = {
    "name": "pieces",
    "expectations": [
        {"type": "expect_column_values_to_be_of_type", "kwargs": {"column": "n", "type_": "int"}},
        {"type": "expect_column_values_to_be_unique", "kwargs": {"column": "n"}},
    ],
}


@pytest.fixture(scope="module")
def pieces(world: World) -> Iterator[World]:
    """The world with a dags folder of its own; the topic is filled, with one double far from its twin."""
    folder = world.folder / "pieces"
    (folder / "dags").mkdir(parents=True)
    (folder / "dags" / "pieces.json").write_text(json.dumps(SUITE))
    (folder / "dags" / "dag_file.py").write_text(textwrap.dedent(FILE))
    produce(world, [*range(ROWS - 1), 7])
    made = copy.copy(world)
    made._runner = Runner(world.env | {"AIRFLOW__CORE__DAGS_FOLDER": str(folder / "dags")}, folder)
    yield made
    made.close()


def run(pieces: World, hour: int) -> dict[str, Any]:
    file = pieces.folder / "pieces" / "dags" / "dag_file.py"
    return pieces.run(DAG, at=f"2026-05-01T{hour}:00:00+00:00", file=str(file))


def produce(world: World, numbers: list[int]) -> None:
    producer = Producer({"bootstrap.servers": world.kafka, "queue.buffering.max.messages": 1_000_000})
    for at, n in enumerate(numbers):
        producer.produce("pieces", json.dumps({"n": n}).encode(), partition=at % 2)
    assert producer.flush(60) == 0


@pytest.fixture(scope="module")
def ran(pieces: World) -> dict[str, Any]:
    return run(pieces, 10)


def test_shards_become_one_batch(world: World, ran: dict[str, Any]) -> None:
    assert ran["state"] == "success"
    ref = ran["outputs"]["ingest"]
    assert ref["counts"] == {"read": ROWS, "accepted": ROWS - 2, "quarantined": 2}
    accepted = [row["n"] for row in world.rows(ref, "accepted")]
    assert sorted(accepted) == [n for n in range(ROWS - 1) if n != 7]
    (claim,) = open_ledger(world.ledger_url).claims(DAG)
    assert (claim.state, claim.ref.to_dict() if claim.ref else None) == ("landed", ref)
    names = {part.name.partition("-of-")[0] for part in Path(ref["uri"].removeprefix("file://")).rglob("*.parquet")}
    assert names == {"0000", "0001"}, "10,000 rows are worth a shard"


def test_a_clear_changes_nothing(pieces: World, ran: dict[str, Any]) -> None:
    before = pieces.bytes_of_all_batches()
    assert run(pieces, 10)["outputs"]["ingest"] == ran["outputs"]["ingest"]
    assert pieces.bytes_of_all_batches() == before


def test_a_run_that_finds_nothing_is_not_skipped_and_the_next_takes_the_rest(
    pieces: World, ran: dict[str, Any]
) -> None:
    empty = run(pieces, 11)
    assert set(empty["tasks"].values()) == {"success"}
    assert empty["outputs"]["ingest"]["counts"]["read"] == 0
    produce(pieces, [ROWS + n for n in range(10)])
    assert run(pieces, 12)["outputs"]["ingest"]["counts"] == {"read": 10, "accepted": 10, "quarantined": 0}


def test_a_try_that_ends_after_its_successor_found_nothing_is_refused_and_a_clear_is_not(
    world: World, pieces: World, ran: dict[str, Any]
) -> None:
    empty = run(pieces, 13)
    assert empty["outputs"]["ingest"]["counts"]["read"] == 0
    ledger, key = open_ledger(world.ledger_url), f"{empty['run_id']}/ingest_plan/-1"
    late = Span("kafka:pieces", "other", (Slice("0", 0, 1),))
    with pytest.raises(SpanConflictError, match="too late"):  # Airflow's ids of tries begin with the time
        ledger.claim(DAG, key, late, empty["run_id"], attempt="0190")
    produce(pieces, [2 * ROWS + n for n in range(6)])
    cleared = run(pieces, 13)
    assert cleared["run_id"] == empty["run_id"]
    assert cleared["outputs"]["ingest"]["counts"] == {"read": 6, "accepted": 6, "quarantined": 0}
