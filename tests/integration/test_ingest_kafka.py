"""Ingest from a real broker: transactions, deletions, deaths, times and growth, each a way to lose or double rows."""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import NewPartitions

from airflow_ai_provider.core.batch import ACCEPTED, QUARANTINE, Slice, Span
from airflow_ai_provider.core.ingest import kafka as door
from airflow_ai_provider.core.ingest import shard
from airflow_ai_provider.core.ingest.contract import AcceptAll
from airflow_ai_provider.core.ingest.flow import Ingest, IngestRun, ingest, plan_shards
from airflow_ai_provider.core.ingest.kafka import KafkaReader
from airflow_ai_provider.core.ingest.limit import Limit
from airflow_ai_provider.core.ingest.shard import ShardRef
from airflow_ai_provider.core.ingest.validate import GxValidator
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.errors import CorruptBatchError, SourceError, SourceUnavailableError
from airflow_ai_provider.testing import MemoryLedger

if TYPE_CHECKING:
    from tests.servers.kafka import KafkaBroker

pytestmark = pytest.mark.integration
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


@pytest.fixture
def topic(kafka_broker: KafkaBroker) -> Topic:
    return Topic(kafka_broker)


def test_markers_and_aborted_records_end_a_span_in_time(topic: Topic) -> None:
    """Offsets that hold no record must neither hang the read nor show."""
    for number in range(3):
        topic.transaction(rows(100, number * 100), "commit").flush()
        topic.transaction(rows(20, 9000), "abort").flush()
    reader = topic.reader(stall_s=HANGS_S)
    span = everything(reader)
    assert span.slices == (Slice("0", 0, 366),)
    began = time.monotonic()
    assert read(reader, span) == list(range(300))
    assert time.monotonic() - began < HANGS_S
    only_aborted = Span(span.source, span.identity, (Slice("0", 101, 121),))
    assert read(topic.reader(), only_aborted) == []
    ends_in_aborted = Span(span.source, span.identity, (Slice("0", 50, 110),))
    assert read(topic.reader(), ends_in_aborted) == list(range(50, 100))


def test_records_behind_an_open_transaction_wait_for_the_next_span(topic: Topic) -> None:
    topic.add(rows(10))
    producer = topic.transaction(rows(5, 100), "leave open")
    topic.add(rows(7, 200))
    reader = topic.reader()
    span = everything(reader)
    assert span.slices == (Slice("0", 0, 10),)
    assert span.facts == {"partitions": 1, "waiting": 12}
    assert read(reader, span) == list(range(10)), "it must not stand until the transaction ends"
    assert topic.reader().plan({"0": 10}, {}, None, None).is_empty, "the transaction is open still"
    producer.commit_transaction(30)
    topic.broker.wait_until_stable(topic.name)
    reader = topic.reader()
    later = reader.plan({"0": 10}, {}, None, None)
    assert later.slices == (Slice("0", 10, 23),)
    assert read(reader, later) == [*range(100, 105), *range(200, 207)]


@pytest.mark.slow
def test_a_compacted_topic_has_fewer_records_than_offsets(kafka_broker: KafkaBroker) -> None:
    config = {"cleanup.policy": "compact", "min.cleanable.dirty.ratio": "0.01", "segment.ms": "100"}
    topic = Topic(kafka_broker, config=config)
    topic.add(rows(50))
    time.sleep(0.2)
    topic.add(rows(1, 50))  # begins a new segment, so that the old one may be compacted
    reader = topic.reader()
    span = everything(reader)
    assert span.slices == (Slice("0", 0, 51),)
    deadline = time.monotonic() + 200
    while len(found := [n for t in reader.read(span) for n in t["_offset"].to_pylist()]) > 2:
        assert time.monotonic() < deadline, "the broker's cleaner comes every 15 s"
        time.sleep(1)
    assert found == [49, 50]
    assert read(reader, Span(span.source, span.identity, (Slice("0", 0, 40),))) == []


def test_deleted_records_are_an_error_that_names_them(topic: Topic) -> None:
    topic.add(rows(100))
    reader = topic.reader()
    span = everything(reader)
    topic.delete_before(40)
    with pytest.raises(SourceError, match=rf"{topic.name}/0 offsets 0 to 39") as caught:
        read(reader, span)
    assert caught.value.missing == {0: (0, 40)}
    with pytest.raises(SourceError, match="offsets 10 to 39"):
        topic.reader().plan({"0": 10}, {}, None, None)
    assert everything(topic.reader()).slices == (Slice("0", 40, 100),), "a new reader begins at the first record"


