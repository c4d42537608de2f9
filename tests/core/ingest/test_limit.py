"""Limits: what is written becomes numbers or an error, and a span within them, of files and of a topic."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Producer

from airflow_ai_provider.core.batch import Span
from airflow_ai_provider.core.ingest.files import FileReader
from airflow_ai_provider.core.ingest.kafka import KafkaReader
from airflow_ai_provider.core.ingest.limit import Limit, Limits, plan_within
from airflow_ai_provider.errors import SpecError
from airflow_ai_provider.testing import MemorySource
from tests.servers.mock_kafka import mock_cluster

NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ({}, Limit()),
        ({"rows": "0", "bytes": "", "until": "None"}, Limit()),
        ({"rows": "12", "bytes": 1000}, Limit(12, 1000)),
        ({"bytes": "1.5MB"}, Limit(bytes=1_500_000)),
        ({"bytes": "2GiB"}, Limit(bytes=2 << 30)),
        ({"bytes": "10 kb"}, Limit(bytes=10_000)),
        ({"until": "1h30m"}, Limit(until=NOW - timedelta(minutes=90))),
        ({"until": timedelta(seconds=5)}, Limit(until=NOW - timedelta(seconds=5))),
        ({"until": "2026-01-31T10:00:00+02:00"}, Limit(until=datetime(2026, 1, 31, 8, tzinfo=UTC))),
        ({"until": "2026-01-31"}, Limit(until=datetime(2026, 1, 31, tzinfo=UTC))),
        ({"until": NOW}, Limit(until=NOW)),
    ],
)
def test_what_is_written_becomes_numbers(written: dict[str, Any], read: Limit) -> None:
    assert Limits.of(written).read(NOW) == read
    assert Limits(**written).read(NOW) == read


@pytest.mark.parametrize(
    ("written", "place"),
    [
        ({"rows": -1}, "limits.rows"),
        ({"rows": True}, "limits.rows"),
        ({"rows": "many"}, "limits.rows"),
        ({"bytes": "lots"}, "limits.bytes"),
        ({"bytes": "-5MB"}, "limits.bytes"),
        ({"until": "tomorrow"}, "limits.until"),
        ({"until": "999999w"}, "limits.until"),
        ({"until": datetime(2026, 1, 1)}, "limits.until"),  # it has no zone
        ({"lines": 3}, "limits"),
    ],
)
def test_what_cannot_be_read_is_an_error_that_names_it(written: dict[str, Any], place: str) -> None:
    with pytest.raises(SpecError) as caught:
        Limits.of(written).read(NOW)
    assert caught.value.faults[0][0] == place


def test_files_count_whole_and_the_first_is_always_taken(tmp_path: Path) -> None:
    for name, size in (("a", 30), ("b", 10), ("c", 10)):
        (tmp_path / f"{name}.jsonl").write_bytes(b'{"n": 1}\n' * size)
    reader = FileReader(str(tmp_path))

    def taken(**limits: Any) -> str:
        span = plan_within(reader, {}, {}, None, Limit(**limits))
        return "".join(s.partition[0] for s in span.slices)

    assert [taken(bytes=n) for n in (1, 350, 360, 10_000)] == ["a", "a", "ab", "abc"]
    assert taken(bytes=10_000, rows=35) == "a"
    with pytest.raises(SpecError, match="files have no time of arrival"):
        taken(until=NOW)


def test_bytes_of_a_topic_are_estimated_and_the_rest_waits() -> None:
    payloads = [json.dumps({"n": n, "pad": "x" * 80}).encode() for n in range(1000)]
    topic = MemorySource({0: payloads[:800], 1: payloads[800:]}, chunk=50)
    size = sum(map(len, payloads)) / 1000
    span = plan_within(topic, {}, {}, None, Limit(bytes=int(300 * size)))
    taken = sum(s.end - s.first for s in span.slices)
    assert 280 <= taken <= 320
    assert {s.partition for s in span.slices} == {"0", "1"}, "evenly: no topic partition waits for another"
    assert sum(s.end - s.first for s in plan_within(topic, {}, {}, None, Limit(7, int(300 * size))).slices) == 7
    assert sum(s.end - s.first for s in plan_within(topic, {}, {}, None, Limit(bytes=1)).slices) == 1


@pytest.fixture(scope="module")
def kafka() -> Iterator[str]:
    with mock_cluster() as bootstrap:
        yield bootstrap


def test_bytes_of_a_real_client_are_estimated_too(kafka: str) -> None:
    producer = Producer({"bootstrap.servers": kafka})
    for n in range(6000):
        producer.produce("sized", b"x" * (100 if n < 3000 else 300), partition=n % 3)
    assert producer.flush(60) == 0
    reader = KafkaReader({"bootstrap.servers": kafka}, "sized")
    began = time.monotonic()
    span: Span = plan_within(reader, {}, {}, None, Limit(bytes=200_000))
    reader.close()
    taken = sum(s.end - s.first for s in span.slices)
    assert 700 <= taken <= 1300, f"a mean of 200 bytes gives 1000 offsets, not {taken}"
    assert time.monotonic() - began < 60
