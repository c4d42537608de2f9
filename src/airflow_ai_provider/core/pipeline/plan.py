"""A spec → the tasks that it becomes, as values: which tasks, with what, after what, skipped or joined how.

Invariants: pure; the same spec gives an equal plan; a task refers to another's output by :class:`Ref`, never by
object; every upstream is a task of the plan, and the order of tasks is one in which they can run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from airflow_ai_provider.core.infer.runner import FIELDS as RUNNER_FIELDS
from airflow_ai_provider.core.infer.shard import shards
from airflow_ai_provider.core.pipeline.section import SOURCE_KEYS, Infer, Ingest, Sections, Step, WakeUp
from airflow_ai_provider.core.pipeline.spec import Spec

# A branch skips what has no rows: a step runs when nothing failed and at least one of its sources has rows.
JOIN = "none_failed_min_one_success"
TEARDOWN = "all_done_setup_success"


@dataclass(frozen=True)
class Ref:
    """The output of another task.

    :param task_id: the task.
    :param route: one route of it; empty for the whole output.
    """

    task_id: str
    route: str = ""

    def __str__(self) -> str:
        return f"{self.task_id}.{self.route}" if self.route else self.task_id


@dataclass(frozen=True)
class Param:
    """A value that a person may change when triggering a run.

    :param default: taken by scheduled runs.
    :param type: JSON schema type.
    :param description: shown in the trigger form.
    :param bounds: further JSON schema keywords.
    """

    default: Any
    type: str
    description: str
    bounds: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskPlan:
    """One task.

    :param task_id: its id.
    :param verb: which operator: ``pin``, ``ingest`` (in shards: ``plan``, ``shard``, ``land``), ``infer``, ``gather``,
        ``decide``, ``review``, ``act``, ``undo``.
    :param arguments: the operator's own parameters: plain values, templates and :class:`Ref`.
    :param upstream: ids of the tasks before it, with those that its references imply.
    :param trigger_rule: when it runs, given what became of those.
    :param branches: for ``decide``: route → the tasks that take its rows.
    :param expand: the argument that the task is mapped over, with its values or the output that has them; empty for a
        task that is not mapped.
    :param placement: where it runs: ``gpu``, ``pool``, ``queue``.
    """

    task_id: str
    verb: str
    arguments: Mapping[str, Any]
    upstream: tuple[str, ...] = ()
    trigger_rule: str = "all_success"
    branches: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    expand: Mapping[str, Sequence[Any] | Ref] = field(default_factory=dict)
    placement: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON, without what few tasks have."""
        rare = ("expand", "placement")
        return {name: _plain(value) for name, value in vars(self).items() if value or name not in rare}


@dataclass(frozen=True)
class Plan:
    """A whole DAG.

    :param dag_id: the DAG's id.
    :param facts: the DAG's own keyword arguments: schedule, description, tags, start_date, catchup, max_active_runs,
        owner.
    :param params: the trigger form.
    :param tasks: in an order in which they can run.
    :param path: the file it comes from; empty for a text.
    """

    dag_id: str
    facts: Mapping[str, Any]
    params: Mapping[str, Param]
    tasks: tuple[TaskPlan, ...]
    path: str = ""

    def task(self, task_id: str) -> TaskPlan:
        """Return one task.

        :raises KeyError: when the plan has no such task.
        """
        return {task.task_id: task for task in self.tasks}[task_id]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON, for comparison and for tools; it does not hold the file's place."""
        return {
            "dag_id": self.dag_id,
            "facts": _plain(self.facts),
            "params": {name: _plain(vars(param)) for name, param in self.params.items()},
            "tasks": [task.to_dict() for task in self.tasks],
        }