def test_records_deleted_before_they_were_fetched_are_an_error(kafka_broker: KafkaBroker) -> None:
    topic = Topic(kafka_broker, partitions=3)
    for partition in range(3):
        topic.add(rows(100), partition)
    reader = topic.reader()
    tables = reader.read(everything(reader))
    assert set(next(tables)["_partition"].to_pylist()) == {0}  # 1 is on its way already
    topic.delete_before(60, partition=2)
    with pytest.raises(SourceError, match=rf"{topic.name}/2 .*offsets 0 to 99 cannot be read"):
        list(tables)


def test_records_deleted_behind_the_reader_are_no_loss(topic: Topic) -> None:
    topic.add(rows(100))
    reader = topic.reader()
    tables = reader.read(everything(reader))
    found = next(tables)["_offset"].to_pylist()
    while len(found) < 100:
        found += next(tables)["_offset"].to_pylist()
    topic.delete_before(60)
    assert list(tables) == []
    assert found == list(range(100))


def test_offsets_that_are_not_there_are_an_error_not_a_jump(topic: Topic, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's own answer, should the low watermark not have told before."""
    topic.add(rows(100))
    topic.delete_before(40)
    monkeypatch.setattr(door, "demand_kept", lambda *_, **__: None)
    reader = topic.reader()
    with pytest.raises(SourceError, match="offsets 0 to 99 cannot be read"):
        read(reader, Span(reader.name, reader.identity(), (Slice("0", 0, 100),)))
    with pytest.raises(SourceError, match="offsets 500 to 599 cannot be read"):
        read(reader, Span(reader.name, reader.identity(), (Slice("0", 500, 600),)))


def test_a_topic_made_anew_is_not_read_as_the_old_one(kafka_broker: KafkaBroker) -> None:
    topic = Topic(kafka_broker)
    topic.add(rows(10))
    reader = topic.reader()
    span = everything(reader)
    assert len(span.identity) == 22
    admin = kafka_broker.admin()
    admin.delete_topics([topic.name])[topic.name].result(30)
    deadline = time.monotonic() + 60
    while topic.name in admin.list_topics(timeout=10).topics:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    with pytest.raises(SourceError, match=f"topic {topic.name} .* cannot be read"):
        topic.reader().identity()
    kafka_broker.create_topic(topic.name)
    topic.add(rows(10, 50))
    with pytest.raises(SourceError, match="deleted and made anew"):
        read(topic.reader(), span)
    with pytest.raises(SourceError, match="ends before what was taken"):
        topic.reader().plan({"0": 500}, {}, None, None)
    anew = topic.reader()
    assert read(anew, everything(anew)) == list(range(50, 60))


def test_a_missing_topic_and_a_dead_broker_are_told_apart(
    kafka_broker: KafkaBroker, caplog: pytest.LogCaptureFixture
) -> None:
    reader = KafkaReader({"bootstrap.servers": kafka_broker.bootstrap}, "no-such-topic")
    with pytest.raises(SourceError, match="no-such-topic"):
        reader.plan({}, {}, None, None)
    reader.close()
    dead = KafkaReader({"bootstrap.servers": "127.0.0.1:1"}, "t", deadline_s=2)
    began = time.monotonic()
    caplog.clear()
    with pytest.raises(SourceUnavailableError, match=r"127\.0\.0\.1:1 did not answer .*: Failed to get metadata"):
        dead.identity()
    dead.close()
    said = [record.getMessage().partition("(after")[0] for record in caplog.records]
    assert any("Connection refused" in line for line in said)
    assert len(said) == len(set(said)) <= 4, "what a client says at each of its tries is said once"
    assert time.monotonic() - began < HANGS_S
    assert "no-such-topic" not in kafka_broker.admin().list_topics(timeout=10).topics, "asking creates nothing"


def test_a_paused_broker_stalls_a_plan_and_a_read_until_their_deadlines(topic: Topic) -> None:
    topic.add([b'{"n":%d,"pad":"%s"}' % (n, b"x" * 200) for n in range(50_000)])
    reader = topic.reader(stall_s=2, config=SLOW)
    span = everything(reader)
    tables = reader.read(span)
    next(tables)
    # what the client fetched before is still delivered; the rest never comes
    topic.broker.pause()
    try:
        began = time.monotonic()
        with pytest.raises(SourceUnavailableError, match=topic.broker.bootstrap):
            list(tables)
        assert time.monotonic() - began < HANGS_S
        with pytest.raises(SourceUnavailableError, match=topic.broker.bootstrap):
            topic.reader(deadline_s=1).plan({}, {}, None, None)
    finally:
        topic.broker.resume()
    again = topic.reader()
    assert read(again, span) == list(range(50_000))


def test_a_broker_killed_in_mid_read_loses_and_doubles_nothing(topic: Topic) -> None:
    payload = [json.dumps({"n": n, "pad": "x" * 900}).encode() for n in range(30_000)]
    topic.add(payload)
    reader = topic.reader(config=SLOW)
    span = everything(reader)
    tables = reader.read(span)
    found = [json.loads(p)["n"] for p in next(tables)["_payload"].to_pylist()]
    topic.broker.kill()
    topic.broker.restart()
    found += [json.loads(p)["n"] for t in tables for p in t["_payload"].to_pylist()]
    assert found == list(range(30_000))
    reader.close()


def test_a_window_is_taken_by_arrival(topic: Topic) -> None:
    base = 1_600_000_000_000
    stamps = [0, 10, 5, 20, 15, 30, 20, 20, 40, 1]
    topic.add(rows(10), stamps=[base + s for s in stamps])

    def window(first: int, end: int) -> tuple[Slice, ...]:
        times = [datetime.fromtimestamp((base + ms) / 1000, UTC) for ms in (first, end)]
        return everything(topic.reader(), (times[0], times[1])).slices

    assert window(5, 20) == (Slice("0", 1, 3),)
    assert window(0, 40) == (Slice("0", 0, 8),)
    assert window(31, 99) == (Slice("0", 8, 10),), "past the last stamp: to the last stable offset"
    assert window(41, 99) == ()
    reader = topic.reader()
    table = next(reader.read(everything(reader)))
    assert [int(t.timestamp() * 1000) - base for t in table["_timestamp"].to_pylist()] == stamps
    assert table.select(["_key", "_topic", "_partition", "_offset"]).slice(9).to_pylist() == [
        {"_key": b"k", "_topic": topic.name, "_partition": 0, "_offset": 9}
    ]
    assert table["_row_id"][9].as_py() == f"{topic.name}~{reader.identity()[:8]}/0/9"


def test_new_topic_partitions_begin_at_their_first_record(kafka_broker: KafkaBroker) -> None:
    topic = Topic(kafka_broker, partitions=2)
    topic.add(rows(4))
    first = everything(topic.reader())
    assert first.slices == (Slice("0", 0, 4),)
    grow(topic, 11)
    topic.add(rows(3, 10), partition=10)
    topic.add(rows(2, 20), partition=2)
    reader = topic.reader()
    later = reader.plan({"0": 4}, {}, None, None)
    assert set(later.slices) == {Slice("2", 0, 2), Slice("10", 0, 3)}
    assert later.facts["partitions"] == 11
    assert read(reader, later) == [20, 21, 10, 11, 12]


def test_offsets_are_published_forwards_only_and_a_failure_is_a_warning(
    topic: Topic, caplog: pytest.LogCaptureFixture
) -> None:
    topic.add(rows(20))
    group = f"group-{topic.name}"
    reader = topic.reader(group=group)
    span = everything(reader)
    reader.commit(span)
    reader.commit(Span(span.source, span.identity, (Slice("0", 0, 5),)))
    watcher = Consumer({"bootstrap.servers": topic.broker.bootstrap, "group.id": group})
    assert watcher.committed([TopicPartition(topic.name, 0)], timeout=30)[0].offset == 20
    watcher.subscribe([topic.name])
    deadline = time.monotonic() + 60
    while not watcher.assignment():
        assert time.monotonic() < deadline
        watcher.poll(0.2)
    topic.add(rows(5))
    with caplog.at_level(logging.WARNING):
        topic.reader(group=group).commit(Span(span.source, span.identity, (Slice("0", 20, 25),)))
    assert f"offsets of group {group}" in caplog.text
    assert "UNKNOWN_MEMBER_ID" in caplog.text
    watcher.close()
    topic.broker.pause()
    caplog.clear()
    began = time.monotonic()
    try:
        with caplog.at_level(logging.WARNING):
            topic.reader(group=group, deadline_s=1).commit(span)
    finally:
        topic.broker.resume()
    assert time.monotonic() - began < HANGS_S, "a commit that nobody answers must not hang the task"
    assert "were not published" in caplog.text


SUITE = {
    "name": "numbers",
    "expectations": [
        {"type": "expect_column_values_to_be_of_type", "kwargs": {"column": "n", "type_": "int"}},
        {"type": "expect_column_values_to_be_between", "kwargs": {"column": "n", "min_value": 0, "max_value": 900}},
        {"type": "expect_column_values_to_be_unique", "kwargs": {"column": "n"}},
    ],
}


def test_ingest_from_a_real_broker_with_great_expectations(kafka_broker: KafkaBroker, tmp_path: Path) -> None:
    topic = Topic(kafka_broker, partitions=2)
    evil: list[bytes | None] = [
        b"null",
        b'{"n":1}{"n":2}',
        None,
        b'{"n":"7"}',
        b'{"n":' + b"[" * 10_000,
        b'{"n":-1}',
        b'{"n":3}',
    ]
    topic.add([*rows(500), *evil])
    topic.add(rows(500, 500), partition=1)
    store, ledger, run = Store(str(tmp_path)), MemoryLedger(), IngestRun("p", "r", "k")
    lines: list[str] = []
    ref = ingest(topic.reader(key="n"), GxValidator(SUITE), store, ledger, run, progress=lines.append)
    assert ref.counts == {"read": 1007, "accepted": 900, "quarantined": 107}
    told = {"broken_json": 3, "not_unique": 2, "out_of_range": 100, "tombstone": 1, "wrong_type": 1}
    assert store.manifest(ref).facts["reasons"] == told
    rejected = [r for t in store.read(ref, QUARANTINE) for r in t.to_pylist()]
    assert [r["_payload"] for r in rejected if r["_stage"] == "decode"] == evil[:5]
    accepted = [n for t in store.read(ref, ACCEPTED) for n in t["n"].to_pylist()]
    assert accepted == [n for n in range(901) if n != 3]
    assert "1,007 read" in lines[-1]
    topic.add(rows(1, 2000))
    again = ingest(topic.reader(), AcceptAll(), store, ledger, run)
    assert again == ref
    topic.broker.pause()
    try:
        reader = topic.reader(deadline_s=1)
        assert ingest(reader, AcceptAll(), store, ledger, run) == ref, "a landed span needs no broker"
    finally:
        topic.broker.resume()


def test_a_retry_after_a_crash_reads_the_same_span(topic: Topic, tmp_path: Path) -> None:
    topic.add(rows(1000))
    store, ledger, run = Store(str(tmp_path)), MemoryLedger(), IngestRun("p", "r", "k")

    class Crash(BaseException):
        pass

    dying = topic.reader()
    real = dying.read

    def crash(span: Span) -> Iterator[Any]:
        yield next(real(span)).slice(0, 10)
        raise Crash

    dying.read = crash  # type: ignore[method-assign]
    with pytest.raises(Crash):
        ingest(dying, AcceptAll(), store, ledger, run)
    topic.add(rows(500, 1000))
    ref = ingest(topic.reader(), AcceptAll(), store, ledger, run)
    assert ref.counts["accepted"] == 1000
    after = ingest(topic.reader(), AcceptAll(), store, ledger, IngestRun("p", "r2", "k2"))
    assert after.counts["accepted"] == 500


def test_until_takes_what_is_older_and_the_next_run_the_rest(kafka_broker: KafkaBroker, tmp_path: Path) -> None:
    topic, noon = Topic(kafka_broker, partitions=2), datetime(2026, 1, 31, 12, tzinfo=UTC)
    first = int(noon.timestamp() * 1000)
    topic.add(rows(40), stamps=[first + n * 60_000 for n in range(40)])
    topic.add(rows(2, 100), partition=1, stamps=[first, first + 3 * 86_400_000])
    store, ledger = Store(str(tmp_path)), MemoryLedger()

    def take(key: str, **limits: Any) -> list[int]:
        run = IngestRun("p", key, key, limit=Limit(**limits))
        ref = ingest(topic.reader(), AcceptAll(), store, ledger, run)
        return [n for t in store.read(ref, ACCEPTED) for n in t["n"].to_pylist()]

    assert take("a", until=noon + timedelta(minutes=10)) == [*range(10), 100]
    assert take("b", until=noon + timedelta(minutes=10)) == []
    assert take("c", until=noon + timedelta(minutes=30), rows=5) == [10, 11, 12, 13, 14]
    assert take("a", until=noon) == [*range(10), 100], "a retry takes what it has claimed"
    assert take("d") == [*range(15, 40), 101]
    claim = ledger.claim_of("p", "a")
    assert claim is not None
    assert claim.span.facts["younger"] == 31


def test_shards_of_a_real_topic_with_holes_are_one_batch(kafka_broker: KafkaBroker, tmp_path: Path) -> None:
    topic = Topic(kafka_broker, partitions=3)
    for partition in range(3):
        topic.transaction(rows(7000, 10_000 * partition), "commit", partition)
        topic.transaction(rows(50, 100_000), "abort", partition)
        topic.add(rows(3000, 10_000 * partition + 7000), partition)
    suite = {
        "name": "s",
        "expectations": [
            {"type": "expect_column_values_to_be_of_type", "kwargs": {"column": "n", "type_": "int"}},
            {"type": "expect_column_values_to_be_unique", "kwargs": {"column": "n"}},
        ],
    }
    topic.add([b'{"n": 5}', b"{"], 2)
    store, ledger, run = Store(str(tmp_path)), MemoryLedger(), IngestRun("p", "r", "r/plan")
    with closing(topic.reader()) as reader:
        refs = plan_shards(reader, ledger, run, 8)
    assert len(refs) == 3, "10,000 rows are worth a task"
    done = []
    for ref in refs:
        with closing(topic.reader()) as reader:
            done.append(Ingest(reader, GxValidator(suite), store, ledger, run).shard(ref))
    with closing(topic.reader()) as reader:
        landed = Ingest(reader, GxValidator(suite), store, ledger, run).land(done)
    assert landed.counts == {"read": 30_002, "accepted": 29_999, "quarantined": 3}
    accepted = [n for t in store.read(landed, ACCEPTED) for n in t["n"].to_pylist()]
    assert accepted == [n for n in range(30_000) if n != 5]
    with closing(topic.reader()) as reader:
        assert plan_shards(reader, ledger, IngestRun("p", "r2", "r2/plan"), 8)[0].span is not None, "all is taken"


class Shards:
    """The tasks of a batch in shards, each with a reader of its own."""

    def __init__(self, topic: Topic, folder: Path) -> None:
        self.topic, self.store, self.ledger = topic, Store(str(folder)), MemoryLedger()

    def plan(self, run_key: str, shards: int = 4, window: tuple[datetime, datetime] | None = None) -> list[ShardRef]:
        with mock.patch.object(shard, "SMALLEST_ROWS", 1), closing(self.topic.reader()) as reader:
            return list(plan_shards(reader, self.ledger, IngestRun("p", run_key, run_key, window), shards))

    def do(self, ref: ShardRef) -> ShardRef:
        with closing(self.topic.reader()) as reader:
            return self._work(reader).shard(ref)

    def land(self, refs: Sequence[ShardRef]) -> list[int]:
        with closing(self.topic.reader()) as reader:
            landed = self._work(reader).land(refs)
        return [n for t in self.store.read(landed, ACCEPTED) for n in t["n"].to_pylist()]

    def _work(self, reader: KafkaReader) -> Ingest:
        return Ingest(reader, AcceptAll(), self.store, self.ledger, IngestRun("p", "r", "r"))


def grow(topic: Topic, count: int) -> None:
    admin = topic.broker.admin()
    admin.create_partitions([NewPartitions(topic.name, count)])[topic.name].result(30)
    deadline = time.monotonic() + 60
    while len(admin.list_topics(topic.name, timeout=10).topics[topic.name].partitions) < count:
        assert time.monotonic() < deadline


def test_topic_partitions_that_come_between_plan_and_shards_are_the_next_runs(
    kafka_broker: KafkaBroker, tmp_path: Path
) -> None:
    topic = Topic(kafka_broker, partitions=2)
    tasks = Shards(topic, tmp_path)
    for partition in (0, 1):
        topic.add(rows(10, 100 * partition), partition)
    refs = tasks.plan("first", 3)
    done = [tasks.do(refs[0])]
    grow(topic, 4)
    for partition in (1, 2, 3):  # behind the span, and beside it
        topic.add(rows(6, 1000 + 100 * partition), partition)
    assert tasks.plan("first", 3) == refs, "a retry of the plan has its claim"
    assert tasks.land([*done, *map(tasks.do, refs[1:])]) == [*range(10), *range(100, 110)]
    later = tasks.plan("second", 3)
    assert tasks.land([tasks.do(ref) for ref in later]) == [*range(1100, 1106), *range(1200, 1206), *range(1300, 1306)]
    assert tasks.plan("third")[0].span is not None, "all is taken"


def test_records_deleted_in_one_shards_slice_are_named_and_the_others_keep_their_work(
    kafka_broker: KafkaBroker, tmp_path: Path
) -> None:
    topic = Topic(kafka_broker, partitions=3)
    tasks = Shards(topic, tmp_path)
    topic.add(rows(1), 1)
    tasks.land([tasks.do(ref) for ref in tasks.plan("before")])
    for partition in range(3):
        topic.add(rows(20, 100 * partition), partition)
    refs = tasks.plan("lost", 3)
    done = {0: tasks.do(refs[0]), 2: tasks.do(refs[2])}
    topic.delete_before(15, partition=0)  # what a shard has stored is no loss
    topic.delete_before(8, partition=1)
    for _ in range(2):  # a retry says the same
        with pytest.raises(SourceError, match=rf"{topic.name}/1 offsets 1 to 7\..*release this run's claim") as caught:
            tasks.do(refs[1])
        assert caught.value.missing == {1: (1, 8)}
    with mock.patch.object(KafkaReader, "read", side_effect=AssertionError("nothing is read again")):
        assert {at: tasks.do(refs[at]) for at in done} == done
    with pytest.raises(CorruptBatchError, match="shard 2 of 3 .* is not there"):
        tasks.land([done[0], refs[1], done[2]])
    # the message's way out: give the claim up, and take what is still there by its time
    tasks.ledger.release("p", "lost")
    with pytest.raises(SourceError, match=r"/1 offsets 1 to 7\..*them, backfill"):  # of the others it begins anew
        tasks.plan("next")
    always = (datetime(2020, 1, 1, tzinfo=UTC), datetime.now(UTC) + timedelta(days=1))
    rest = tasks.land([tasks.do(ref) for ref in tasks.plan("backfill", 2, always)])
    assert rest == [*range(15, 20), *range(107, 120), *range(200, 220)]
    topic.add(rows(2, 900), 1)
    assert tasks.land([tasks.do(ref) for ref in tasks.plan("goes on")]) == [900, 901]


def test_a_window_in_shards_is_half_open_and_the_same_run_again_takes_nothing(
    kafka_broker: KafkaBroker, tmp_path: Path
) -> None:
    topic = Topic(kafka_broker, partitions=2)
    tasks = Shards(topic, tmp_path)
    hours = [datetime(2026, 11, 1, hour, tzinfo=UTC) for hour in range(4)]
    stamps = [int(hours[0].timestamp() * 1000) + minute * 60_000 for minute in range(180)]
    for partition in (0, 1):
        topic.add(rows(180, 1000 * partition), partition, stamps)
    taken: dict[int, list[int]] = {}
    for hour in (1, 0, 2, 1):  # as a backfill may order them; the last one is a run of its own over a window again
        window = (hours[hour], hours[hour + 1])
        refs = tasks.plan(f"{hour}-{len(taken)}", 3, window)
        landed = tasks.land([tasks.do(ref) for ref in refs])
        assert landed == taken.setdefault(hour, landed)
        assert tasks.plan(f"{hour}-{len(taken)}", 3, window) == refs
    for hour, found in taken.items():
        first = 60 * hour
        assert found == [*range(first, first + 60), *range(1000 + first, 1060 + first)], "the end is the next one's"
    assert len(tasks.ledger.claims("p", "landed")) == 3
