"""A backfill in shards through the operators, on a real broker: windows half-open, rows once, letters once if asked."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from airflow.sdk import DAG
from confluent_kafka import Consumer, Producer, TopicPartition

from airflow_ai_provider import IngestShardOperator, KafkaSource, LandBatchOperator, PlanIngestOperator
from airflow_ai_provider.core.batch import ACCEPTED, BatchRef
from airflow_ai_provider.core.ingest import shard
from airflow_ai_provider.core.ledger_sql import open_ledger
from airflow_ai_provider.core.store import Store

if TYPE_CHECKING:
    from tests.servers.kafka import KafkaBroker

pytestmark = pytest.mark.integration

START = datetime(2026, 11, 1, tzinfo=UTC)


class Backfill:
    """A topic with a row a minute in each of two topic partitions, three hours long; every thirtieth is broken."""

    def __init__(self, broker: KafkaBroker, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.broker = broker
        self.topic, self.dead = broker.create_topic("by-hour", 2), broker.create_topic("by-hour-dead", 1)
        self.config = {"bootstrap.servers": broker.bootstrap, "group.id": "by-hour"}
        self.store, self.url = Store(f"{folder}/store"), f"sqlite:///{folder}/ledger.db"
        for name, extra in (
            ("kafka", self.config),
            ("ai_store", {"uri": self.store.root}),
            ("ai_ledger", {"url": self.url}),
        ):
            monkeypatch.setenv(f"AIRFLOW_CONN_{name.upper()}_DEFAULT", json.dumps({"conn_type": name, "extra": extra}))
        producer = Producer({"bootstrap.servers": broker.bootstrap})
        for minute in range(180):
            for partition in (0, 1):
                row = b"{" if minute % 30 == 29 else json.dumps({"n": 1000 * partition + minute}).encode()
                stamp = int((START + timedelta(minutes=minute)).timestamp() * 1000)
                producer.produce(self.topic, row, partition=partition, timestamp=stamp)
        assert producer.flush(30) == 0

    def run(self, hour: int, run_id: str, **params: Any) -> BatchRef:
        """All tasks of the run of one hour."""
        dag = DAG("p")
        plan = PlanIngestOperator(task_id="plan", dag=dag, source=KafkaSource(self.topic), shards=3)
        refs = plan.execute(self._context(hour, run_id, "plan", **params))
        parts = [
            IngestShardOperator(task_id=f"shard{at}", dag=dag, shard=ref).execute(
                self._context(hour, run_id, "shard", at)
            )
            for at, ref in enumerate(refs)
        ]
        assert len(parts) == 3
        land = LandBatchOperator(task_id="land", dag=dag, parts=parts, dead_letters=self.dead)
        return BatchRef.from_dict(land.execute(self._context(hour, run_id, "land", **params)))

    def rows(self, ref: BatchRef) -> list[int]:
        return [n for part in self.store.read(ref, ACCEPTED) for n in part["n"].to_pylist()]

    def letter_count(self) -> int:
        self.broker.wait_until_stable(self.dead)
        reader = Consumer({**self.config, "group.id": "reader", "enable.partition.eof": True})
        reader.assign([TopicPartition(self.dead, 0, 0)])
        count = 0
        while (message := reader.poll(60)) is not None and message.error() is None:
            count += 1
        assert message is not None, "the broker does not answer"
        reader.close()
        return count

    def _context(self, hour: int, run_id: str, task: str, map_index: int = -1, **params: Any) -> dict[str, Any]:
        start = START + timedelta(hours=hour)
        ends = {"data_interval_start": start, "data_interval_end": start + timedelta(hours=1)}
        dag_run = SimpleNamespace(run_id=run_id, run_type="backfill", logical_date=start, **ends)
        ti = SimpleNamespace(dag_id="p", task_id=task, map_index=map_index, xcom_push=lambda key, value: None)
        return {"ti": ti, "dag_run": dag_run, "params": params}


def test_windows_in_shards_take_each_row_once(
    kafka_broker: KafkaBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard, "SMALLEST_ROWS", 10)
    backfill = Backfill(kafka_broker, tmp_path, monkeypatch)
    found: list[int] = []
    refs = {hour: backfill.run(hour, f"backfill-{hour}") for hour in (2, 0, 1)}
    for hour, ref in refs.items():
        assert ref.counts == {"read": 120, "accepted": 116, "quarantined": 4}
        mine = [n for n in range(60 * hour, 60 * hour + 60) if n % 30 != 29]
        assert backfill.rows(ref) == mine + [1000 + n for n in mine], "the end of a window is the next one's"
        found += backfill.rows(ref)
    assert len(found) == len(set(found)) == 348
    files = {path: path.stat().st_mtime_ns for path in Path(backfill.store.root).rglob("*") if path.is_file()}
    assert backfill.run(1, "backfill-1") == refs[1], "a clear"
    assert backfill.run(1, "again") == refs[1], "another backfill over the same window"
    assert files == {path: path.stat().st_mtime_ns for path in files}
    assert len(open_ledger(backfill.url).claims("p", "landed")) == 3
    assert backfill.letter_count() == 0, "a backfill is muted"
    for _ in range(2):
        assert backfill.run(1, "backfill-1", act_in_backfill=True) == refs[1]
    assert backfill.letter_count() == 4
