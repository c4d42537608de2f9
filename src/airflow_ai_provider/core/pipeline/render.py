"""A plan as text that a person reads before it runs: facts, tasks, the flow of rows, the trigger form.

Invariant: pure; the same plan gives the same text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

from airflow_ai_provider.core.pipeline.plan import Param, Plan, Ref, TaskPlan, write_duration


def render(plan: Plan) -> str:
    """Draw a plan.

    :param plan: the plan.
    :return: lines of text, without trailing newline.
    """
    return "\n".join(line.rstrip() for line in _lines(plan))


def _lines(plan: Plan) -> Iterator[str]:
    facts = plan.facts
    runs = "one run at a time" if facts["max_active_runs"] == 1 else f"up to {facts['max_active_runs']} runs at a time"
    catchup = "catches up" if facts["catchup"] else "no catchup"
    yield f"{plan.dag_id}  {_schedule(facts['schedule'])}, {runs}, {catchup}"
    if facts["description"]:
        yield f"  {facts['description']}"
    yield ""
    yield "flow"
    yield from (f"  {line}" for line in _flow(plan))
    yield ""
    yield "tasks"
    width = max(len(task.task_id) for task in plan.tasks)
    for task in plan.tasks:
        yield from _task(task, width, {f"{{{{ params.{name} }}}}": param for name, param in plan.params.items()})
    yield ""
    yield "trigger form (* above)"
    for name, param in plan.params.items():
        yield f"  {name:<16}{_value(param.default):<20}{param.description}{_bounds(param)}"


def _schedule(schedule: str | Mapping[str, Any] | None) -> str:
    if not isinstance(schedule, Mapping):
        return schedule or "no schedule"
    sweep = f"swept {schedule['sweep']}" if schedule["sweep"] else "never swept"
    return f"when {schedule['topic']['topic']} grows ({sweep})"


def _flow(plan: Plan) -> Iterator[str]:
    decide = plan.task("decide")
    otherwise = decide.arguments["policy"]["otherwise"]
    reviewed = [t.task_id for t in plan.tasks if t.verb == "act" and Ref("review") in t.arguments["rows"]]
    asked = ["review ─▶ " + ", ".join(reviewed) if reviewed else "review"] if decide.branches["review"] else []
    branches = {"act": decide.branches["act"], "review": asked}
    if otherwise != "review":
        branches[otherwise] = decide.branches[otherwise]
    lines = [_branch(route, takers) for route, takers in branches.items()]
    cut = next((task for task in plan.tasks if task.verb == "plan"), None)
    if cut is not None:
        yield f"ingest_plan ─▶ ingest_shard ×{cut.arguments['shards']} ─▶ ingest"
    named = [t.expand["shard"] for t in plan.tasks if t.task_id == "infer_shard"]
    mapped = "".join(f"infer_shard ×{len(names)} ─▶ " for names in named if not isinstance(names, Ref))
    stem = f"ingest ─┴▶ {mapped}infer ─▶ decide ─"
    yield "pin ────┐"
    yield f"{stem}┬─ {lines[0]}"
    yield from (f"{' ' * len(stem)}├─ {line}" for line in lines[1:-1])
    yield f"{' ' * len(stem)}└─ {lines[-1]}"
    steps = [t.task_id for t in plan.tasks if t.verb in ("act", "undo")]
    if len(steps) > 1:
        yield "order: " + " ─▶ ".join(steps)


def _branch(route: str, takers: Sequence[str]) -> str:
    return f"{route:<9}─▶ {', '.join(takers)}" if takers else f"{route:<9}   rows rest in the store"


def _task(task: TaskPlan, width: int, params: dict[str, Param]) -> Iterator[str]:
    after = f"after {', '.join(task.upstream)}" if task.upstream else "at once"
    rule = "" if task.trigger_rule == "all_success" else f"  [{task.trigger_rule}]"
    yield f"  {task.task_id:<{width}}  {task.verb:<7} {after}{rule}"
    mapped = {f"{name} of": _items(values) for name, values in task.expand.items()}
    for name, value in {**task.arguments, **mapped, **task.placement}.items():
        text = _value(value)
        for template, param in params.items():
            text = text.replace(template, f"{_value(param.default)} *")
        yield f"  {'':<{width}}    {name}: {text}"


def _items(values: Any) -> str:
    return f"each of {values}" if isinstance(values, Ref) else f"{values[0]} … {values[-1]}"


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_value(item)}" for key, item in value.items() if item is not None)
    if isinstance(value, list | tuple):
        return " + ".join(_value(item) for item in value)
    if isinstance(value, timedelta):
        return write_duration(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def _bounds(param: Param) -> str:
    low, high = param.bounds.get("minimum"), param.bounds.get("maximum")
    if low is None:
        return ""
    return f" ({low} to {high})" if high is not None else f" (from {low})"
