"""P1: parse pipelines from YAML, against the same DAGs written in plain Python with the same operators.

The limit is a DAG file as a careful author writes it: same tasks, dependencies, params and documentation, no YAML, no
plan. Both run what Airflow does for each of them (param validation, default arguments); what differs is our part.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, Case, Place, Run

_EXAMPLE = ROOT / "dags" / "pipelines" / "tumour_triage.yaml"


def make(place: Place) -> None:
    """One YAML file per pipeline: copies of the example under names of their own."""
    folder = place.folder / "pipelines"
    folder.mkdir()
    for number in range(place.size):
        (folder / f"tumour_{number:03d}.yaml").write_text(_EXAMPLE.read_text(encoding="utf-8"), encoding="utf-8")


def _in_airflow_home(place: Place) -> None:
    os.environ.setdefault("AIRFLOW_HOME", str(place.folder / "airflow"))


def _shape(dags: dict[str, Any]) -> str:
    """Tasks with their kind, dependencies and rules, and the params, of every DAG."""
    lines = []
    for name, dag in sorted(dags.items()):
        lines.append(f"{name} {sorted(dag.params)} {sorted(dag.tags)} {type(dag.timetable).__name__}")
        for task in sorted(dag.tasks, key=lambda t: str(t.task_id)):
            after = sorted(task.upstream_task_ids)
            lines.append(f"  {task.task_id} {type(task).__name__} {after} {task.trigger_rule} {task.retries}")
    return "\n".join(lines)


def _kept(place: Place, who: str, build: Callable[[], dict[str, Any]]) -> Run:
    def run() -> None:
        dags = build()
        file = place.folder / f"{who}.txt"
        if not file.exists():
            file.write_text(_shape(dags), encoding="utf-8")

    return run


def open_limit(place: Place) -> Run:
    """Build the DAGs by hand."""
    _in_airflow_home(place)
    from benchmarks.by_hand import build

    names = [f"tumour_{number:03d}" for number in range(place.size)]
    return _kept(place, "limit", lambda: {name: build(name) for name in names})


def open_ours(place: Place) -> Run:
    """Load the folder."""
    _in_airflow_home(place)
    from airflow_ai_provider import load_pipelines

    folder: Path = place.folder / "pipelines"
    return _kept(place, "ours", lambda: load_pipelines(folder))


def check(place: Place) -> None:
    """Both make the same tasks."""
    by_hand, ours = ((place.folder / f"{who}.txt").read_text(encoding="utf-8") for who in ("limit", "ours"))
    assert by_hand == ours, f"{by_hand[:2000]}\n---\n{ours[:2000]}"
    assert ours.count("\n  ") == 8 * place.size


CASE = Case(
    title="pipelines from YAML to DAGs",
    unit="s",
    sizes=(300, 30),
    size_unit="pipelines",
    goal="≤ 1.2 of the same DAGs in plain Python",
    make=make,
    check=check,
    contenders={"limit": open_limit, "ours": open_ours},
    packages=("apache-airflow", "pydantic", "PyYAML"),
)
