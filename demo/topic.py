"""A topic for the story on a broker that is the user's own.

Invariants: a topic that holds anything but the demo's own messages is left alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from demo.services import DemoFailedError
from include.messages import HEADER

if TYPE_CHECKING:
    from confluent_kafka.admin import AdminClient

PARTITIONS = 4


def make_topic(client: Mapping[str, Any], topic: str, news: Callable[[str], None]) -> None:
    """Make the topic anew, empty, with several topic partitions.

    :param client: configuration of the Kafka client.
    :raises DemoFailedError: when there is a topic of this name with messages of somebody else.
    """
    from confluent_kafka import KafkaException
    from confluent_kafka.admin import AdminClient, NewTopic

    admin = AdminClient(dict(client))
    try:
        if _exists(admin, topic):
            _demand_ours(client, topic, list(admin.list_topics(topic, timeout=15).topics[topic].partitions))
            news(f"removing {topic!r} of an earlier demo")
            admin.delete_topics([topic])[topic].result(30)
            _wait(lambda: not _exists(admin, topic), f"topic {topic!r} does not go away")
        news(f"making topic {topic!r}")
        admin.create_topics([NewTopic(topic, PARTITIONS)])[topic].result(30)
        _wait(lambda: _exists(admin, topic), f"topic {topic!r} does not appear")
    except KafkaException as error:
        raise DemoFailedError(f"the broker does not let the demo make topic {topic!r}: {error}") from error


def _exists(admin: AdminClient, topic: str) -> bool:
    return topic in admin.list_topics(timeout=15).topics


def _demand_ours(client: Mapping[str, Any], topic: str, partitions: list[int]) -> None:
    from confluent_kafka import Consumer, TopicPartition

    consumer = Consumer({**client, "group.id": "airflow-ai-demo-look", "enable.auto.commit": False})
    try:
        for partition in partitions:
            low, high = consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=15)
            if low == high:
                continue
            consumer.assign([TopicPartition(topic, partition, low)])
            message = consumer.poll(15)
            if message is None or message.error() or HEADER[0] not in dict(message.headers() or []):
                raise DemoFailedError(
                    f"topic {topic!r} holds messages that are not the demo's. They are left alone: "
                    "use another broker, or leave KAFKA out to start an embedded one."
                )
    finally:
        consumer.close()


def _wait(done: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + 30
    while not done():
        if time.monotonic() > deadline:
            raise DemoFailedError(f"{otherwise} within 30 s. Try again, or use another broker.")
        time.sleep(0.2)
