"""A world for the examples: Airflow's home, a model registry, Kafka and the ticket service, shared by them all."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from airflow_ai_provider.core.batch import BatchRef
from airflow_ai_provider.core.ledger import Entry
from airflow_ai_provider.core.ledger_sql import open_ledger
from airflow_ai_provider.core.store import Store
from tests.servers.mock_kafka import mock_cluster
from tests.servers.process import ServerProcess, free_port

PROJECT = Path(__file__).resolve().parents[2]


class Runner:
    """One process of ``run_dag``, started when it is first needed.

    :param env: its environment.
    :param folder: where it runs; its log is ``runs.log`` there.
    """

    def __init__(self, env: dict[str, str], folder: Path) -> None:
        self._env, self._folder = env, folder
        self._log = folder / "runs.log"
        self._process: subprocess.Popen[str] | None = None

    def obey(self, order: Path, deadline_s: float = 240) -> dict[str, Any]:
        """Have an order run and return what became of it."""
        process = self._process or self._start()
        assert process.stdin is not None
        process.stdin.write(f"{order}\n")
        process.stdin.flush()
        told, deadline = order.with_suffix(".answer"), time.monotonic() + deadline_s
        while not told.exists():
            state = "has ended" if process.poll() is not None else "does not end"
            assert process.poll() is None and time.monotonic() < deadline, f"the run {state}:\n{self.errors()}"
            time.sleep(0.1)
        answer: dict[str, Any] = json.loads(told.read_text())
        return answer

    def errors(self) -> str:
        """Return the log's lines that tell of errors, and its end."""
        lines = self._log.read_text().splitlines()
        return "\n".join([line for line in lines if "Error" in line or "[error" in line][-40:] + lines[-10:])

    def close(self) -> None:
        """End the process; a run that waits for an answer would wait for ever."""
        if self._process:
            self._process.kill()
            self._process.wait(10)

    def _start(self) -> subprocess.Popen[str]:
        with self._log.open("w") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.examples.run_dag"],
                cwd=self._folder,
                env=self._env,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
            )
        return self._process


