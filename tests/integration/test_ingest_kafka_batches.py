"""Batches from a real broker: with expectations, limits, crashes and shards, over deletions and growth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest

from airflow_ai_provider.core.batch import ACCEPTED, QUARANTINE, Span
from airflow_ai_provider.core.ingest import shard
from airflow_ai_provider.core.ingest.contract import AcceptAll
from airflow_ai_provider.core.ingest.flow import Ingest, IngestRun, ingest, plan_shards
from airflow_ai_provider.core.ingest.kafka import KafkaReader
from airflow_ai_provider.core.ingest.limit import Limit
from airflow_ai_provider.core.ingest.shard import ShardRef
from airflow_ai_provider.core.ingest.validate import GxValidator
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.errors import CorruptBatchError, SourceError
from airflow_ai_provider.testing import MemoryLedger

if TYPE_CHECKING:
    from tests.servers.kafka import KafkaBroker
from tests.integration.topics import Topic, grow, rows

pytestmark = pytest.mark.integration


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
