"""What only a ledger on disk can show: processes that race, locks, lost servers, secrets, what a person can read."""

from __future__ import annotations

import json
import os
import pickle
import sqlite3
import subprocess
import sys
import textwrap
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from airflow_ai_provider.core import ledger_engine
from airflow_ai_provider.core.batch import Pin
from airflow_ai_provider.core.ledger import Ledger
from airflow_ai_provider.core.ledger_sql import open_ledger
from airflow_ai_provider.errors import ConnectionConfigError, LedgerUnavailableError, MissingExtraError
from airflow_ai_provider.testing.ledger import MemoryLedger

if TYPE_CHECKING:
    from tests.servers.postgres import PostgresServer

RACER = textwrap.dedent(
    """
    import sys, time
    from airflow_ai_provider.core.batch import Slice, Span
    from airflow_ai_provider.core.ledger import Intent
    from airflow_ai_provider.core.ledger_sql import open_ledger
    from airflow_ai_provider.errors import SpanConflictError
    url, name, start = sys.argv[1], sys.argv[2], float(sys.argv[3])
    time.sleep(max(0.0, start - time.time()))
    ledger = open_ledger(url)   # makes the tables, all processes at once
    won = 0
    for n in range(40):
        try:
            claim = ledger.claim("p", f"{name}/{n}", Span("kafka:t", "", (Slice("0", n * 10, n * 10 + 10),)), name)
            won += claim.run_id == name
        except SpanConflictError as error:
            assert error.owner != name
        entry, = ledger.reserve([Intent(f"k{n}", "p", "ticket", str(n), "f", name, str(n), "b", 0, f"s{n}")])
        ledger.pin_history("x")
    print(won, sum(e.run_id == name for e in ledger.entries("p")))
    """
)


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_processes_that_race_share_everything_out_once(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    import time

    if kind == "postgresql":
        fresh: Callable[[], str] = request.getfixturevalue("fresh_postgres_url")
        url = fresh()
    else:
        url = f"sqlite:///{tmp_path}/ledger.db"
    start = str(time.time() + 2.5)
    racers = [
        subprocess.Popen([sys.executable, "-c", RACER, url, f"r{n}", start], stdout=subprocess.PIPE, text=True)
        for n in range(3)
    ]
    answers = [racer.communicate(timeout=250)[0] for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0, 0]
    assert sum(int(a.split()[0]) for a in answers) == 40, "each span has one owner"
    assert sum(int(a.split()[1]) for a in answers) == 40, "each key has one row"
    ledger = open_ledger(url)
    assert ledger.position("p", "kafka:t", "") == {"0": 400}


def test_a_new_file_may_be_opened_by_many_at_once(tmp_path: Path) -> None:
    gate = threading.Barrier(6)

    def open_and_ask(url: str) -> int:
        gate.wait(60)
        return len(open_ledger(url).entries("p"))

    with ThreadPoolExecutor(6) as threads:
        for n in range(60):
            assert list(threads.map(open_and_ask, [f"sqlite:///{tmp_path}/{n}.db"] * 6)) == [0] * 6


def test_sqlite_is_durable_and_lets_readers_read(tmp_path: Path) -> None:
    ledger = open_ledger(f"sqlite:///{tmp_path}/ledger.db")
    with ledger._engine.connect() as connection:  # type: ignore[attr-defined]
        facts = [
            connection.exec_driver_sql(f"PRAGMA {p}").scalar() for p in ("journal_mode", "synchronous", "busy_timeout")
        ]
    assert facts == ["wal", 2, 30_000]
    writer = sqlite3.connect(tmp_path / "ledger.db", isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    assert ledger.entries("p") == []
    writer.close()


def test_a_ledger_that_stays_locked_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_engine, "_LOCK_TIMEOUT_S", 0.2)
    ledger = open_ledger(f"sqlite:///{tmp_path}/ledger.db")
    writer = sqlite3.connect(tmp_path / "ledger.db", isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    with pytest.raises(LedgerUnavailableError, match="locked"):
        ledger.release("p", "r")
    writer.rollback()
    ledger.release("p", "r")


def test_a_file_that_is_no_database_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "ledger.db").write_bytes(b"hello, I am a text" * 400)
    with pytest.raises(LedgerUnavailableError, match="not a database"):
        open_ledger(f"sqlite:///{tmp_path}/ledger.db")


def test_a_folder_that_cannot_be_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LedgerUnavailableError, match="cannot be made"):
        open_ledger(f"sqlite:///{tmp_path}/file/deep/ledger.db")