class World:
    """Where an example runs.

    :param folder: takes all state.
    :param kafka: the broker's address.
    :param tickets: the ticket service's address.
    """

    def __init__(self, folder: Path, kafka: str, tickets: str) -> None:
        self.folder = folder
        self.kafka = kafka
        self.tickets = tickets
        self.registry = f"sqlite:///{folder}/mlflow.db"
        self.ledger_url = f"sqlite:///{folder}/ledger.db"
        self.store = Store(f"file://{folder}/store")
        self.own_dags = folder / "own_dags"
        """A second folder of DAG files, for what only a test runs."""
        self.own_dags.mkdir()
        self.env = os.environ | self._settings()
        self._numbers = itertools.count(1)
        self._runner = Runner(self.env, folder)
        self._later: dict[str, str] = {}

    def python(self, *arguments: str, deadline_s: float = 240) -> str:
        """Run a module of the project and return what it printed."""
        log = self.folder / f"{arguments[0]}.out"
        with log.open("w") as output:
            ended = subprocess.run(
                [sys.executable, "-m", *arguments],
                cwd=self.folder,
                env=self.env,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=deadline_s,
                check=False,
            )
        said = log.read_text()
        assert ended.returncode == 0, f"{arguments[0]} ended with {ended.returncode}:\n{said[-8000:]}"
        return said

    def run(
        self, dag: str, *, at: str, file: str = "pipelines.py", may_fail: bool = False, **order_more: Any
    ) -> dict[str, Any]:
        """Run a DAG through ``dag.test()``; the same ``at`` again runs the same run again, as a clear does."""
        order = self.folder / "orders" / f"{next(self._numbers)}.json"
        order.parent.mkdir(exist_ok=True)
        order.write_text(json.dumps({"dag": dag, "file": file, "at": at, "env": self._later, **order_more}))
        answer = self._runner.obey(order)
        assert not answer["failure"], f"{answer['failure']}:\n{self._runner.errors()}"
        assert may_fail or "failed" not in answer["tasks"].values(), f"{answer['tasks']}:\n{self._runner.errors()}"
        return answer

    def define(self, conn_id: str, connection: dict[str, Any]) -> None:
        """Add a connection for the runs to come."""
        self._later[f"AIRFLOW_CONN_{conn_id.upper()}"] = json.dumps(connection)

    def rows(self, reference: Any, table: str) -> list[dict[str, Any]]:
        """Read a table of a stored batch."""
        ref = BatchRef.from_dict(reference)
        return [row for part in self.store.read(ref, table) for row in part.to_pylist()]

    def effects(self, pipeline: str) -> list[Entry]:
        """What the ledger says was done outside, undos left out."""
        return [entry for entry in open_ledger(self.ledger_url).entries(pipeline) if not entry.undoes]

    def states(self, pipeline: str) -> Counter[tuple[str, str]]:
        """(action, state) → how many effects."""
        return Counter((entry.action, entry.state) for entry in self.effects(pipeline))

    def ask(self, what: str) -> Any:
        """Ask the ticket service."""
        with urllib.request.urlopen(f"{self.tickets}/{what}", timeout=15) as answer:
            return json.load(answer)

    def bytes_of_all_batches(self) -> dict[str, bytes]:
        """Every file of the store."""
        return {str(p): p.read_bytes() for p in sorted((self.folder / "store").rglob("*")) if p.is_file()}

    def _settings(self) -> dict[str, str]:
        home = self.folder / "airflow"
        connections: dict[str, dict[str, Any]] = {
            "kafka_default": {"conn_type": "kafka", "extra": {"bootstrap.servers": self.kafka, "group.id": "examples"}},
            "mlflow_default": {"conn_type": "mlflow", "extra": {"tracking_uri": self.registry}},
            "ai_api_default": {"conn_type": "ai_api", "host": self.tickets},
            "ai_store_default": {"conn_type": "ai_store", "extra": {"uri": self.store_uri}},
            "ai_ledger_default": {"conn_type": "ai_ledger", "extra": {"url": self.ledger_url}},
        }
        local = "airflow.dag_processing.bundles.local.LocalDagBundle"
        bundles = [
            {"name": "dags-folder", "classpath": local, "kwargs": {}},
            {"name": "own", "classpath": local, "kwargs": {"path": str(self.own_dags)}},
        ]
        return {
            "AIRFLOW_HOME": str(home),
            "AIRFLOW__DAG_PROCESSOR__DAG_BUNDLE_CONFIG_LIST": json.dumps(bundles),
            "AIRFLOW__CORE__DAGS_FOLDER": str(PROJECT / "dags"),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True",
            "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home}/airflow.db",
            "AIRFLOW__LOGGING__BASE_LOG_FOLDER": str(home / "logs"),
            "AIRFLOW_VAR_DIGITS_FOLDER": str(self.folder / "scans"),
            "PYTHONPATH": f"{PROJECT / 'src'}:{PROJECT}",
            **{f"AIRFLOW_CONN_{name.upper()}": json.dumps(value) for name, value in connections.items()},
        }

    def close(self) -> None:
        """End what runs."""
        self._runner.close()

    @property
    def store_uri(self) -> str:
        return f"file://{self.folder}/store"


@contextmanager
def ticket_service(folder: Path) -> Iterator[str]:
    """Run the ticket service and give its address."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    options = ["--port", str(port), "--db", str(folder / "tickets.db"), "--refuse-every", "5"]

    def answers(_: str) -> bool:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    server = ServerProcess(
        [sys.executable, "-m", "include.services.tickets", *options],
        log=folder / "tickets.log",
        ready=answers,
        env={"PYTHONPATH": f"{PROJECT / 'src'}:{PROJECT}"},
    )
    server.start()
    try:
        yield address
    finally:
        server.stop()


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A new world, with Airflow's database migrated and nothing trained, published or sent."""
    folder = tmp_path_factory.mktemp("world")
    with mock_cluster() as kafka, ticket_service(folder) as tickets:
        made = World(folder, kafka, tickets)
        made.python("airflow", "db", "migrate")
        try:
            yield made
        finally:
            made.close()
