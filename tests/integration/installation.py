"""A whole Airflow on one machine, its parts as processes, with a store and a ledger of its own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from airflow_ai_provider.core.store import Store
from demo.airflow import PARTS, Airflow, settings, write_password
from demo.services import Services, free_port

AIRFLOW = str(Path(sys.executable).with_name("airflow"))
_PROJECT = Path(__file__).resolve().parents[2]


class Person(Airflow):
    """Who also does what no demo shows."""

    def end_backfills(self, dag_id: str) -> None:
        """End backfills by hand: the scheduler looks every thirty seconds whether one is over."""
        for one in self._get(f"/api/v2/backfills?dag_id={dag_id}")["backfills"]:
            if one["completed_at"] is None:
                self._demand(self._client.put(f"/api/v2/backfills/{one['id']}/cancel"), 200)

    def add_pool(self, name: str, slots: int) -> None:
        body = {"name": name, "slots": slots, "description": "one slot per GPU"}
        self._demand(self._client.post("/api/v2/pools", json=body), 201)


class Installation:
    """All parts of Airflow; whoever makes one ends it by ``stop_all(folder)``.

    :param folder: takes all state.
    :param dags: text of its one DAG file.
    :param extras: kind of connection → extra fields of its default one, beside the store and the ledger.
    :param ledger: URL of the ledger's database; empty takes SQLite.
    :param options: Airflow's own, over those of the demo.
    """

    def __init__(
        self,
        folder: Path,
        dags: str,
        extras: Mapping[str, Mapping[str, Any]],
        *,
        ledger: str = "",
        options: Mapping[str, object] | None = None,
    ) -> None:
        self.folder, self.project = folder, folder / "project"
        for name in ("dags", "plugins"):
            (self.project / name).mkdir(parents=True)
        (self.project / "dags" / "declared.py").write_text(dags)
        self.store, self.ledger = Store(f"file://{folder}/store"), ledger or f"sqlite:///{folder}/ledger.db"
        own = {"ai_store": {"uri": self.store.root}, "ai_ledger": {"url": self.ledger}}
        connections = {
            f"{kind}_default": {"conn_type": kind, "extra": extra} for kind, extra in {**extras, **own}.items()
        }
        port = free_port()
        self.airflow = Person(f"http://127.0.0.1:{port}", write_password(folder))
        self.env = settings(folder, self.project, port, connections)
        self.env |= {f"AIRFLOW__{name}": str(value) for name, value in (options or {}).items()}
        self.env["PYTHONPATH"] = f"{_PROJECT / 'src'}:{_PROJECT}"
        self.services = Services(folder, self.env)

    def start(
        self, dags: Iterable[str], parts: Iterable[str] = PARTS, meanwhile: Callable[[], None] = lambda: None
    ) -> None:
        """Start the API server and these parts; return when these DAGs are there, and the rest is started too."""
        self.services.run("airflow-db", [AIRFLOW, "db", "migrate"])
        self.services.start("airflow-api-server", [AIRFLOW, "api-server", "--workers", "1"])
        for part in parts:
            own = ["--skip-serve-logs"] if part != "dag-processor" else []
            self.services.start(f"airflow-{part}", [AIRFLOW, part, *own])
        meanwhile()
        self.services.wait("airflow-api-server", lambda _: self.airflow.answers())
        self.airflow.log_in()
        for dag in dags:
            self.services.wait("airflow-dag-processor", lambda _, dag=dag: self.airflow.dag_is_there(dag))

    def is_through(self, dag: str, run_id: str) -> bool:
        """True when the run has succeeded; one that failed is an error with the logs of its tasks."""
        state = self.airflow.run_state(dag, run_id)
        assert state != "failed", "\n".join(
            line["event"]
            for task in self.airflow.tasks(dag, run_id)
            if task["state"] == "failed"
            for line in self.airflow.log(dag, run_id, task)
        )
        return state == "success"
