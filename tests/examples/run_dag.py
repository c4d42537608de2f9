"""Run examples through ``dag.test()`` and answer their reviews from a thread, through Airflow's own API.

A process of its own (``python -m tests.examples.run_dag``), so that runs have the settings of its environment and
nothing of the test session; one process for many runs, because importing Airflow takes longer than a run. Each line of
standard input names the file of an order; the answer is written beside it.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import threading
import traceback
from datetime import datetime
from pathlib import Path
from typing import Any

DAGS = Path(__file__).resolve().parents[2] / "dags"


class Person(threading.Thread):
    """Somebody who watches *Required actions* and fills in each form once.

    :param answers: subject → what to answer; subjects left out get the form's own value.
    :param first: command to run before answering, while the run waits.
    """

    def __init__(self, answers: dict[str, str], first: list[str]) -> None:
        super().__init__(daemon=True)
        self.answers, self.first = answers, first
        self.asked: dict[str, str] = {}
        self.failure = ""
        self._over = threading.Event()

    def run(self) -> None:
        """Answer until told to stop."""
        try:
            while not self._over.wait(0.5):
                self._look()
        except Exception as error:  # a thread's error would be lost, and dag.test() would wait for ever
            self.failure = repr(error)
            raise

    def stop(self) -> None:
        self._over.set()
        self.join(30)

    def _look(self) -> None:
        found = api().get("/api/v2/dags/~/dagRuns/~/hitlDetails?response_received=false").json()["hitl_details"]
        for review in found:
            if self.first:
                subprocess.run(self.first, check=True)
                self.first = []
            fields = {}
            for name, param in review["params"].items():
                self.asked[name] = param["schema"]["title"]
                fields[name] = self.answers.get(param["schema"]["title"], param["value"])
            task = review["task_instance"]
            path = f"/api/v2/dags/{task['dag_id']}/dagRuns/{task['dag_run_id']}/taskInstances/{task['task_id']}/-1"
            body = {"chosen_options": [review["options"][0]], "params_input": fields}
            answer = api().patch(f"{path}/hitlDetails", json=body)
            assert answer.status_code == 200, answer.text


_client: list[Any] = []


def api() -> Any:
    """Airflow's API on this process's database, logged in."""
    if not _client:
        from airflow.api_fastapi.app import create_app
        from fastapi.testclient import TestClient

        client = TestClient(create_app())
        token = client.get("/auth/token").json()["access_token"]
        client.headers["Authorization"] = f"Bearer {token}"
        _client.append(client)
    return _client[0]


def obey(order: dict[str, Any]) -> dict[str, Any]:
    """Run one order and tell what became of it."""
    os.environ.update(order.get("env") or {})
    dag = runpy.run_path(str(DAGS / order["file"]))[order["dag"]]
    for task in dag.tasks:
        task.retries = 0  # what fails here shall be seen at once
    person = Person(order.get("answers") or {}, order.get("first") or [])
    person.start()
    at = datetime.fromisoformat(order["at"])
    try:
        run = dag.test(logical_date=at, run_after=at, run_conf=order.get("conf"))  # the run's id is made of run_after
    finally:
        person.stop()
    path = f"/api/v2/dags/{run.dag_id}/dagRuns/{run.run_id}"
    tasks = api().get(f"{path}/taskInstances").json()["task_instances"]
    return {
        "run_id": run.run_id,
        "state": str(run.state.value),
        "tasks": {task["task_id"]: task["state"] for task in tasks},
        "outputs": {task["task_id"]: output(f"{path}/taskInstances/{task['task_id']}") for task in tasks},
        "asked": person.asked,
        "opened": {task: opened(f"{path}/taskInstances/{task}", link) for task, link in order.get("open", {}).items()},
        "failure": person.failure,
    }


def output(path: str) -> Any:
    """Return what a task handed on; None when it handed nothing on."""
    found = api().get(f"{path}/xcomEntries/return_value?deserialize=false")
    value = found.json()["value"] if found.status_code == 200 else None
    return json.loads(value) if isinstance(value, str) else value


def opened(path: str, link: str) -> dict[str, Any]:
    """Follow a task's link as its page in the UI does; with another's eyes too: those of nobody."""
    place = api().get(f"{path}/links").json()["extra_links"][link]
    found = api().get(place)
    nobody = api().get(place, headers={"Authorization": "Bearer none"}).status_code
    return {"place": place, "status": found.status_code, "text": found.text, "nobody": nobody, **found.headers}


def main() -> None:
    """Obey orders until standard input ends."""
    api()
    for line in sys.stdin:
        order = Path(line.strip())
        try:
            answer = obey(json.loads(order.read_text()))
        except Exception as error:  # told to the test; the log holds the rest
            traceback.print_exc()
            answer = {"failure": repr(error)}
        draft = order.with_suffix(".draft")
        draft.write_text(json.dumps(answer))
        draft.rename(order.with_suffix(".answer"))


if __name__ == "__main__":
    main()
