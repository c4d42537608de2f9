"""A topic partition whose leader dies in the middle of a read: another broker leads it, and the read goes on there."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from confluent_kafka import KafkaException, Producer

from airflow_ai_provider.core.ingest.kafka import KafkaReader
from tests.servers.kafka import KafkaBroker

if TYPE_CHECKING:
    from confluent_kafka.admin import AdminClient

pytestmark = [pytest.mark.integration, pytest.mark.slow]
ROWS = 20_000


@pytest.fixture
def second_broker(kafka_broker: KafkaBroker) -> Iterator[KafkaBroker]:
    broker = KafkaBroker(kafka_broker)
    yield broker
    broker.close()


def leader_of(admin: AdminClient, topic: str) -> int:
    """Ask until it is told: the broker that answers may be the one that has not heard of the topic yet."""
    deadline = time.monotonic() + 60
    while True:
        with contextlib.suppress(KafkaException):  # the one that was asked has just died
            partitions = admin.list_topics(topic, timeout=10).topics[topic].partitions
            if partitions and partitions[0].leader >= 0:
                return int(partitions[0].leader)
        assert time.monotonic() < deadline, f"{topic} has no leader"
        time.sleep(0.1)


def test_a_leader_that_dies_in_mid_read_loses_and_doubles_nothing(
    kafka_broker: KafkaBroker, second_broker: KafkaBroker
) -> None:
    admin = kafka_broker.admin()
    for number in range(20):  # which broker leads is the controller's choice
        topic = kafka_broker.create_topic(f"led-{number}", replicas=2)
        if leader_of(admin, topic) == second_broker.node:
            break
    producer = Producer({"bootstrap.servers": kafka_broker.bootstrap, "acks": "all", "linger.ms": 20})
    for number in range(ROWS):
        producer.produce(topic, json.dumps({"n": number, "pad": "x" * 900}))
        producer.poll(0)
    assert producer.flush(60) == 0
    slow = {"queued.max.messages.kbytes": 1024, "max.partition.fetch.bytes": 100_000, "queued.min.messages": 100}
    reader = KafkaReader({"bootstrap.servers": kafka_broker.bootstrap, **slow}, topic, deadline_s=30)
    tables = reader.read(reader.plan({}, {}, None, None))
    found = next(tables)["_offset"].to_pylist()
    second_broker.kill()
    found += [offset for table in tables for offset in table["_offset"].to_pylist()]
    reader.close()
    assert found == list(range(ROWS))
    deadline = time.monotonic() + 60
    while leader_of(admin, topic) != kafka_broker.node:
        assert time.monotonic() < deadline
        time.sleep(0.2)
