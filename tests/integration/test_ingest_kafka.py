"""Reading a real broker: transactions, deletions, deaths, times and growth, each a way to lose or double rows."""

from __future__ import annotations

import json
import logging
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest
from confluent_kafka import Consumer, TopicPartition

from airflow_ai_provider.core.batch import Slice, Span
from airflow_ai_provider.core.ingest import kafka as door
from airflow_ai_provider.core.ingest.kafka import KafkaReader
from airflow_ai_provider.errors import SourceError, SourceUnavailableError

if TYPE_CHECKING:
    from tests.servers.kafka import KafkaBroker
from tests.integration.topics import HANGS_S, SLOW, Topic, everything, grow, read, rows

pytestmark = pytest.mark.integration


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
