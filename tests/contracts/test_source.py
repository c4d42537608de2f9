"""The contract of a Source, over the fake, files (local, in memory, on S3) and a real Kafka topic."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import fsspec
import pyarrow as pa
import pytest
from confluent_kafka import Producer

from airflow_ai_provider.core.batch import Span
from airflow_ai_provider.core.ingest.contract import FAULT, ORIGIN, PAYLOAD, Source
from airflow_ai_provider.core.ingest.files import FileReader
from airflow_ai_provider.core.ingest.kafka import KafkaReader
from airflow_ai_provider.testing import MemorySource

if TYPE_CHECKING:
    from tests.servers.kafka import KafkaBroker
    from tests.servers.s3 import S3Server

_numbers = itertools.count(1)


@dataclass
class Stand:
    """A source with some rows, and the way to add more."""

    open: Callable[[], Source]
    add: Callable[[list[bytes]], None]


def memory(tmp_path: Path, request: pytest.FixtureRequest) -> Stand:
    topic = MemorySource({0: [], 1: []}, chunk=2)

    def add(payloads: list[bytes]) -> None:
        for number, payload in enumerate(payloads):
            topic.add(number % 2, payload)

    return Stand(lambda: topic, add)


def files(tmp_path: Path, request: pytest.FixtureRequest) -> Stand:
    def add(payloads: list[bytes]) -> None:
        for payload in payloads:
            (tmp_path / f"{next(_numbers):03d}.jsonl").write_bytes(payload + b"\n")

    return Stand(lambda: FileReader(str(tmp_path)), add)


def memory_files(tmp_path: Path, request: pytest.FixtureRequest) -> Stand:
    folder = f"/contract-{next(_numbers)}"
    memory = fsspec.filesystem("memory")

    def add(payloads: list[bytes]) -> None:
        for payload in payloads:
            memory.pipe_file(f"{folder}/{next(_numbers):03d}.jsonl", payload + b"\n")

    return Stand(lambda: FileReader(f"memory://{folder}/*.jsonl"), add)


def s3(tmp_path: Path, request: pytest.FixtureRequest) -> Stand:
    server: S3Server = request.getfixturevalue("s3_server")
    bucket = f"contract-{next(_numbers)}"
    files = server.bucket(bucket)

    def add(payloads: list[bytes]) -> None:
        for payload in payloads:
            files.pipe_file(f"{bucket}/in/{next(_numbers):03d}.jsonl", payload + b"\n")

    return Stand(lambda: FileReader(f"s3://{bucket}/in", storage_options=server.options), add)


def kafka(tmp_path: Path, request: pytest.FixtureRequest) -> Stand:
    broker: KafkaBroker = request.getfixturevalue("kafka_broker")
    topic = broker.create_topic(f"contract-{next(_numbers)}", partitions=2)

    def add(payloads: list[bytes]) -> None:
        producer = Producer({"bootstrap.servers": broker.bootstrap})
        for number, payload in enumerate(payloads):
            producer.produce(topic, payload, partition=number % 2)
        assert producer.flush(20) == 0

    return Stand(lambda: KafkaReader({"bootstrap.servers": broker.bootstrap}, topic), add)


def mock_kafka(tmp_path: Path, request: pytest.FixtureRequest) -> Stand:
    address: str = request.getfixturevalue("mock_kafka")
    topic = f"contract-{next(_numbers)}"

    def add(payloads: list[bytes]) -> None:
        producer = Producer({"bootstrap.servers": address})
        for number, payload in enumerate(payloads):
            producer.produce(topic, payload, partition=number % 2)
        assert producer.flush(20) == 0

    return Stand(lambda: KafkaReader({"bootstrap.servers": address}, topic), add)


@pytest.fixture(
    params=[
        memory,
        files,
        memory_files,
        pytest.param(s3, marks=pytest.mark.integration),
        pytest.param(kafka, marks=pytest.mark.integration),
        pytest.param(mock_kafka, marks=pytest.mark.integration),
    ],
    ids=lambda make: make.__name__,
)
def stand(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stand]:
    made: Stand = request.param(tmp_path, request)
    made.add([json.dumps({"n": n}).encode() for n in range(7)])
    yield made
    made.open().close()


def read(source: Source, span: Span) -> pa.Table:
    return pa.concat_tables(list(source.read(span)))


def position_after(span: Span) -> tuple[dict[str, int], dict[str, str]]:
    """What the ledger says once a span is claimed."""
    return {s.partition: s.end for s in span.slices}, {s.partition: s.digest for s in span.slices}


def numbers(table: pa.Table) -> list[int]:
    return sorted(json.loads(payload)["n"] for payload in table[PAYLOAD].to_pylist())


def test_a_span_is_every_row_once_with_id_and_origin(stand: Stand) -> None:
    source = stand.open()
    table = read(source, source.plan({}, {}, None, None))
    assert numbers(table) == list(range(7))
    assert len(set(table["_row_id"].to_pylist())) == 7
    assert table.schema.field("_row_id").type == pa.string()
    assert table.schema.field(PAYLOAD).type == pa.binary()
    assert set(table.column_names) <= {"_row_id", PAYLOAD, FAULT, *ORIGIN}


def test_a_span_is_read_the_same_every_time_by_anybody(stand: Stand) -> None:
    source = stand.open()
    span = source.plan({}, {}, None, None)
    first = read(source, span)
    stand.add([b'{"n":7}', b'{"n":8}'])
    carried = Span.from_dict(json.loads(json.dumps(span.to_dict())))
    assert carried.slices == span.slices
    source.close()
    again = stand.open()
    assert read(again, carried).equals(first)
    assert read(again, carried).equals(first)


def test_the_next_span_holds_what_came_since_and_an_empty_one_nothing(stand: Stand) -> None:
    source = stand.open()
    span = source.plan({}, {}, None, None)
    position, taken = position_after(span)
    assert source.plan(position, taken, None, None).is_empty
    stand.add([b'{"n":7}', b'{"n":8}', b'{"n":9}'])
    later = source.plan(position, taken, None, None)
    assert numbers(read(source, later)) == [7, 8, 9]
    assert later.batch_id != span.batch_id


def test_row_limits_walk_through_the_source_without_a_gap(stand: Stand) -> None:
    source = stand.open()
    position: dict[str, int] = {}
    taken: dict[str, str] = {}
    seen: list[int] = []
    for _ in range(10):
        span = source.plan(position, taken, None, 2)
        if span.is_empty:
            break
        found = numbers(read(source, span))
        assert 0 < len(found) <= 2
        seen += found
        ends, digests = position_after(span)
        position, taken = {**position, **ends}, {**taken, **digests}
    assert sorted(seen) == list(range(7))


def test_names_slices_and_identity_are_stable(stand: Stand) -> None:
    source = stand.open()
    span = source.plan({}, {}, None, None)
    assert span.source == source.name
    assert span.identity == source.identity() == stand.open().identity()
    assert span.slices == tuple(sorted(span.slices))
    assert span.slices == stand.open().plan({}, {}, None, None).slices
    assert source.format == "json"


def test_commit_never_raises_and_close_may_be_called_twice(stand: Stand) -> None:
    source = stand.open()
    span = source.plan({}, {}, None, None)
    source.commit(span)
    source.commit(Span(source.name, span.identity, ()))
    source.close()
    source.close()
