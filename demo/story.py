"""The story, stage by stage: train, publish, run the DAG on the real scheduler, answer its review, wait for the end.

Invariants: the pipeline is driven through Airflow's own API only, as a person would; what is asked of it is what a user
may ask. A stage that fails says which log to read.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from demo.screen import Screen, Stage
from demo.services import DemoFailedError
from demo.world import World

DAG_ID, TOPIC, RUN_ID = "tumour_triage", "biopsies", "demo"
TASKS = {
    "pin": "pin the model",
    "ingest": "ingest and validate",
    "infer": "predict",
    "decide": "route by confidence",
    "review": "a person reviews",
    "ticket": "open tickets",
    "page": "page doctors",
    "undo": "undo half-done work",
}
HELD_ANSWERS = 2
RUN_DEADLINE_S = 900
_AIRFLOWS_OWN = ("Skipping tasks", "Waiting for response")  # logged by its base classes in our operators' names
_ENDED = {"success", "failed", "upstream_failed", "skipped", "removed"}


@dataclass
class Told:
    """What the story leaves behind for the report.

    :param run_id: the DAG run.
    :param labels: biopsy id → true class.
    :param spoiled: the truth about the spoiled messages.
    :param published: how many messages were confirmed by the broker.
    :param outputs: task id → its XCom.
    :param answers: biopsy id → what the person said.
    :param seconds: stage → how long it took.
    """

    run_id: str
    labels: dict[str, str] = field(default_factory=dict)
    spoiled: list[dict[str, Any]] = field(default_factory=list)
    published: int = 0
    outputs: dict[str, Any] = field(default_factory=dict)
    answers: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


class Story:
    """Tell the story in a world.

    :param world: the servers.
    :param screen: shows what goes on.
    """

    def __init__(self, world: World, screen: Screen) -> None:
        self.world = world
        self.screen = screen
        self.told = Told(RUN_ID)

    def tell(self) -> Told:
        """Run every stage.

        :raises DemoFailedError: when a stage fails; nothing is cleaned up yet.
        """
        with self._stage("servers", "start the servers") as stage:
            self.world.start_servers(stage.note)
            self.world.start_airflow()
        with self._stage("train", "train the model") as stage:
            self._train(stage)
        with self._stage("publish", "publish the biopsies") as stage:
            self._publish(stage)
        with self._stage("airflow", "wait for Airflow") as stage:
            self.world.wait_for_airflow(DAG_ID, stage.note)
        self._run_dag()
        return self.told

    def _stage(self, key: str, title: str) -> AbstractContextManager[Stage]:
        @contextmanager
        def timed() -> Iterator[Stage]:
            with self.screen.stage(title) as stage:
                yield stage
            self.told.seconds[key] = round(stage.seconds, 2)

        return timed()

    def _train(self, stage: Stage) -> None:
        stage.note("learning from one half of the biopsies")
        output = self.world.services.run(
            "train", [sys.executable, "-m", "include.models.train_triage", self.world.mlflow]
        )
        stage.note(output.strip().splitlines()[-1])

    def _publish(self, stage: Stage) -> None:
        from demo.topic import make_topic
        from include.messages import make_messages, publish, write_truth

        client = {"bootstrap.servers": self.world.kafka}
        if not self.world.kafka_is_ours:
            make_topic(client, TOPIC, stage.note)
        truth, labels = self.world.folder / "truth.json", self.world.folder / "labels.json"
        delivered = publish(client, TOPIC, make_messages(), stage.note)
        write_truth(delivered, truth, labels)
        self.told.published = len(delivered)
        self.told.labels = json.loads(labels.read_text())
        self.told.spoiled = json.loads(truth.read_text())["spoiled"]
        stage.note(f"{len(delivered)} messages, {len(self.told.spoiled)} of them spoiled on purpose")

    def _run_dag(self) -> None:
        airflow = self.world.airflow
        airflow.trigger(DAG_ID, self.told.run_id)
        shown: dict[str, Stage] = {}
        deadline = time.monotonic() + RUN_DEADLINE_S
        while (state := airflow.run_state(DAG_ID, self.told.run_id)) not in ("success", "failed"):
            self.world.services.check()
            self._show_tasks(shown)
            if time.monotonic() > deadline:
                raise DemoFailedError(
                    f"the run is still {state} after {RUN_DEADLINE_S} s. Look at {airflow.address}, and read "
                    f"{self.world.services.log_of('airflow-scheduler')}"
                )
            time.sleep(0.4)
        tasks = self._show_tasks(shown)
        self._demand_success(state, tasks)
        self.told.outputs = {task["task_id"]: airflow.xcom(DAG_ID, self.told.run_id, task["task_id"]) for task in tasks}

    def _show_tasks(self, shown: dict[str, Stage]) -> list[dict[str, Any]]:
        tasks = self.world.airflow.tasks(DAG_ID, self.told.run_id)
        by_id = {task["task_id"]: task for task in tasks}
        for task_id, title in TASKS.items():
            task = by_id.get(task_id)
            if task is None or task_id in self.told.seconds or task["state"] in (None, "scheduled"):
                continue
            stage = shown.get(task_id) or shown.setdefault(task_id, self.screen.task(title))
            news = self._news(task)
            if task["state"] == "awaiting_input":
                news = self._answer_review() or news
            if task_id == "decide" and task["state"] == "success":
                news = self._routes()
            if task["state"] in _ENDED:
                took = float(task["duration"] or 0)
                self.told.seconds[task_id] = round(took, 2)
                stage.end(news or task["state"], failed=task["state"] not in ("success", "skipped"), seconds=took)
            elif news:
                stage.note(news)
        return tasks

    def _news(self, task: Mapping[str, Any]) -> str:
        """Return the last thing that the task itself said."""
        lines = self.world.airflow.log(DAG_ID, self.told.run_id, task)
        ours = [str(line["event"]) for line in lines if "airflow_ai_provider" in str(line.get("logger"))]
        said = [event for event in ours if not event.startswith(_AIRFLOWS_OWN)]
        return said[-1] if said else ""

    def _routes(self) -> str:
        """Tell how many rows took each route."""
        routes = self.world.airflow.xcom(DAG_ID, self.told.run_id, "decide") or {}
        return ", ".join(f"{route} {reference['counts'][route]}" for route, reference in routes.items())

    def _answer_review(self) -> str:
        """Fill in the form as somebody does who knows the biopsies, but cannot say anything about some."""
        review = self.world.airflow.open_review(DAG_ID, self.told.run_id)
        if review is None:
            return ""
        fields = {name: _title(param, name) for name, param in review["params"].items()}
        answers = {name: self.told.labels[biopsy] for name, biopsy in fields.items()}
        answers |= dict.fromkeys(sorted(answers)[:HELD_ANSWERS], "hold")
        self.world.airflow.answer(review, review["options"][0], answers)
        self.told.answers = {fields[name]: answer for name, answer in answers.items()}
        return f"{review['subject']}: {len(answers)} questions answered"

    def _demand_success(self, state: str, tasks: list[dict[str, Any]]) -> None:
        failed = [task for task in tasks if task["state"] in ("failed", "upstream_failed")]
        if state == "success" and not failed:
            return
        task = min(failed, key=lambda t: t["end_date"] or "9", default=None)
        if task is None:
            raise DemoFailedError(f"the run is {state}, and no task says why. Look at {self.world.airflow.address}")
        logs = self.world.folder / "airflow" / "logs" / f"dag_id={DAG_ID}" / f"run_id={self.told.run_id}"
        log = logs / f"task_id={task['task_id']}" / f"attempt={task['try_number']}.log"
        lines = self.world.airflow.log(DAG_ID, self.told.run_id, task)
        told = [line for line in lines if not str(line.get("logger")).startswith("great_expectations")]
        end = "\n".join(_said(line) for line in told[-12:])
        raise DemoFailedError(f"task {task['task_id']} is {task['state']}. Read {log}; it ends:\n{end}", log=str(log))


def _title(param: Mapping[str, Any], name: str) -> str:
    schema = param.get("schema") or {}
    return str(schema.get("title") or name)


def _said(line: Mapping[str, Any]) -> str:
    """Return a line of a task's log, with what was raised."""
    errors = line.get("error_detail") or []
    return " ".join([str(line.get("event", "")), *(f"{e['exc_type']}: {e['exc_value']}" for e in errors)])