def plan(spec: Spec) -> Plan:
    """Say which tasks a spec becomes.

    :param spec: a spec.
    :return: pin, ingest → infer → decide → review (when asked for) → the steps in order → undo (when a step has one).
    """
    tasks = [_pin(spec.sections.infer), *_ingest(spec.sections.ingest), *_infer(spec), _decide(spec)]
    if spec.sections.review:
        tasks.append(_review(spec))
    tasks += _steps(spec)
    tasks += _undo(spec)
    return Plan(spec.dag_id, _facts(spec), _params(spec), tuple(tasks), spec.path)


def _facts(spec: Spec) -> dict[str, Any]:
    s = spec.sections
    names = ("schedule", "description", "tags", "start_date", "catchup", "max_active_runs", "owner")
    return {name: getattr(s, name) for name in names} | {"schedule": _schedule(s)}


def _schedule(sections: Sections) -> str | dict[str, Any] | None:
    """A cron line as it is written; an event with what it watches."""
    schedule = sections.schedule
    if not isinstance(schedule, WakeUp):
        return schedule
    watched = _source(sections.ingest)
    return {"topic": watched, "sweep": schedule.sweep, "every_s": schedule.every.total_seconds()}


def _params(spec: Spec) -> dict[str, Param]:
    bar = {"minimum": 0, "maximum": 1}
    params = {
        "model": Param(
            spec.sections.infer.model, "string", "Model for this run: name@alias or name/version", {"minLength": 3}
        ),
        "model_policy": Param(
            spec.sections.infer.model_policy,
            "string",
            "Where its alias is looked up: current, as_run, as_of, several with commas between, or auto",
            {"minLength": 4},
        ),
        "act": Param(spec.policy.act, "number", "Act at or above this confidence", bar),
        "review": Param(spec.policy.review, "number", "Ask a person at or above this confidence; not above act", bar),
        "row_limit": Param(
            spec.sections.ingest.row_limit,
            "integer",
            "At most so many rows in this run; 0 sets no limit",
            {"minimum": 0},
        ),
        "dry_run": Param(False, "boolean", "Predict and decide, but send nothing and ask nobody"),
        "act_in_backfill": Param(False, "boolean", "Act and ask in a backfill too, which otherwise only decides"),
        "replay": Param("", "string", "Land this prepared replay of quarantined rows instead of reading the source"),
    }
    return params


def _pin(infer: Infer) -> TaskPlan:
    arguments = {
        "model": "{{ params.model }}",
        "model_policy": "{{ params.model_policy }}",
        "allow_pickle": infer.allow_pickle or None,
        "served": True if infer.endpoint else None,
        "signed_by": infer.signed_by,
    }
    return TaskPlan("pin", "pin", _given(arguments))


def _source(section: Ingest) -> dict[str, Any]:
    if section.kafka is not None:
        source: dict[str, Any] = {"kind": "kafka", "topic": section.kafka}
    else:
        source = {"kind": "files", "path": section.files}
    names = ("key", "format", *SOURCE_KEYS[source["kind"]])
    return source | _given({name: getattr(section, name) for name in names})


def _ingest(section: Ingest) -> Iterator[TaskPlan]:
    limits = _given({"rows": "{{ params.row_limit }}", "bytes": section.byte_limit, "until": section.until})
    taken = {"source": _source(section), "limits": limits}
    rules = _given({"expectations": section.expectations})
    landing = _given({"max_rejected": section.max_rejected, "dead_letters": section.dead_letter_topic})
    if section.shards is None:
        yield TaskPlan("ingest", "ingest", taken | rules | landing)
        return
    yield TaskPlan("ingest_plan", "plan", taken | {"shards": section.shards})
    yield TaskPlan("ingest_shard", "shard", rules, ("ingest_plan",), expand={"shard": Ref("ingest_plan")})
    # the task that lands has the name that others know: what comes after it is the same, cut or not
    yield TaskPlan("ingest", "land", {"parts": Ref("ingest_shard")} | landing, ("ingest_shard",))


