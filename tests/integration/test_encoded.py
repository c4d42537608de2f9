"""Avro and Protobuf topics through the verb ingest: a real broker and registry, the operator's way and a retry's."""

from __future__ import annotations

import io
import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fastavro
import pyarrow as pa
import pytest
from confluent_kafka import Producer

from airflow_ai_provider.core.ingest.contract import AcceptAll
from airflow_ai_provider.core.ingest.encoded.protobuf.schema import ProtoFile
from airflow_ai_provider.core.ingest.encoded.registry import SchemaRegistry, Schemas
from airflow_ai_provider.core.ingest.encoded.source import open_encoded
from airflow_ai_provider.core.ingest.flow import IngestRun, ingest
from airflow_ai_provider.core.ingest.source import KafkaSource, open_source
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.errors import RegistryUnavailableError, SpecError
from airflow_ai_provider.testing import MemoryLedger, MemorySource
from airflow_ai_provider.testing.registry import MemorySchemas

if TYPE_CHECKING:
    from tests.servers.kafka import KafkaBroker
    from tests.servers.registry import SchemaRegistryServer

ROW = {
    "type": "record",
    "name": "Row",
    "fields": [{"name": "id", "type": "string"}, {"name": "size", "type": "int"}],
}
RUN = IngestRun("p", "run", "run/ingest")


def framed(number: int, value: dict[str, Any], schema: dict[str, Any] = ROW) -> bytes:
    sink = io.BytesIO()
    fastavro.schemaless_writer(sink, fastavro.parse_schema(schema), value)
    return b"\0" + number.to_bytes(4, "big") + sink.getvalue()


def produce(broker: KafkaBroker, topic: str, payloads: list[bytes | None]) -> None:
    producer = Producer({"bootstrap.servers": broker.bootstrap})
    for i, payload in enumerate(payloads):
        producer.produce(topic, payload, partition=i % 2)
    assert producer.flush(30) == 0


def rows_of(store: Store, ref: Any, table: str) -> list[dict[str, Any]]:
    return [row for part in store.read(ref, table) for row in part.to_pylist()]


@pytest.mark.integration
def test_an_avro_topic_is_landed_with_its_schemas(
    kafka_broker: KafkaBroker, schema_registry: SchemaRegistryServer, tmp_path: Path
) -> None:
    topic = kafka_broker.create_topic(f"avro-{uuid.uuid4().hex[:8]}", partitions=2)
    number = schema_registry.register(f"{topic}-value", ROW)
    wider = {**ROW, "fields": [*ROW["fields"], {"name": "note", "type": ["null", "string"], "default": None}]}  # type: ignore[misc]
    newer = schema_registry.register(f"{topic}-value", wider)
    good = [framed(number, {"id": f"r{i}", "size": i}) for i in range(20)]
    bad: list[bytes | None] = [b"junk", good[0][:-1], good[0] + b"\0", None, framed(10**6, {"id": "x", "size": 1})]
    produce(kafka_broker, topic, [*good, *bad, framed(newer, {"id": "new", "size": 7, "note": "n"}, wider)])
    value = KafkaSource(topic, key="id", format="avro")
    schemas = SchemaRegistry(schema_registry.url, subject=f"{topic}-value")
    source = open_source(value, kafka_config={"bootstrap.servers": kafka_broker.bootstrap}, schemas=schemas)
    store = Store(f"file://{tmp_path}")
    ref = ingest(source, AcceptAll(), store, MemoryLedger(), RUN)
    assert ref.counts == {"read": 26, "accepted": 21, "quarantined": 5}
    accepted = {row["id"]: row for row in rows_of(store, ref, "accepted")}
    assert accepted["r7"]["size"] == 7
    assert accepted["r7"]["_schema_id"] == number
    assert (accepted["new"]["note"], accepted["new"]["_schema_id"]) == ("n", newer)
    assert accepted["r7"]["_row_id"].startswith(topic)
    rejected = rows_of(store, ref, "quarantine")
    assert {row["_payload"] for row in rejected} == set(bad)
    facts = store.manifest(ref).facts
    assert facts["reasons"] == {"broken_avro": 3, "tombstone": 1, "unknown_schema": 1}
    assert facts["columns"] == {"id": "string", "size": "int64", "note": "string"}
    assert [(f["id"], f["subject"], f["version"]) for f in facts["schemas"]] == [
        (number, f"{topic}-value", 1),
        (newer, f"{topic}-value", 2),
    ]