@pytest.mark.parametrize(
    "url",
    [
        "sqlite://",
        "sqlite:///:memory:",
        "mysql://root:hunter2@db/airflow",
        "nosuchthing://root:hunter2@db/airflow",
        "postgresql://root:hunter2@db:notaport/airflow",
        "hunter2",
        "",
    ],
)
def test_urls_that_keep_no_promise_are_refused_without_quoting_them(url: str) -> None:
    with pytest.raises(ConnectionConfigError) as caught:
        open_ledger(url)
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


def test_a_missing_driver_names_its_extra() -> None:
    with pytest.raises(MissingExtraError, match=r"airflow-ai-provider\[postgres\]"):
        open_ledger("postgresql+asyncpg://u:hunter2@db/airflow")


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_ledger_of_an_older_release_gets_what_is_new_and_keeps_what_it_holds(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if kind == "postgresql":
        fresh: Callable[[], str] = request.getfixturevalue("fresh_postgres_url")
        url = fresh()
    else:
        url = f"sqlite:///{tmp_path}/ledger.db"
    number = {"sqlite": "INTEGER PRIMARY KEY AUTOINCREMENT", "postgresql": "BIGSERIAL PRIMARY KEY"}[kind]
    held = Pin("triage", "3", "champion", "sha256:3", {"m": "sha256:f"}, "onnx", {"inputs": []})
    engine = ledger_engine.open_engine(url)
    with engine.begin() as old:  # the table as release 0.1 made it
        old.exec_driver_sql(
            f"CREATE TABLE ai_pin (seq {number}, pipeline TEXT NOT NULL, run_id TEXT NOT NULL, name TEXT NOT NULL, "
            "value TEXT NOT NULL, at TEXT NOT NULL, UNIQUE (pipeline, run_id, name))"
        )
        row = f"'p', 'r1', 'triage', '{json.dumps(held.to_dict())}', '2026-01-01T00:00:00.000000+00:00'"
        old.exec_driver_sql(f"INSERT INTO ai_pin (pipeline, run_id, name, value, at) VALUES ({row})")
    with ThreadPoolExecutor(3) as pool:  # three workers of the new release start at once
        ledger, *_ = pool.map(lambda _: open_ledger(url), range(3))
    assert ledger.pin_of("p", "r1", "triage") == held
    window = (datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 1, 2, tzinfo=UTC))
    ledger.pin("p", "r2", held, window, "current")
    assert [h["window_end"] for h in ledger.pin_history("triage")] == [None, "2026-01-02T00:00:00.000000+00:00"]
    assert [h["run_id"] for h in ledger.pin_history("triage", "p", window)] == ["r2"]
    ledger.saw_aliases("r", "triage", {"champion": "3"})
    with engine.begin() as old:  # a worker of the old release beside it goes on
        old.exec_driver_sql(
            f"INSERT INTO ai_pin (pipeline, run_id, name, value, at) VALUES ({row.replace('r1', 'r3')})"
        )
    assert open_ledger(url).pin_of("p", "r3", "triage") == held


def test_a_lost_server_is_transient_and_its_password_unsaid(postgres_server: PostgresServer) -> None:
    url = postgres_server.fresh_url().replace("postgres@", "postgres:hunter2@")
    ledger = open_ledger(url)
    ledger.release("p", "r")
    postgres_server.kill()
    with pytest.raises(LedgerUnavailableError) as caught:
        ledger.release("p", "r")
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))
    assert "hunter2" not in str(pickle.loads(pickle.dumps(caught.value)))
    postgres_server.restart()
    ledger.release("p", "r")


def test_the_ledgers_meet_the_protocol(tmp_path: Path) -> None:
    assert isinstance(MemoryLedger(), Ledger)
    assert isinstance(open_ledger(f"sqlite:///{tmp_path}/ledger.db"), Ledger)


def test_core_ledger_loads_no_giant() -> None:
    code = (
        "import sys, airflow_ai_provider.core.ledger as l; print('sqlalchemy' in sys.modules, 'airflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.split() == ["False", "False"]
