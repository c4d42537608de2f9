"""Everything that the story needs running: Kafka, MLflow, the ticket service, Airflow.

Invariants: each server listens on 127.0.0.1 on a free port and keeps its data under the demo's folder; a broker that
the user named is used as it is, and never started or stopped.
"""

from __future__ import annotations

import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from demo.airflow import PARTS, Airflow, settings, write_password
from demo.services import DemoFailedError, Service, Services, free_port

PROJECT = Path(__file__).resolve().parents[1]
News = Callable[[str], None]


class World:
    """Start the servers in an order that keeps two processor cores busy, and know their addresses.

    :param folder: takes all state.
    :param kafka: address of the user's own broker, ``host:port``; empty starts an embedded one.
    """

    def __init__(self, folder: Path, kafka: str = "") -> None:
        self.folder = folder
        self.kafka = kafka
        self.kafka_is_ours = not kafka
        self.ledger_url = f"sqlite:///{folder}/ledger.db"
        self.store_uri = f"file://{folder}/store"
        airflow, mlflow, tickets = free_port(), free_port(), free_port()
        self.mlflow = f"http://127.0.0.1:{mlflow}"
        self.tickets = f"http://127.0.0.1:{tickets}"
        self.airflow = Airflow(f"http://127.0.0.1:{airflow}", write_password(folder))
        # MLflow's own job runner would be seven more processes that nobody here uses.
        env = {"PYTHONPATH": f"{PROJECT / 'src'}:{PROJECT}", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        self.services = Services(folder, env)
        self._airflow_port = airflow

    def start_servers(self, news: News) -> None:
        """Start Kafka, MLflow and the ticket service, and make Airflow's database meanwhile."""
        if self.kafka_is_ours:
            self.services.start("kafka", [sys.executable, "-m", "demo.kafka"])
        self.services.start("mlflow", [*_PYTHON_M, "mlflow", "server", *self._mlflow_options()])
        tickets = ["--port", self.tickets.rpartition(":")[2], "--db", str(self.folder / "tickets.db")]
        tickets += ["--refuse-every", "7"]  # pages: not everybody can be reached, so that something is to be undone
        self.services.start("tickets", [*_PYTHON_M, "include.services.tickets", *tickets])
        if self.kafka_is_ours:
            news("waiting for Kafka")
            self.kafka = _first_line(self.services.wait("kafka", lambda service: bool(_first_line(service)), 60))
        else:
            _demand_port(self.kafka)
        self.services.env |= settings(self.folder, PROJECT, self._airflow_port, self._connections())
        news("making Airflow's database")
        self.services.run("airflow-db", [_AIRFLOW, "db", "migrate"])
        news("waiting for MLflow and the ticket service")
        self.services.wait("tickets", lambda _: answers(f"{self.tickets}/health"), 60)
        self.services.wait("mlflow", lambda _: answers(f"{self.mlflow}/health"))
        news(f"Kafka {self.kafka}, MLflow {self.mlflow}, tickets {self.tickets}")

    def start_airflow(self) -> None:
        """Start Airflow's parts; :meth:`wait_for_airflow` tells when they work."""
        self.services.start("airflow-api-server", [_AIRFLOW, "api-server", "--workers", "1"])
        for part in PARTS:
            own = ["--skip-serve-logs"] if part != "dag-processor" else []  # no more ports than needed
            self.services.start(f"airflow-{part}", [_AIRFLOW, part, *own])

    def wait_for_airflow(self, dag_id: str, news: News) -> None:
        """Return when Airflow answers, lets the user in and has read the DAG."""
        news("waiting for the API server")
        self.services.wait("airflow-api-server", lambda _: self.airflow.answers())
        self.airflow.log_in()
        news("waiting for the DAGs")
        self.services.wait("airflow-dag-processor", lambda _: self.airflow.dag_is_there(dag_id))
        news(f"{self.airflow.address} has read the DAGs")

    def _mlflow_options(self) -> list[str]:
        return [
            *("--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"),
            *("--artifacts-destination", str(self.folder / "models")),
            *("--host", "127.0.0.1", "--port", self.mlflow.rpartition(":")[2], "--workers", "1"),
        ]

    def _connections(self) -> dict[str, dict[str, Any]]:
        kafka = {"bootstrap.servers": self.kafka, "group.id": "tumour_triage"}
        return {
            "kafka_default": {"conn_type": "kafka", "extra": kafka},
            "mlflow_default": {"conn_type": "mlflow", "host": self.mlflow},
            "ai_api_default": {"conn_type": "ai_api", "host": self.tickets},
            "ai_store_default": {"conn_type": "ai_store", "extra": {"uri": self.store_uri}},
            "ai_ledger_default": {"conn_type": "ai_ledger", "extra": {"url": self.ledger_url}},
        }


_PYTHON_M = (sys.executable, "-m")
_AIRFLOW = str(Path(sys.executable).with_name("airflow"))


def answers(address: str) -> bool:
    """True when something answers there with 200."""
    try:
        with urllib.request.urlopen(address, timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def _first_line(service: Service) -> str:
    lines = service.log.read_text(errors="replace").splitlines()
    return next((line for line in lines if line.startswith("127.0.0.1:")), "")


def _demand_port(address: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError) as error:
        raise DemoFailedError(
            f"no Kafka broker answers at {address!r} ({error}). Write  make demo KAFKA=host:port  with a running "
            "broker, or leave KAFKA out to start an embedded one."
        ) from error