def _infer(spec: Spec) -> Iterator[TaskPlan]:
    infer = spec.sections.infer
    arguments: dict[str, Any] = {
        "batch": Ref("ingest"),
        "model": Ref("pin"),
        "device": infer.device,
        "runner": _given({name: getattr(infer, name) for name in RUNNER_FIELDS}) or None,
    }
    placement = _given({name: getattr(infer, name) for name in ("gpu", "pool", "queue")})
    before = ("pin", "ingest")
    if infer.shards is None:
        arguments |= {"max_failed": infer.max_failed}
        yield TaskPlan("infer", "infer", _given(arguments), before, placement=placement)
        return
    expand = {"shard": shards(infer.shards)}
    yield TaskPlan("infer_shard", "infer", _given(arguments), before, expand=expand, placement=placement)
    whole = {
        "batch": Ref("ingest"),
        "model": Ref("pin"),
        "shards": Ref("infer_shard"),
        "max_failed": infer.max_failed,
    }
    yield TaskPlan("infer", "gather", _given(whole), (*before, "infer_shard"))


def _decide(spec: Spec) -> TaskPlan:
    policy = spec.policy.to_dict() | {"act": "{{ params.act }}", "review": "{{ params.review }}"}
    takers: dict[str, list[str]] = {"act": [], "review": [], "fallback": [], "hold": []}
    if spec.sections.review:
        takers["review"].append("review")
    for name, step in spec.steps:
        for route in spec.rows_of(step):
            if route != "review":
                takers[route].append(name)
    branches = {route: tuple(names) for route, names in takers.items()}
    arguments = {"predictions": Ref("infer"), "policy": policy}
    return TaskPlan("decide", "decide", arguments, ("infer",), branches=branches)


def _review(spec: Spec) -> TaskPlan:
    review = spec.sections.review
    assert review is not None
    arguments = {
        "rows": Ref("decide", "review"),
        "response_timeout": review.timeout,
        "on_timeout": review.on_timeout,
        "columns": review.columns,
        "max_rows": review.max_rows,
    }
    return TaskPlan("review", "review", _given(arguments), ("decide",), "none_failed")


def _steps(spec: Spec) -> Iterator[TaskPlan]:
    before: tuple[str, ...] = ()
    for name, step in spec.steps:
        routes = spec.rows_of(step)
        rows = tuple(Ref("review") if route == "review" else Ref("decide", route) for route in routes)
        upstream = dict.fromkeys([*(ref.task_id for ref in rows), *before])
        yield TaskPlan(name, "act", _call(step) | {"rows": rows}, tuple(upstream), JOIN)
        before = (name,)


def _call(step: Step) -> dict[str, Any]:
    method = step.methods[0]
    undo = step.undo.model_dump(exclude_none=True) if step.undo else None
    return _given(
        {
            "endpoint": getattr(step, method),
            "method": method.upper(),
            "json": step.body,
            "undo": undo,
            "max_refused": step.max_refused,
        }
    )


def _undo(spec: Spec) -> Iterator[TaskPlan]:
    names = [name for name, _ in spec.steps]
    first = next((at for at, (_, step) in enumerate(spec.steps) if step.undo), None)
    if first is not None:
        watched = tuple(names[first:])
        yield TaskPlan("undo", "undo", {"actions": tuple(Ref(name) for name in watched)}, watched, TEARDOWN)


def _given(arguments: dict[str, Any]) -> dict[str, Any]:
    """Leave out what the author left out, so that the operator's own default holds."""
    return {name: value for name, value in arguments.items() if value is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Ref):
        return {"ref": str(value)}
    if isinstance(value, timedelta):
        return write_duration(value)
    return value.isoformat() if isinstance(value, datetime) else value


def write_duration(value: timedelta) -> str:
    """Write a duration as the author does: ``4h``, ``1h30m``."""
    seconds, text = int(value.total_seconds()), ""
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, seconds = divmod(seconds, size)
        text += f"{count}{unit}" if count else ""
    return text
