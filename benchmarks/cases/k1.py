"""K1: JSON messages (12 fields, 0.1 % malformed, 1 % invalid, 10 expectations) from a real broker to Parquet.

The limit consumes the same messages and throws them away. Ours is the whole verb ingest (:mod:`benchmarks.ingesting`),
as one task, and in as many shards as there are cores. Airflow's own operator parses each message and writes one Parquet
file per call of its function; it neither validates nor keeps what it cannot parse. It has the same connection as ours
(patched in), and runs once more with the client settings of the limit, which its users would have to find themselves.
"""

from __future__ import annotations

import json
import random
import shutil
import time
import uuid
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from confluent_kafka import Message, Producer

from benchmarks import kafka, readings, servers
from benchmarks.harness import Case, Place, Run

if TYPE_CHECKING:
    from airflow_ai_provider.core.batch import BatchRef
    from airflow_ai_provider.core.ingest.contract import Source, Validator
    from airflow_ai_provider.core.store import Store

TOPIC, PARTITIONS = "readings", 4


def make(place: Place) -> None:
    """Start a broker and produce the messages."""
    bootstrap = servers.start(place.folder, "kafka")["kafka"]
    kafka.create_topic(bootstrap, TOPIC, PARTITIONS)
    producer = Producer({**kafka.PRODUCER, "bootstrap.servers": bootstrap})
    failures: list[Any] = []
    for i, payload in enumerate(readings.payloads(place.size)):
        while True:
            try:
                producer.produce(
                    TOPIC,
                    payload,
                    key=b"%d" % i,
                    partition=i % PARTITIONS,
                    on_delivery=lambda e, _: e and failures.append(e),
                )
                break
            except BufferError:
                producer.poll(0.1)
        producer.poll(0)
    assert producer.flush(120) == 0
    assert not failures


def open_limit(place: Place) -> Run:
    """Consume and discard."""

    def run() -> None:
        assert sum(map(len, kafka.messages(place, TOPIC, PARTITIONS))) == place.size

    return run


def open_source(found: dict[str, str]) -> Source:
    from airflow_ai_provider.core.ingest.kafka import KafkaReader

    return KafkaReader({"bootstrap.servers": found["kafka"]}, TOPIC, key="reading_id")


def open_validator() -> Validator:
    from airflow_ai_provider.core.ingest.validate import GxValidator

    return GxValidator(readings.SUITE)


def open_ours(place: Place) -> Run:
    """Ingest one span, as one task does."""
    from benchmarks import ingesting

    return ingesting.open_one(place, open_source, open_validator)


def open_sharded(place: Place) -> Run:
    """The same in shards."""
    from benchmarks import ingesting

    return ingesting.open_sharded(place, open_source, open_validator)


def open_operator(place: Place) -> Run:
    """Airflow's ConsumeFromTopicOperator as people use it, over json.loads and one file per thousand messages."""
    return _open_operator(place, {"enable.auto.commit": False})


def open_tuned(place: Place) -> Run:
    """The same with the limit's client settings."""
    return _open_operator(place, kafka.TUNED)


def _open_operator(place: Place, client: dict[str, Any]) -> Run:
    from unittest import mock

    from airflow.providers.apache.kafka.hooks.consume import KafkaConsumerHook
    from airflow.providers.apache.kafka.operators.consume import ConsumeFromTopicOperator
    from airflow.sdk import Connection

    folder = place.folder / "operator"
    bootstrap = servers.addresses(place.folder)["kafka"]

    def write(messages: list[Message]) -> None:
        rows = []
        for message in messages:
            try:
                row = json.loads(message.value())  # type: ignore[arg-type]
            except ValueError:
                continue  # malformed: most people log it and go on
            row["_partition"], row["_offset"] = message.partition(), message.offset()
            row["_timestamp"] = message.timestamp()[1]
            rows.append(row)
        name = f"{messages[0].partition()}-{messages[0].offset()}.parquet"
        pq.write_table(pa.Table.from_pylist(rows), folder / name)

    def run() -> float:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        settings = {**client, "auto.offset.reset": "earliest", "group.id": uuid.uuid4().hex}
        connection = Connection(
            conn_id="kafka_default", conn_type="kafka", extra=json.dumps({**settings, "bootstrap.servers": bootstrap})
        )
        with mock.patch.object(KafkaConsumerHook, "get_connection", return_value=connection):
            operator = ConsumeFromTopicOperator(
                task_id="consume", topics=[TOPIC], apply_function_batch=write, max_messages=place.size
            )
            started = time.perf_counter()
            operator.execute({})
            return time.perf_counter() - started

    return run


def check(place: Place) -> None:
    """Ours accounts for each message, with its bytes or its values; the operator has what can be parsed."""
    from benchmarks import ingesting

    for ref, store in ingesting.landed(place):
        _check_ours(place, ref, store)
    theirs = pa.concat_tables(
        [pq.read_table(p) for p in (place.folder / "operator").iterdir()], promote_options="default"
    )
    parsed = pa.array([i for i in range(place.size) if not readings.is_broken(i)], pa.int64())
    assert theirs["sequence"].combine_chunks().sort().equals(parsed)
    assert pc.sum(theirs["_offset"]).as_py() == sum(i // PARTITIONS for i in parsed.to_pylist())


def _check_ours(place: Place, ref: BatchRef, store: Store) -> None:
    bad = {i for i in range(place.size) if readings.is_broken(i) or readings.is_invalid(i)}
    assert ref.counts == {"read": place.size, "accepted": place.size - len(bad), "quarantined": len(bad)}, ref.counts
    ours = pa.concat_tables(store.read(ref, "accepted")).sort_by("sequence")
    chance = random.Random(1)
    good = [row for i in range(place.size) if (row := readings.reading(i, chance)) and i not in bad]
    for name, kind in readings.SCHEMA.items():
        wanted = pa.array([row[name] for row in good])
        if kind == "timestamp":
            wanted = wanted.cast(pa.timestamp("us", tz="UTC"))
        assert ours[name].combine_chunks().equals(wanted.cast(ours[name].type)), name
    at = pa.array([i // PARTITIONS for i in range(place.size) if i not in bad], pa.int64())
    assert ours["_offset"].combine_chunks().equals(at)
    messages = list(readings.payloads(place.size))
    for part in store.read(ref, "quarantine"):
        for row in part.to_pylist():
            i = row["_offset"] * PARTITIONS + row["_partition"]
            assert (i in bad, row["_payload"]) == (True, messages[i])
            assert row["_stage"] == ("decode" if readings.is_broken(i) else "validate")
            assert len(row["_reasons"]) == (2 if i // readings.INVALID % 5 in (1, 4) and readings.is_invalid(i) else 1)


CASE = Case(
    title="JSON messages from a real broker to Parquet, malformed and invalid ones split off with reasons",
    unit="messages/s",
    sizes=(1_000_000, 50_000),
    size_unit="messages",
    goal="≥ 0.30 of the limit, ≥ 5 times Airflow's operator",
    make=make,
    check=check,
    contenders={
        "limit": open_limit,
        "ours": open_ours,
        "ours, two shards": open_sharded,
        "ConsumeFromTopicOperator": open_operator,
        "the same, client tuned": open_tuned,
    },
    packages=(
        "confluent-kafka",
        "pyarrow",
        "msgspec",
        "great-expectations",
        "apache-airflow",
        "apache-airflow-providers-apache-kafka",
    ),
)
