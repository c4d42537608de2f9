"""Under a real scheduler, on a real broker: a topic wakes a DAG; a backfill takes the rows of each interval once."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Producer

from airflow_ai_provider.core.batch import ACCEPTED, QUARANTINE
from airflow_ai_provider.core.ledger_sql import open_ledger
from demo.services import stop_all
from tests.integration.installation import AIRFLOW, Installation
from tests.servers.kafka import KafkaBroker

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

START, HOURS, PER_HOUR = datetime(2026, 11, 1, tzinfo=UTC), 2, 20_000
_DAGS = """
from airflow.sdk import DAG, CronDataIntervalTimetable
from airflow_ai_provider import (
    IngestShardOperator, KafkaSource, LandBatchOperator, PlanIngestOperator, ValidatedIngestOperator
)
from airflow_ai_provider.schedule import on_topic
from datetime import datetime, timedelta, timezone

source = KafkaSource("WOKEN")
with DAG("woken", schedule=on_topic(source, sweep=None, every=timedelta(seconds=1)), max_active_runs=1):
    ValidatedIngestOperator(task_id="ingest", source=source)

hourly = CronDataIntervalTimetable("@hourly", timezone="UTC")
first = datetime(2026, 11, 1, tzinfo=timezone.utc)
with DAG("hours", schedule=hourly, start_date=first, end_date=first + timedelta(hours=1), catchup=False):
    plan = PlanIngestOperator(task_id="plan", source=KafkaSource("HOURS", key="n"), shards=2)
    shards = IngestShardOperator.partial(task_id="shard").expand(shard=plan.output)
    LandBatchOperator(task_id="land", parts=shards.output)
"""


class Scheduled(Installation):
    """An Airflow with two topics that its DAGs read."""

    def __init__(self, folder: Path, broker: KafkaBroker) -> None:
        self.woken, self.hours = (broker.create_topic(f"scheduled-{name}", 2) for name in ("woken", "hours"))
        dags = _DAGS.replace("WOKEN", self.woken).replace("HOURS", self.hours)
        super().__init__(folder, dags, {"kafka": {"bootstrap.servers": broker.bootstrap, "group.id": "scheduled"}})

    def taken(self, dag: str) -> int:
        """How many rows the landed batches of a DAG have read."""
        manifests = (json.loads(p.read_text()) for p in self.folder.glob(f"store/{dag}/batch/*/manifest.json"))
        return sum(manifest["counts"]["read"] for manifest in manifests)

    def files(self, dag: str) -> dict[Path, tuple[int, bytes]]:
        """Each file of a DAG's batches: when it was written, and its bytes."""
        found = (path for path in (self.folder / "store" / dag).rglob("*") if path.is_file())
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in found}

    def landed(self, dag: str) -> dict[str, Any]:
        """Run id → its batch, of all claims of a DAG."""
        return {claim.run_id: claim.ref for claim in open_ledger(self.ledger).claims(dag)}

    def backfill(self, dag: str, tries: int, *options: str) -> None:
        """Have all hours run by the scheduler, and wait until all of them are through."""
        last = START + timedelta(hours=HOURS - 1)
        span = ["--from-date", START.isoformat(), "--to-date", last.isoformat(), *options]
        self.services.run(f"backfill-{tries}", [AIRFLOW, "backfill", "create", "--dag-id", dag, *span])
        self.services.wait("airflow-scheduler", lambda _: all(self._is_through(dag, run, tries) for run in RUNS), 240)
        self.airflow.end_backfills(dag)

    def _is_through(self, dag: str, run_id: str, tries: int) -> bool:
        tasks = self.airflow.tasks(dag, run_id)
        return self.is_through(dag, run_id) and {task["try_number"] for task in tasks} == {tries}


RUNS = [f"backfill__{(START + timedelta(hours=hour + 1)).isoformat()}" for hour in range(HOURS)]
"""Named by when they were due: the ends of their intervals."""


@pytest.fixture(scope="module")
def installed(kafka_broker: KafkaBroker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scheduled]:
    folder = tmp_path_factory.mktemp("scheduled")
    try:
        made = Scheduled(folder, kafka_broker)
        made.start(["woken", "hours"])
        yield made
    finally:
        stop_all(folder)


def test_a_burst_is_taken_by_runs_that_nobody_triggered(kafka_broker: KafkaBroker, installed: Scheduled) -> None:
    installed.airflow.pause("woken", False)
    producer = Producer({"bootstrap.servers": kafka_broker.bootstrap})
    for number in range(500):
        producer.produce(installed.woken, json.dumps({"n": number}).encode())
    assert producer.flush(60) == 0
    installed.services.wait("airflow-triggerer", lambda _: installed.taken("woken") == 500, 240)
    installed.airflow.pause("woken", True)


def test_a_backfill_in_shards_takes_the_rows_of_each_interval_once(
    kafka_broker: KafkaBroker, installed: Scheduled
) -> None:
    wanted = _fill(kafka_broker, installed.hours)
    installed.airflow.pause("hours", False)
    installed.backfill("hours", 1)
    batches = installed.landed("hours")
    assert sorted(batches) == RUNS
    for hour, run_id in enumerate(RUNS):
        ref = batches[run_id]
        assert ref.counts == {"read": PER_HOUR, "accepted": PER_HOUR - 2, "quarantined": 2}
        kept = [n for part in installed.store.read(ref, ACCEPTED) for n in part["n"].to_pylist()]
        assert len(kept) == len(set(kept))
        assert set(kept) == wanted[hour]
        assert sum(part.num_rows for part in installed.store.read(ref, QUARANTINE)) == 2
        assert {task["map_index"] for task in installed.airflow.tasks("hours", run_id)} == {-1, 0, 1}, "two shards"

    before = installed.files("hours")
    installed.backfill("hours", 2, "--reprocess-behavior", "completed")
    assert installed.landed("hours") == batches
    assert installed.files("hours") == before
    handed_on = [installed.airflow.xcom("hours", run_id, "land") for run_id in RUNS]
    assert handed_on == [batches[run_id].to_dict() for run_id in RUNS]


def _fill(broker: KafkaBroker, topic: str) -> dict[int, set[int]]:
    """Rows of these hours and of one on each side, spread over their time, the first and last at its very ends; two of
    each hour are broken. Return those that are whole, by hour."""
    producer = Producer({"bootstrap.servers": broker.bootstrap, "queue.buffering.max.messages": 1_000_000})
    wanted: dict[int, set[int]] = defaultdict(set)
    for n in range(-PER_HOUR, (HOURS + 1) * PER_HOUR):
        hour, place = divmod(n, PER_HOUR)
        is_broken = place in (7, PER_HOUR - 8)
        at = START + timedelta(hours=hour, milliseconds=place * 3_599_999 // (PER_HOUR - 1))
        row = b"{" if is_broken else json.dumps({"n": n}).encode()
        producer.produce(topic, row, partition=n % 2, timestamp=int(at.timestamp() * 1000))
        if not is_broken:
            wanted[hour].add(n)
    assert producer.flush(60) == 0
    return wanted
