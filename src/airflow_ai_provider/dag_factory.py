"""A plan → a DAG: the only file that knows both the spec and the operators.

Invariants: building a DAG loads no model, table or database library; one faulty pipeline file never takes the others
down: it becomes a DAG without a schedule that says what is wrong.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from airflow.sdk import DAG, BaseOperator, CronDataIntervalTimetable, Param, XComArg

from airflow_ai_provider.core.ingest.source import KafkaSource
from airflow_ai_provider.core.pipeline.plan import Plan, Ref, TaskPlan, plan
from airflow_ai_provider.core.pipeline.render import render
from airflow_ai_provider.core.pipeline.spec import load_spec
from airflow_ai_provider.errors import SpecError
from airflow_ai_provider.operators.act import ApiActionOperator, CompensateOperator
from airflow_ai_provider.operators.decide import ConfidenceBranchOperator, ReviewOperator
from airflow_ai_provider.operators.infer import BatchInferenceOperator, GatherPredictionsOperator, PinModelOperator
from airflow_ai_provider.operators.ingest import ValidatedIngestOperator
from airflow_ai_provider.operators.shard import IngestShardOperator, LandBatchOperator, PlanIngestOperator
from airflow_ai_provider.place import placement

log = logging.getLogger(__name__)

_OPERATORS: Mapping[str, type[BaseOperator]] = {
    "pin": PinModelOperator,
    "ingest": ValidatedIngestOperator,
    "plan": PlanIngestOperator,
    "shard": IngestShardOperator,
    "land": LandBatchOperator,
    "infer": BatchInferenceOperator,
    "gather": GatherPredictionsOperator,
    "decide": ConfidenceBranchOperator,
    "review": ReviewOperator,
    "act": ApiActionOperator,
    "undo": CompensateOperator,
}
# A pipeline survives a broker, registry or API that is away for a quarter of an hour; terminal errors fail at once.
_RETRIES = {"retries": 4, "retry_delay": timedelta(seconds=30), "retry_exponential_backoff": 2.0}
_SINCE = datetime(2026, 1, 1, tzinfo=UTC)


def load_pipelines(folder: str | Path) -> dict[str, DAG]:
    """Make one DAG of each pipeline file of a folder.

    :param folder: holds ``*.yaml``; the file's name is the DAG's id.
    :return: DAG id → DAG, for ``globals().update(…)`` in a DAG file. A faulty file gives a DAG without a schedule,
        tagged ``faulty``, whose documentation lists all faults and whose only task fails with them.
    """
    dags = {}
    for path in sorted(Path(folder).glob("*.yaml")):
        try:
            dags[path.stem] = build_dag(plan(load_spec(path)))
        except SpecError as error:
            log.error("%s", error)
            dags[path.stem] = _faulty_dag(path, error)
    return dags


def build_dag(plan: Plan) -> DAG:
    """Make the DAG of a plan.

    :param plan: from :func:`airflow_ai_provider.core.pipeline.plan.plan`.
    :return: the DAG. A cron schedule gives each run the data interval before it, so a backfill works by window.
    """
    facts = plan.facts
    params = {n: Param(p.default, type=p.type, description=p.description, **p.bounds) for n, p in plan.params.items()}
    dag = DAG(
        plan.dag_id,
        description=facts["description"] or None,
        schedule=_timetable(facts["schedule"]),
        start_date=facts["start_date"] or _SINCE,
        catchup=facts["catchup"],
        max_active_runs=facts["max_active_runs"],
        tags={"ai", *facts["tags"]},
        default_args={"owner": facts["owner"], **_RETRIES},
        params=params,
        # Suites and templates named in a pipeline are looked for beside it.
        template_searchpath=[str(Path(plan.path).resolve().parent)] if plan.path else None,
        doc_md=f"{facts['description']}\n\n```text\n{render(plan)}\n```",
    )
    tasks: dict[str, Any] = {}
    for task in plan.tasks:
        arguments = {name: _resolve(value, tasks) for name, value in task.arguments.items()}
        if task.verb != "undo":  # a teardown sets its own
            arguments["trigger_rule"] = task.trigger_rule
        made = tasks[task.task_id] = _make(task, dag, arguments | placement(**task.placement), tasks)
        # References have set most dependencies already; setting one again costs a warning.
        made.set_upstream([tasks[name] for name in task.upstream if name not in made.upstream_task_ids])
    return dag


def _timetable(schedule: str | Mapping[str, Any] | None) -> Any:
    if isinstance(schedule, Mapping):
        from airflow_ai_provider.schedule import on_topic

        source = KafkaSource.from_dict(schedule["topic"])
        return on_topic(source, sweep=schedule["sweep"], every=timedelta(seconds=schedule["every_s"]))
    if schedule in (None, "@once", "@continuous"):
        return schedule
    return CronDataIntervalTimetable(schedule, timezone="UTC")


def _make(task: TaskPlan, dag: DAG, arguments: Mapping[str, Any], tasks: Mapping[str, Any]) -> Any:
    operator = _OPERATORS[task.verb]
    if not task.expand:
        return operator(task_id=task.task_id, dag=dag, **arguments)
    return operator.partial(task_id=task.task_id, dag=dag, **arguments).expand(**_resolve(task.expand, tasks))


def _resolve(value: Any, tasks: Mapping[str, Any]) -> Any:
    """Replace references by the other tasks' outputs, at any depth."""
    if isinstance(value, Ref):
        return XComArg(tasks[value.task_id], value.route or "return_value")
    if isinstance(value, Mapping):
        return {key: _resolve(item, tasks) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_resolve(item, tasks) for item in value]
    return value


def _faulty_dag(path: Path, error: SpecError) -> DAG:
    faults = "\n".join(f"- {place or 'file'}: {text}" for place, text in error.faults)
    dag = DAG(path.stem, schedule=None, tags={"ai", "faulty"}, doc_md=f"**{path.name} cannot be run.**\n\n{faults}")
    _FaultsOperator(task_id="faults", message=str(error), dag=dag)
    return dag


class _FaultsOperator(BaseOperator):
    """Fail with what is wrong with a pipeline file."""

    def __init__(self, *, message: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.message = message

    def execute(self, context: Any) -> None:
        """Fail."""
        raise SpecError(self.message)
