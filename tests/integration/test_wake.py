"""A topic that grows wakes a DAG: the trigger against a real broker (under a real scheduler: ``test_scheduler``)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from typing import Any

import pytest
from airflow.sdk import DAG
from airflow.serialization.serialized_objects import DagSerialization
from airflow.triggers.base import TriggerEvent
from confluent_kafka import Producer

from airflow_ai_provider import KafkaSource
from airflow_ai_provider.schedule import on_topic
from airflow_ai_provider.triggers.topic import TopicGrowthTrigger, growth
from tests.servers.kafka import KafkaBroker

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


def _connection(broker: KafkaBroker) -> dict[str, Any]:
    return {"conn_type": "kafka", "extra": {"bootstrap.servers": broker.bootstrap, "group.id": "wake"}}


@pytest.fixture
def topic(kafka_broker: KafkaBroker, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    monkeypatch.setenv("AIRFLOW_CONN_KAFKA_DEFAULT", json.dumps(_connection(kafka_broker)))
    return kafka_broker.create_topic(f"wake-{request.node.name.replace('_', '-')}", 2)


def _produce(broker: KafkaBroker, topic: str, count: int, **settings: Any) -> None:
    producer = Producer({"bootstrap.servers": broker.bootstrap, **settings})
    for number in range(count):
        producer.produce(topic, json.dumps({"n": number}).encode())
    assert producer.flush(60) == 0


async def _next(events: AsyncIterator[TriggerEvent], within_s: float) -> dict[str, Any] | None:
    """The next event's payload; None when none comes in time. The watch goes on either way."""
    try:
        return (await asyncio.wait_for(anext(events), within_s)).payload  # type: ignore[no-any-return]
    except TimeoutError:
        return None


def _watch(story: Callable[[AsyncIterator[TriggerEvent]], Any], topic: str) -> None:
    async def main() -> None:
        events = TopicGrowthTrigger(topic, interval_s=0.05).run()
        try:
            await story(events)
        finally:
            await events.aclose()  # type: ignore[attr-defined]

    asyncio.run(main())


def test_one_event_for_a_burst_and_one_for_its_tail(kafka_broker: KafkaBroker, topic: str) -> None:
    async def story(events: AsyncIterator[TriggerEvent]) -> None:
        waiting = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0.5)
        assert not waiting.done(), "an empty topic wakes nobody"
        _produce(kafka_broker, topic, 1000)
        first = (await asyncio.wait_for(waiting, 90)).payload
        waiting = asyncio.ensure_future(anext(events))
        _produce(kafka_broker, topic, 1)
        last = (await asyncio.wait_for(waiting, 90)).payload
        while sum(last["ends"].values()) < 1001:  # the burst may have been seen in two looks
            last = (await asyncio.wait_for(anext(events), 90)).payload
        assert first["topic"] == topic
        assert set(last["ends"]) == {"0", "1"}
        assert await _next(events, 0.5) is None, "a quiet topic wakes nobody"

    _watch(story, topic)


def test_an_aborted_transaction_moves_no_row_and_an_open_one_is_not_seen(kafka_broker: KafkaBroker, topic: str) -> None:
    producer = Producer({"bootstrap.servers": kafka_broker.bootstrap, "transactional.id": topic})
    producer.init_transactions(30)

    async def story(events: AsyncIterator[TriggerEvent]) -> None:
        producer.begin_transaction()
        producer.produce(topic, b"{}", partition=0)
        producer.flush(60)
        waiting = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0.5)
        assert not waiting.done()
        await asyncio.to_thread(producer.commit_transaction, 30)
        assert (await asyncio.wait_for(waiting, 90)).payload["ends"]["0"] >= 1

    _watch(story, topic)


def test_a_watch_outlives_a_broker_that_is_away(
    kafka_broker: KafkaBroker, topic: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _produce(kafka_broker, topic, 3)
    right = json.dumps(_connection(kafka_broker))
    wrong = json.dumps({"conn_type": "kafka", "extra": {"group.id": "wake"}})
    monkeypatch.setenv("AIRFLOW_CONN_KAFKA_DEFAULT", wrong)

    said = ""

    async def story(events: AsyncIterator[TriggerEvent]) -> None:
        nonlocal said
        waiting = asyncio.ensure_future(anext(events))
        deadline = asyncio.get_running_loop().time() + 90
        while "is not watched for" not in (said := said + capsys.readouterr().out):
            assert asyncio.get_running_loop().time() < deadline, said
            await asyncio.sleep(0.05)
        assert not waiting.done()
        monkeypatch.setenv("AIRFLOW_CONN_KAFKA_DEFAULT", right)
        assert sum((await asyncio.wait_for(waiting, 90)).payload["ends"].values()) == 3

    _watch(story, topic)
    assert "bootstrap.servers" in said


@pytest.mark.parametrize(
    ("seen", "ends", "grown"),
    [
        ({}, {0: 0, 1: 0}, 0),
        ({}, {0: 5, 1: 0}, 5),
        ({0: 5}, {0: 5}, 0),
        ({0: 5}, {0: 7, 1: 2}, 4),
        ({0: 5}, {0: 2}, 2),  # made anew
    ],
)
def test_growth(seen: dict[int, int], ends: dict[int, int], grown: int) -> None:
    assert growth(seen, ends) == grown


def test_the_schedule_survives_the_scheduler() -> None:
    source = KafkaSource("biopsies", kafka_conn_id="plant")
    with DAG("woken", schedule=on_topic(source, every=timedelta(seconds=3))) as dag:
        pass
    again = DagSerialization.from_dict(json.loads(json.dumps(DagSerialization.to_dict(dag))))
    assert again.timetable.periodic
    watchers = [
        watcher
        for _, asset in again.timetable.asset_condition.iter_assets()
        for watcher in json.loads(
            json.dumps([vars(w) if hasattr(w, "__dict__") else str(w) for w in asset.watchers], default=str)
        )
    ]
    assert "TopicGrowthTrigger" in json.dumps(watchers)
    assert "plant" in json.dumps(watchers)
