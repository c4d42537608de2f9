"""Airflow as the demo runs it (settings of an installation of its own) and as a person uses it (its REST API).

Invariants: everything lies under the demo's folder and listens on 127.0.0.1; nothing of another Airflow on this machine
is read or changed.
"""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from demo.services import DemoFailedError

PARTS = ("scheduler", "dag-processor", "triggerer")
USER = "admin"


@dataclass(frozen=True)
class Login:
    """Who may log in to the demo's Airflow."""

    user: str
    password: str


def settings(folder: Path, project: Path, port: int, connections: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return the environment of every Airflow process.

    :param folder: takes all state; its subfolder ``airflow`` becomes AIRFLOW_HOME.
    :param project: holds ``dags``, ``plugins`` and ``include``.
    :param port: of the API server and UI.
    :param connections: Airflow's connections by id.
    """
    home, address = folder / "airflow", f"http://127.0.0.1:{port}"
    options = {
        "CORE__DAGS_FOLDER": project / "dags",
        "CORE__PLUGINS_FOLDER": project / "plugins",
        "CORE__LOAD_EXAMPLES": False,
        "CORE__EXECUTOR": "LocalExecutor",
        "CORE__PARALLELISM": 4,
        "CORE__FERNET_KEY": base64.urlsafe_b64encode(secrets.token_bytes(32)).decode(),
        "CORE__EXECUTION_API_SERVER_URL": f"{address}/execution/",
        "CORE__SIMPLE_AUTH_MANAGER_USERS": f"{USER}:admin",
        "CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": home / "passwords.json",
        "DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home}/airflow.db",
        "API__HOST": "127.0.0.1",
        "API__PORT": port,
        "API__WORKERS": 1,
        "API__BASE_URL": address,
        "API__SECRET_KEY": secrets.token_hex(32),
        "API_AUTH__JWT_SECRET": secrets.token_hex(64),
        "SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": 0.2,
        "DAG_PROCESSOR__PARSING_PROCESSES": 1,
        "USAGE_DATA_COLLECTION__ENABLED": False,
    }
    env = {f"AIRFLOW__{name}": str(value) for name, value in options.items()}
    env |= {f"AIRFLOW_CONN_{name.upper()}": json.dumps(value) for name, value in connections.items()}
    return env | {"AIRFLOW_HOME": str(home), "PYTHONPATH": f"{project / 'src'}:{project}"}


def write_password(folder: Path) -> Login:
    """Choose the password and write it where Airflow's simple auth manager reads it."""
    login = Login(USER, secrets.token_urlsafe(9))
    file = folder / "airflow" / "passwords.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch(mode=0o600)
    file.write_text(json.dumps({login.user: login.password}))
    return login


class Airflow:
    """A person at Airflow's API.

    :param address: the API server's, without a path.
    :param login: of the person.
    """

    def __init__(self, address: str, login: Login) -> None:
        self.address = address
        self.login = login
        self._client = httpx.Client(base_url=address, timeout=30)

    def answers(self) -> bool:
        """True when the API server and its database answer."""
        try:
            health = self._client.get("/api/v2/monitor/health")
        except httpx.TransportError:
            return False
        return health.status_code == 200 and health.json()["metadatabase"]["status"] == "healthy"

    def log_in(self) -> None:
        """Get a token, as the login page does."""
        answer = self._client.post("/auth/token", json={"username": self.login.user, "password": self.login.password})
        self._demand(answer, 201)
        self._client.headers["Authorization"] = f"Bearer {answer.json()['access_token']}"

    def dag_is_there(self, dag_id: str) -> bool:
        """True when the DAG was parsed.

        :raises DemoFailedError: when a DAG file cannot be imported.
        """
        errors = self._get("/api/v2/importErrors")["import_errors"]
        if errors:
            raise DemoFailedError(f"{errors[0]['filename']} cannot be imported:\n{errors[0]['stack_trace']}")
        return self._client.get(f"/api/v2/dags/{dag_id}").status_code == 200

    def trigger(self, dag_id: str, run_id: str, conf: Mapping[str, Any] | None = None) -> None:
        """Trigger a run, then let the DAG run.

        The scheduler makes a run of its own, for the last full interval, as soon as it may. Runs wait in the order of
        their ``run_after``: ours is an older one, else the other would take the messages.
        """
        before = datetime.now(UTC) - timedelta(days=1)
        body = {"dag_run_id": run_id, "logical_date": None, "run_after": before.isoformat(), "conf": dict(conf or {})}
        self._demand(self._client.post(f"/api/v2/dags/{dag_id}/dagRuns", json=body), 200)
        self.pause(dag_id, False)

    def pause(self, dag_id: str, paused: bool) -> None:
        """Pause the DAG, or let it run."""
        self._demand(self._client.patch(f"/api/v2/dags/{dag_id}", json={"is_paused": paused}), 200)

    def run_state(self, dag_id: str, run_id: str) -> str:
        """Return the run's state."""
        return str(self._get(f"/api/v2/dags/{dag_id}/dagRuns/{quote(run_id)}")["state"])

    def tasks(self, dag_id: str, run_id: str) -> list[dict[str, Any]]:
        """Return the run's task instances: ``task_id``, ``state``, ``try_number``, ``duration`` …"""
        path = f"/api/v2/dags/{dag_id}/dagRuns/{quote(run_id)}/taskInstances?limit=100"
        return list(self._get(path)["task_instances"])

    def log(self, dag_id: str, run_id: str, task: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return a task's log so far: each line's ``event``, ``level``, ``logger`` …"""
        path = (
            f"/api/v2/dags/{dag_id}/dagRuns/{quote(run_id)}/taskInstances/{task['task_id']}/logs/{task['try_number']}"
        )
        which = {"map_index": task.get("map_index", -1)}
        answer = self._client.get(path, params=which, headers={"Accept": "application/json"})
        lines = answer.json().get("content") or [] if answer.status_code == 200 else []
        return [line for line in lines if isinstance(line, dict)]

    def xcom(self, dag_id: str, run_id: str, task_id: str, key: str = "return_value") -> Any:
        """Return what a task handed on; None when it handed nothing on."""
        path = f"/api/v2/dags/{dag_id}/dagRuns/{quote(run_id)}/taskInstances/{task_id}/xcomEntries/{key}"
        answer = self._client.get(path, params={"deserialize": "false", "stringify": "false"})
        return answer.json()["value"] if answer.status_code == 200 else None

    def open_review(self, dag_id: str, run_id: str) -> dict[str, Any] | None:
        """Return the review that waits for an answer, as the *Required actions* page shows it."""
        path = f"/api/v2/dags/{dag_id}/dagRuns/{quote(run_id)}/hitlDetails?response_received=false"
        waiting = self._get(path)["hitl_details"]
        return waiting[0] if waiting else None

    def answer(self, review: Mapping[str, Any], option: str, fields: Mapping[str, str]) -> None:
        """Answer a review, as a person does by filling in the form and pressing a button."""
        task = review["task_instance"]
        path = (
            f"/api/v2/dags/{task['dag_id']}/dagRuns/{quote(task['dag_run_id'])}"
            f"/taskInstances/{task['task_id']}/{task['map_index']}/hitlDetails"
        )
        body = {"chosen_options": [option], "params_input": dict(fields)}
        self._demand(self._client.patch(path, json=body), 200)

    def _get(self, path: str) -> Any:
        answer = self._client.get(path)
        self._demand(answer, 200)
        return answer.json()

    @staticmethod
    def _demand(answer: httpx.Response, status: int) -> None:
        if answer.status_code != status:
            raise DemoFailedError(
                f"Airflow answered {answer.status_code} instead of {status} to "
                f"{answer.request.method} {answer.request.url.path}: {answer.text[:500]}"
            )