@pytest.mark.integration
def test_a_topic_of_framed_json_is_landed_with_its_schemas(
    kafka_broker: KafkaBroker, schema_registry: SchemaRegistryServer, tmp_path: Path
) -> None:
    topic = kafka_broker.create_topic(f"json-{uuid.uuid4().hex[:8]}", partitions=2)
    text = json.dumps({"type": "object", "properties": {"id": {"type": "string"}}})
    number = schema_registry.register(f"{topic}-value", text, "JSON")
    heads = {n: b"\0" + n.to_bytes(4, "big") for n in (number, 10**6)}
    good = [heads[number] + b'{"id":"r%d","size":%d}' % (i, i) for i in range(6)]
    bad = [heads[10**6] + b"{}", b'{"id":"bare"}']
    produce(kafka_broker, topic, [*good, *bad])
    source = open_source(
        KafkaSource(topic, key="id", format="json_schema"),
        kafka_config={"bootstrap.servers": kafka_broker.bootstrap},
        schemas=SchemaRegistry(schema_registry.url, subject=f"{topic}-value"),
    )
    store = Store(f"file://{tmp_path}")
    ref = ingest(source, AcceptAll(), store, MemoryLedger(), RUN)
    accepted = rows_of(store, ref, "accepted")
    assert sorted((row["id"], row["size"], row["_schema_id"]) for row in accepted) == [
        (f"r{i}", i, number) for i in range(6)
    ]
    assert {row["_payload"] for row in rows_of(store, ref, "quarantine")} == set(bad)
    facts = store.manifest(ref).facts
    assert facts["reasons"] == {"broken_json": 1, "unknown_schema": 1}
    assert facts["schemas"] == [{"id": number, "type": "JSON", "subject": f"{topic}-value", "version": 1}]


@pytest.mark.integration
def test_a_protobuf_topic_is_landed(
    kafka_broker: KafkaBroker, schema_registry: SchemaRegistryServer, tmp_path: Path
) -> None:
    topic = kafka_broker.create_topic(f"proto-{uuid.uuid4().hex[:8]}", partitions=2)
    text = 'syntax = "proto3"; message Row { string id = 1; int64 size = 2; }'
    number = schema_registry.register(f"{topic}-value", text, "PROTOBUF")
    make = ProtoFile(text, {}).named("Row")
    head = b"\0" + number.to_bytes(4, "big") + b"\0"
    good = [head + make(id=f"r{i}", size=i).SerializeToString() for i in range(6)]
    produce(kafka_broker, topic, [*good, head + b"\x0a\x05x"])
    source = open_source(
        KafkaSource(topic, format="protobuf"),
        kafka_config={"bootstrap.servers": kafka_broker.bootstrap},
        schemas=SchemaRegistry(schema_registry.url),
    )
    store = Store(f"file://{tmp_path}")
    ref = ingest(source, AcceptAll(), store, MemoryLedger(), RUN)
    assert sorted(row["size"] for row in rows_of(store, ref, "accepted")) == list(range(6))
    assert [row["_reasons"][0].partition(":")[0] for row in rows_of(store, ref, "quarantine")] == ["broken_protobuf"]


@pytest.fixture
def topic() -> Callable[[int, MemorySchemas], MemorySource]:
    """Makes a topic in memory that gives its rows in pieces of a size: rows of two schemas, some bad."""
    wider = {**ROW, "fields": [*ROW["fields"], {"name": "note", "type": "string"}]}  # type: ignore[misc]

    def make(chunk: int, schemas: MemorySchemas) -> MemorySource:
        one, two = schemas.add("t-value", ROW), schemas.add("t-value", wider)
        rows = [{"id": str(i), "size": i, "note": "n"} for i in range(400)]
        payloads: list[bytes | None] = [
            framed(two, row, wider) if i % 3 == 2 else framed(one, row) for i, row in enumerate(rows)
        ]
        payloads[100], payloads[399], payloads[0] = b"?", None, payloads[0][:-1]  # type: ignore[index]
        return MemorySource({0: payloads}, chunk=chunk)

    return make


