"""Messages that are text or bytes: one column, exact; what is no UTF-8 keeps its bytes in quarantine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from airflow_ai_provider.core.batch import ACCEPTED, QUARANTINE
from airflow_ai_provider.core.ingest.contract import AcceptAll, Validator
from airflow_ai_provider.core.ingest.encoded.source import open_plain
from airflow_ai_provider.core.ingest.flow import IngestRun, ingest
from airflow_ai_provider.core.ingest.source import KafkaSource, open_source
from airflow_ai_provider.core.ingest.validate import GxValidator
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.testing import MemoryLedger, MemorySource

PAYLOADS = [b"one", b"", "\ufeffzwei \u2028\n".encode(), b"\xff\xfe", None, b"{no json", b"\xc0\x80", b"\xed\xa0\x80"]


def land(
    root: Path, format: str, rules: Validator, payloads: list[bytes | None] = PAYLOADS
) -> tuple[list[Any], list[Any], pa.Schema]:
    store = Store(str(root))
    ref = ingest(
        open_plain(MemorySource({0: payloads}, chunk=3), format), rules, store, MemoryLedger(), IngestRun("p", "r", "k")
    )
    accepted = pa.concat_tables(store.read(ref, ACCEPTED))
    rejected = [row for table in store.read(ref, QUARANTINE) for row in table.to_pylist()]
    assert ref.counts == {"read": len(payloads), "accepted": accepted.num_rows, "quarantined": len(rejected)}
    assert "schemas" not in store.manifest(ref).facts
    told = [(row["_payload"], row["_reasons"][0].partition(":")[0]) for row in rejected]
    return accepted["value"].to_pylist(), told, accepted.schema


def test_text_is_exact_or_in_quarantine_with_its_bytes(tmp_path: Path) -> None:
    values, rejected, schema = land(tmp_path, "text", AcceptAll())
    assert values == ["one", "", "\ufeffzwei \u2028\n", "{no json"]
    assert rejected == [
        (b"\xff\xfe", "broken_text"),
        (None, "tombstone"),
        (b"\xc0\x80", "broken_text"),
        (b"\xed\xa0\x80", "broken_text"),
    ]
    assert schema.field("value").type == pa.string()


def test_bytes_are_taken_as_they_are(tmp_path: Path) -> None:
    values, rejected, schema = land(tmp_path, "bytes", AcceptAll())
    assert values == [payload for payload in PAYLOADS if payload is not None]
    assert rejected == [(None, "tombstone")]
    assert schema.field("value").type == pa.binary()


def test_a_suite_judges_the_column_value(tmp_path: Path) -> None:
    suite = {
        "expectations": [
            {"type": "expect_column_values_to_be_of_type", "kwargs": {"column": "value", "type_": "string"}},
            {"type": "expect_column_value_lengths_to_be_between", "kwargs": {"column": "value", "min_value": 2}},
        ]
    }
    values, rejected, _ = land(tmp_path, "text", GxValidator(suite), [b"a", b"bb", b"\xff", b"ccc"])
    assert values == ["bb", "ccc"]
    assert rejected == [(b"a", "expect_column_value_lengths_to_be_between"), (b"\xff", "broken_text")]


@pytest.mark.parametrize("format", ["text", "bytes"])
def test_a_topic_of_texts_or_bytes_needs_no_registry(mock_kafka: str, format: str) -> None:
    from confluent_kafka import Producer

    producer = Producer({"bootstrap.servers": mock_kafka})
    for payload in (b"one", b"two"):
        producer.produce(f"plain-{format}", payload, partition=0)
    assert producer.flush(20) == 0
    value = KafkaSource(f"plain-{format}", format=format)
    assert not value.has_schemas
    source = open_source(value, kafka_config={"bootstrap.servers": mock_kafka})
    found = pa.concat_tables(source.read(source.plan({}, {}, None, None)))["value"].to_pylist()
    assert found == (["one", "two"] if format == "text" else [b"one", b"two"])
    source.close()
