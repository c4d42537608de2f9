"""Publish the unseen biopsies to a Kafka topic, some spoiled on purpose, and write down what is true of each.

Invariants: the same seed spoils the same biopsies in the same way; the truth names offsets as the broker confirmed
them; nothing counts as published until the broker said so.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from airflow_ai_provider.errors import SourceUnavailableError
from include.data import biopsy_records, feature_names

KINDS = ("missing_field", "wrong_type", "out_of_range", "broken_json")
SPOILED_OF_EACH = 5
HEADER = ("published-by", b"airflow-ai-provider example")
"""Header of every message, by which a later demo knows its own."""


@dataclass(frozen=True)
class Message:
    """One message to publish.

    :param biopsy_id: the message's key.
    :param value: the bytes as they go to the broker.
    :param kind: how it was spoiled; empty when it is good.
    """

    biopsy_id: str
    value: bytes
    kind: str = ""


@dataclass(frozen=True)
class Delivered:
    """Where the broker put one message."""

    message: Message
    topic: str
    partition: int
    offset: int


def make_messages(seed: int = 1) -> list[Message]:
    """Return one message per unseen biopsy; :data:`SPOILED_OF_EACH` of each of :data:`KINDS` are spoiled.

    :param seed: chooses which biopsies are spoiled and in which field.
    """
    chance = random.Random(seed)
    records = [record for record, _ in biopsy_records()]
    chosen = chance.sample(range(len(records)), SPOILED_OF_EACH * len(KINDS))
    kinds = {row: KINDS[place % len(KINDS)] for place, row in enumerate(chosen)}
    return [_message(record, kinds.get(row, ""), chance) for row, record in enumerate(records)]


def publish(
    client: Mapping[str, Any], topic: str, messages: list[Message], progress: Callable[[str], None] = print
) -> list[Delivered]:
    """Publish the messages and return where each one is, in the order given.

    :param client: configuration of the Kafka client; ``bootstrap.servers`` at least.
    :raises SourceUnavailableError: when any message was not confirmed; publishing again publishes all of them again.
    """
    from confluent_kafka import KafkaError, Producer
    from confluent_kafka import Message as Report

    places: dict[str, Delivered] = {}
    failures: list[str] = []

    def confirm(message: Message, error: KafkaError | None, report: Report) -> None:
        if error is not None:
            failures.append(f"{message.biopsy_id}: {error}")
        else:
            places[message.biopsy_id] = Delivered(
                message, str(report.topic()), int(report.partition() or 0), int(report.offset() or 0)
            )

    producer = Producer({"delivery.timeout.ms": 30_000, "enable.idempotence": True, **client})
    for message in messages:
        producer.produce(
            topic,
            message.value,
            key=message.biopsy_id.encode(),
            headers=[HEADER],
            on_delivery=partial(confirm, message),
        )
        producer.poll(0)
    producer.flush(40)
    if len(places) != len(messages):
        raise SourceUnavailableError(
            f"{len(places)} of {len(messages)} messages were confirmed by {client.get('bootstrap.servers')}: "
            f"{'; '.join(failures[:3]) or 'no answer within 30 s'}. "
            f"Check that the broker runs and takes writes to {topic!r}.",
            confirmed=len(places),
        )
    partitions = {delivered.partition for delivered in places.values()}
    progress(f"{len(places)} messages confirmed on {len(partitions)} topic partitions of {topic!r}")
    return [places[message.biopsy_id] for message in messages]


def write_truth(delivered: list[Delivered], truth: Path, labels: Path) -> None:
    """Write what is known of the messages before anybody reads them.

    :param truth: JSON file with ``spoiled``: topic, partition, offset and kind of every spoiled message.
    :param labels: JSON file, biopsy id → true class of every message; kept apart from the messages.
    """
    spoiled = [
        {"topic": d.topic, "partition": d.partition, "offset": d.offset, "kind": d.message.kind}
        for d in sorted(delivered, key=lambda d: (d.partition, d.offset))
        if d.message.kind
    ]
    for path, content in ((truth, {"spoiled": spoiled}), (labels, true_labels())):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def true_labels() -> dict[str, str]:
    """Return the true class of each unseen biopsy, by its id."""
    return {record["biopsy_id"]: label for record, label in biopsy_records()}


def _message(record: dict[str, Any], kind: str, chance: random.Random) -> Message:
    spoiled = dict(record)
    field = chance.choice(feature_names())
    even = chance.random() < 0.5
    if kind == "missing_field" and even:
        del spoiled[field]
    elif kind == "missing_field":
        spoiled[field] = None
    elif kind == "wrong_type":
        spoiled[field] = str(record[field]) if even else "not measured"
    elif kind == "out_of_range":
        spoiled[field] = -1.0 - record[field] if even else 1000.0 * (1.0 + record[field])
    value = json.dumps(spoiled).encode()
    if kind == "broken_json":
        value = value[: len(value) // 2] if even else value[:-1] + b",}"
    return Message(record["biopsy_id"], value, kind)


def main() -> None:
    """Publish from the command line."""
    parser = argparse.ArgumentParser(description="Publish the unseen biopsies to Kafka, some spoiled on purpose.")
    parser.add_argument("bootstrap", help="host:port of a Kafka broker")
    parser.add_argument("--topic", default="biopsies")
    parser.add_argument("--seed", type=int, default=1, help="chooses which messages are spoiled")
    parser.add_argument("--truth", type=Path, default=Path("build/truth.json"), help="takes where the spoiled ones are")
    parser.add_argument("--labels", type=Path, default=Path("build/labels.json"), help="takes the true classes")
    given = parser.parse_args()
    delivered = publish({"bootstrap.servers": given.bootstrap}, given.topic, make_messages(given.seed))
    write_truth(delivered, given.truth, given.labels)


if __name__ == "__main__":
    main()