def test_the_same_rows_give_the_same_bytes_however_they_came(
    topic: Callable[[int, MemorySchemas], MemorySource], tmp_path: Path
) -> None:
    """A retry gets its messages in other pieces; the batch must not show it."""
    digests = []
    for chunk in (7, 1000):
        schemas = MemorySchemas()
        source = open_encoded(topic(chunk, schemas), "avro", schemas)
        digests.append(ingest(source, AcceptAll(), Store(f"file://{tmp_path}/{chunk}"), MemoryLedger(), RUN).digest)
    assert digests[0] == digests[1]


def test_a_registry_that_is_down_leaves_the_claim_for_the_retry(
    topic: Callable[[int, MemorySchemas], MemorySource], tmp_path: Path
) -> None:
    schemas, ledger, store = MemorySchemas(), MemoryLedger(), Store(f"file://{tmp_path}")
    rows = topic(1000, schemas)
    schemas.is_down = True
    with pytest.raises(RegistryUnavailableError):
        ingest(open_encoded(rows, "avro", schemas), AcceptAll(), store, ledger, RUN)
    schemas.is_down = False
    ref = ingest(open_encoded(rows, "avro", schemas), AcceptAll(), store, ledger, RUN)
    assert ref.counts == {"read": 400, "accepted": 397, "quarantined": 3}


@pytest.mark.parametrize("format", ["avro", "protobuf"])
def test_a_reader_schema_with_a_fault_fails_before_anything_is_claimed(format: str) -> None:
    with pytest.raises(SpecError, match="the reader schema cannot be used"):
        open_encoded(MemorySource({0: []}), format, MemorySchemas(), "{")


def test_a_format_that_needs_a_registry_says_so() -> None:
    with pytest.raises(SpecError, match="needs a schema registry"):
        open_source(KafkaSource("t", format="avro"), kafka_config={"bootstrap.servers": "127.0.0.1:1"})


@pytest.mark.integration
def test_the_operators_way_from_connections(
    kafka_broker: KafkaBroker, schema_registry: SchemaRegistryServer, monkeypatch: pytest.MonkeyPatch, airflow_db: None
) -> None:
    from airflow_ai_provider.operators.source import open_reader
    from airflow_ai_provider.run import Run

    topic = kafka_broker.create_topic(f"avro-{uuid.uuid4().hex[:8]}", partitions=2)
    number = schema_registry.register(f"{topic}-value", ROW)
    other = schema_registry.register(f"{topic}-other", {**ROW, "fields": [{"name": "total", "type": "int"}]})
    produce(kafka_broker, topic, [framed(number, {"id": "a", "size": 1}), b"\0" + other.to_bytes(4, "big") + b"\x02"])
    kafka = {"conn_type": "kafka", "extra": {"bootstrap.servers": kafka_broker.bootstrap}}
    registry = {"conn_type": "schema_registry", "host": schema_registry.url.replace(f":{schema_registry.port}", "")}
    monkeypatch.setenv("AIRFLOW_CONN_KAFKA_DEFAULT", json.dumps(kafka))
    monkeypatch.setenv("AIRFLOW_CONN_SCHEMA_REGISTRY_DEFAULT", json.dumps({**registry, "port": schema_registry.port}))
    reader = open_reader(KafkaSource(topic, format="avro"), ("id", "size"), Run("p", "r1", "r1/ingest", "manual"))
    table = pa.concat_tables(reader.read(reader.plan({}, {}, None, None)), promote_options="default")
    reader.close()
    assert table["id"].to_pylist() == ["a", None]
    assert "none of its fields (total) is a column of the expectations" in table["_fault"].to_pylist()[1]
    assert isinstance(reader.facts["schemas"], list)  # type: ignore[attr-defined]


def test_the_fake_is_a_registry() -> None:
    held: Schemas = MemorySchemas()
    assert held.schema(1) is None
