"""Topics of a real broker, with what the tests do to them."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from confluent_kafka import Producer, TopicPartition
from confluent_kafka.admin import NewPartitions

from airflow_ai_provider.core.batch import Span
from airflow_ai_provider.core.ingest.kafka import KafkaReader

if TYPE_CHECKING:
    from tests.servers.kafka import KafkaBroker


_numbers = itertools.count(1)

HANGS_S = 45.0
"""What takes so long hangs; a machine at work may need a good part of it."""
SLOW = {"queued.max.messages.kbytes": 1024, "max.partition.fetch.bytes": 100_000, "queued.min.messages": 100}
"""The client has little of a topic before it is asked for: the rest of a large one is still at the broker."""


class Topic:
    """One topic of the shared broker, with what the tests do to it."""

    def __init__(self, broker: KafkaBroker, partitions: int = 1, config: dict[str, str] | None = None) -> None:
        self.broker = broker
        self.name = broker.create_topic(f"ingest-{next(_numbers)}", partitions, config)

    def add(self, payloads: Sequence[bytes | None], partition: int = 0, stamps: Sequence[int] | None = None) -> None:
        producer = Producer({"bootstrap.servers": self.broker.bootstrap, "linger.ms": 50})
        for number, payload in enumerate(payloads):
            stamp = {"timestamp": stamps[number]} if stamps else {}
            producer.produce(self.name, payload, key=b"k", partition=partition, **stamp)
        assert producer.flush(30) == 0

    def transaction(self, payloads: Sequence[bytes], end: str, partition: int = 0) -> Producer:
        settings = {"bootstrap.servers": self.broker.bootstrap, "transactional.id": f"t{next(_numbers)}"}
        producer = Producer({**settings, "transaction.timeout.ms": 240_000})
        producer.init_transactions(30)
        producer.begin_transaction()
        for payload in payloads:
            producer.produce(self.name, payload, partition=partition)
        producer.flush(30)
        if end == "commit":
            producer.commit_transaction(30)
        elif end == "abort":
            producer.abort_transaction(30)
        if end in ("commit", "abort"):
            self.broker.wait_until_stable(self.name)
        return producer

    def delete_before(self, offset: int, partition: int = 0) -> None:
        tp = TopicPartition(self.name, partition, offset)
        admin = self.broker.admin()  # held until the answer is there: it ends with its object
        admin.delete_records([tp])[tp].result(30)

    def reader(self, **settings: Any) -> KafkaReader:
        config = {"bootstrap.servers": self.broker.bootstrap, "reconnect.backoff.max.ms": 1000}
        return KafkaReader({**config, **settings.pop("config", {})}, self.name, **{"deadline_s": 30.0, **settings})


def rows(count: int, first: int = 0) -> list[bytes]:
    return [json.dumps({"n": n}).encode() for n in range(first, first + count)]


def read(reader: KafkaReader, span: Span) -> list[int]:
    try:
        return [json.loads(p)["n"] for t in reader.read(span) for p in t["_payload"].to_pylist()]
    finally:
        reader.close()


def everything(reader: KafkaReader, window: tuple[datetime, datetime] | None = None) -> Span:
    return reader.plan({}, {}, window, None)


def grow(topic: Topic, count: int) -> None:
    admin = topic.broker.admin()
    admin.create_partitions([NewPartitions(topic.name, count)])[topic.name].result(30)
    deadline = time.monotonic() + 60
    while len(admin.list_topics(topic.name, timeout=10).topics[topic.name].partitions) < count:
        assert time.monotonic() < deadline
