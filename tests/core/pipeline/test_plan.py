"""The plan: which tasks, joined how; what holds for any spec."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest

from airflow_ai_provider.core.ingest.source import FileSource, KafkaSource, source_from_dict
from airflow_ai_provider.core.pipeline.plan import JOIN, TEARDOWN, Plan, Ref, plan
from airflow_ai_provider.core.pipeline.render import render
from airflow_ai_provider.core.pipeline.spec import load_spec, parse_spec

BASE = "ingest: {kafka: t}\ninfer: {model: m@a}\n"
PLAIN = "decide: {act: 0.9, review: 0.5}\n"
RULED = "decide: {act: 0.9, review: 0.5, fallback: {rule: x > 1, then: a, else: b}}\n"
REVIEW = "review: {timeout: 4h}\n"


def made(*parts: str) -> Plan:
    return plan(parse_spec(BASE + "".join(parts), "p"))


def steps(*bodies: str) -> str:
    return "act:\n" + "".join(f"  - s{i}: {{post: /s{i}{body}}}\n" for i, body in enumerate(bodies))


UNDO = ', undo: {delete: "/x/{id}"}'
VARIANTS = [
    made(decide, review, acts)
    for decide in (PLAIN, RULED)
    for review in ("", REVIEW)
    for acts in ("", steps(""), steps(UNDO, ""), steps("", UNDO, ""), steps(", rows: [act]", UNDO))
]


@pytest.mark.parametrize("p", VARIANTS)
def test_tasks_stand_in_an_order_in_which_they_can_run(p: Plan) -> None:
    seen: set[str] = set()
    for task in p.tasks:
        assert set(task.upstream) <= seen
        referred = {ref.task_id for ref in _refs(task.arguments)}
        assert referred <= set(task.upstream)
        seen.add(task.task_id)
    assert len(seen) == len(p.tasks)


def _refs(value: object) -> list[Ref]:
    if isinstance(value, Ref):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [ref for item in items for ref in _refs(item)]


@pytest.mark.parametrize("p", VARIANTS)
def test_a_step_survives_any_choice_of_the_branch_that_gives_it_rows(p: Plan) -> None:
    """Play the branch as Airflow does it, for every set of routes that have rows."""
    decide = p.task("decide")
    for count in range(1, 4):
        for full in combinations(["act", "review", "fallback"], count):
            states = _play(p, set(full))
            for task in p.tasks:
                if task.verb == "act":
                    takes = {ref.route or "review" for ref in task.arguments["rows"]}
                    if takes & set(full):
                        assert states[task.task_id] == "success", (full, task.task_id, states)
            assert all(name in states for route in full for name in decide.branches[route])


def _play(p: Plan, full: set[str]) -> dict[str, str]:
    decide = p.task("decide")
    followed = {name for route in full for name in decide.branches[route]}
    direct = {task.task_id for task in p.tasks if "decide" in task.upstream}
    kept = followed | {below for name in followed for below in _below(p, name)}
    states: dict[str, str] = {}
    for task in p.tasks:
        above = [states[name] for name in task.upstream]
        if task.task_id in direct - kept:
            states[task.task_id] = "skipped"
        elif task.trigger_rule == "all_success" or not above:
            states[task.task_id] = "success" if set(above) <= {"success"} else "skipped"
        elif task.trigger_rule == JOIN:
            states[task.task_id] = "success" if "success" in above else "skipped"
        else:
            states[task.task_id] = "success"
    return states


def _below(p: Plan, name: str) -> set[str]:
    direct = {task.task_id for task in p.tasks if name in task.upstream}
    return direct | {below for child in direct for below in _below(p, child)}


def test_steps_run_one_after_the_other_and_undo_last() -> None:
    p = made(RULED, REVIEW, steps("", UNDO, ""))
    assert [task.task_id for task in p.tasks] == [
        "pin",
        "ingest",
        "infer",
        "decide",
        "review",
        "s0",
        "s1",
        "s2",
        "undo",
    ]
    assert "s0" in p.task("s1").upstream
    assert "s1" in p.task("s2").upstream
    assert p.task("undo").upstream == ("s1", "s2")  # s0 comes before all that can be undone
    assert p.task("undo").trigger_rule == TEARDOWN
    assert {p.task(name).trigger_rule for name in ("s0", "s1", "s2")} == {JOIN}


def test_without_an_undo_there_is_no_undo_task() -> None:
    assert [task.task_id for task in made(PLAIN, steps("", "")).tasks][-1] == "s1"


def test_what_may_vary_per_run_is_a_param_with_bounds() -> None:
    p = made(RULED)
    assert list(p.params) == [
        "model",
        "model_policy",
        "act",
        "review",
        "row_limit",
        "dry_run",
        "act_in_backfill",
        "replay",
    ]
    assert p.params["act"].default == 0.9
    assert p.params["act"].bounds == {"minimum": 0, "maximum": 1}
    assert p.task("pin").arguments["model"] == "{{ params.model }}"
    assert p.task("decide").arguments["policy"]["review"] == "{{ params.review }}"


def test_the_same_spec_gives_an_equal_plan() -> None:
    assert made(RULED, REVIEW, steps(UNDO)) == made(RULED, REVIEW, steps(UNDO))
    assert made(RULED) != made(PLAIN)
    with pytest.raises(KeyError):
        made(PLAIN).task("absent")


@pytest.mark.parametrize("p", VARIANTS)
def test_the_text_names_every_task_and_breaks_no_line(p: Plan) -> None:
    text = render(p)
    assert all(task.task_id in text for task in p.tasks)
    assert all(line == line.rstrip() for line in text.splitlines())


def test_a_source_in_a_file_is_the_source_in_python() -> None:
    golden = Path(__file__).parents[2] / "golden"
    written = {
        "sources.yaml": KafkaSource(
            "biopsies",
            key="biopsy_id",
            by="window",
            kafka_conn_id="cluster",
            format="avro",
            group="triage-lag",
            schema_registry_conn_id="registry",
            reader_schema="biopsy.avsc",
        ),
        "folders.yaml": FileSource(
            "s3://lake/in/day={partition}/*.parquet", name="readings", fs_conn_id="lake", verify="always"
        ),
    }
    for name, value in written.items():
        arguments = plan(load_spec(golden / name)).task("ingest").arguments
        assert source_from_dict(arguments["source"]) == value
