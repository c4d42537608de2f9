"""What the Kafka cases share: the topic, the client's best settings, and the limit that all are held against."""

from __future__ import annotations

import time
from collections.abc import Iterator

from confluent_kafka import Consumer, Message, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from benchmarks import servers
from benchmarks.harness import Place

TUNED = {
    "enable.auto.commit": False,
    "auto.offset.reset": "error",
    "fetch.queue.backoff.ms": 1,
    "fetch.wait.max.ms": 50,
    "queued.min.messages": 1_000_000,
    "queued.max.messages.kbytes": 262_144,
    "max.partition.fetch.bytes": 8_388_608,
    "fetch.max.bytes": 52_428_800,
}
# idempotent: a batch that a broker refuses, for the topic is new, is sent again in its place and not behind the next
PRODUCER = {"enable.idempotence": True, "linger.ms": 50, "batch.size": 262_144}


def create_topic(bootstrap: str, name: str, partitions: int) -> None:
    """Create a topic and return when it has its leaders."""
    admin = AdminClient({"bootstrap.servers": bootstrap})  # held until the answer is there: it ends with its object
    admin.create_topics([NewTopic(name, partitions, 1)])[name].result(30)
    deadline = time.monotonic() + 30
    while any(part.leader < 0 for part in admin.list_topics(name, timeout=10).topics[name].partitions.values()):
        assert time.monotonic() < deadline, f"{name} has no leaders"
        time.sleep(0.1)


def messages(place: Place, topic: str, partitions: int) -> Iterator[list[Message]]:
    """Consume a topic from its beginning, as fast as the client gives its messages: as many as the case's size."""
    bootstrap = servers.addresses(place.folder)["kafka"]
    consumer = Consumer({**TUNED, "group.id": "limit", "bootstrap.servers": bootstrap})
    consumer.assign([TopicPartition(topic, partition, 0) for partition in range(partitions)])
    left = place.size
    while left:
        found = consumer.consume(min(left, 1000), 5)
        assert found, f"{left} messages did not come"
        left -= len(found)
        yield found
    consumer.close()
