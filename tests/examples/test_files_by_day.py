"""Files on S3 by day, through ``dag.test()``: each run its own folder, keys by connection, Data Docs behind a link."""

from __future__ import annotations

import json
import shutil
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from airflow_ai_provider.core.batch import ACCEPTED, BatchRef
from airflow_ai_provider.core.store import Store
from tests.examples.conftest import World

if TYPE_CHECKING:
    from tests.servers.s3 import S3Server

pytestmark = [pytest.mark.slow, pytest.mark.integration]
HERE = Path(__file__).with_name("dags")
DAYS = {"2026-05-01": [1.0, 2.0, 99.0], "2026-05-02": [3.0], "2026-05-03": [98.0]}


@pytest.fixture(scope="module")
def store(world: World, s3_server: S3Server) -> Store:
    """Two days of readings in a bucket, and connections that know the way to it."""
    shutil.copytree(HERE, world.own_dags, dirs_exist_ok=True)
    files = s3_server.bucket("by-day")
    for day, values in DAYS.items():
        lines = "".join(json.dumps({"id": f"{day}/{n}", "value": value}) + "\n" for n, value in enumerate(values))
        files.pipe_file(f"by-day/in/day={day}/readings.jsonl", lines.encode())
    keys: dict[str, Any] = {"conn_type": "ai_store", "login": s3_server.key, "password": s3_server.secret}
    place = {"endpoint_url": s3_server.endpoint_url}
    world.define("lake", {**keys, "extra": place})
    world.define("lake_store", {**keys, "extra": {**place, "uri": "s3://by-day/ai"}})
    return Store("s3://by-day/ai", s3_server.options)


def run(world: World, day: str, **more: Any) -> dict[str, Any]:
    """Run for a day: at its end, as the schedule does."""
    end = datetime.fromisoformat(f"{day}T00:00:00+00:00") + timedelta(days=1)
    return world.run("files_by_day", file=str(world.own_dags / "files_by_day.py"), at=end.isoformat(), **more)


def taken(store: Store, ran: dict[str, Any]) -> list[tuple[str, float]]:
    ref = BatchRef.from_dict(ran["outputs"]["ingest"])
    return [(row["day"], row["value"]) for table in store.read(ref, ACCEPTED) for row in table.to_pylist()]


def test_each_run_takes_its_own_day_and_links_its_data_docs(world: World, store: Store) -> None:
    later = run(world, "2026-05-02")
    assert taken(store, later) == [("2026-05-02", 3.0)]
    first = run(world, "2026-05-01", open={"ingest": "Data Docs"})
    assert taken(store, first) == [("2026-05-01", 1.0), ("2026-05-01", 2.0)], "a day of before, as a backfill asks for"
    page = first["opened"]["ingest"]
    batch = first["outputs"]["ingest"]["batch_id"]
    assert page["place"] == f"/ai-provider/data-docs/files_by_day/batch/{batch}?store=lake_store"
    assert page["status"] == 200, page
    assert "99.0" in page["text"]
    assert page["content-security-policy"].startswith("sandbox"), "a script in a row meets no session"
    assert page["nobody"] == 403
    assert run(world, "2026-05-01")["outputs"] == first["outputs"], "a clear returns the batch"
    log = (world.folder / "runs.log").read_text(errors="replace")
    assert "Data Docs: s3://by-day/ai/" in log
    assert store._fs.secret not in log


def test_a_refused_batch_links_its_data_docs_from_the_failed_task(world: World, store: Store) -> None:
    asked = {"conf": {"max_rejected": "0%"}, "open": {"ingest": "Data Docs"}, "may_fail": True}
    ran = run(world, "2026-05-03", **asked)
    assert ran["tasks"] == {"ingest": "failed"}
    page = ran["opened"]["ingest"]
    assert page["status"] == 200, page
    assert "98.0" in page["text"]
    assert "max_rejected allows" in page["text"]
    assert page["nobody"] == 403
