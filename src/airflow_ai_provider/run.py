"""What a task learns from Airflow's context: which run this is, and where its files lie.

Invariant: core never sees a context; it gets these plain values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import UUID

from airflow_ai_provider.errors import SpecError


@dataclass(frozen=True)
class Run:
    """One run of a pipeline, as a task sees it.

    :param pipeline: the DAG's id.
    :param run_id: Airflow's run id.
    :param task_key: run id, task id and map index: the same on every retry and clear of this task.
    :param attempt: this try of the task, as a text that sorts behind those of the tries before; empty when unknown.
    :param run_type: ``scheduled``, ``manual``, ``backfill``, ``asset_triggered`` …
    :param window: the run's data interval; None when it has none, or one of zero width.
    :param period: the same; for a run without one its logical date, twice; None when it has neither.
    :param due: when the run was due: the end of its period, or when it was to run after.
    :param partition: the run's partition key; None when it has none.
    :param partition_time: the partition's time, else when the data interval begins; None when there is neither.
    :param params: the run's params: the trigger form's values over their defaults.
    """

    pipeline: str
    run_id: str
    task_key: str
    run_type: str
    window: tuple[datetime, datetime] | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    period: tuple[datetime, datetime] | None = None
    due: datetime | None = None
    partition: str | None = None
    partition_time: datetime | None = None
    attempt: str = ""

    @property
    def is_backfill(self) -> bool:
        """True in a run made by a backfill."""
        return self.run_type == "backfill"

    @property
    def is_muted(self) -> bool:
        """True when nothing may be done to the outside: a dry run, or a backfill that was not asked to act."""
        return bool(self.params.get("dry_run")) or (self.is_backfill and not self.params.get("act_in_backfill"))

    @property
    def replay(self) -> str:
        """Id of the prepared replay that this run lands instead of reading its source; empty in other runs."""
        return str(self.params.get("replay") or "")


def run_of(context: Mapping[str, Any]) -> Run:
    """Read the run from a task's context.

    :param context: Airflow's task context.
    """
    dag_run, ti = context["dag_run"], context["ti"]
    start, end = getattr(dag_run, "data_interval_start", None), getattr(dag_run, "data_interval_end", None)
    window = (start, end) if start and end and start < end else None
    date = getattr(dag_run, "logical_date", None)
    period = window or ((date, date) if date else None)
    return Run(
        pipeline=ti.dag_id,
        run_id=dag_run.run_id,
        attempt=_attempt_of(ti),
        task_key=f"{dag_run.run_id}/{ti.task_id}/{ti.map_index if ti.map_index is not None else -1}",
        run_type=str(getattr(dag_run.run_type, "value", dag_run.run_type)),
        window=window,
        partition=getattr(dag_run, "partition_key", None) or None,
        partition_time=getattr(dag_run, "partition_date", None) or start,
        params=dict(context.get("params") or {}),
        period=period,
        due=period[1] if period else getattr(dag_run, "run_after", None),
    )


def _attempt_of(ti: Any) -> str:
    """Airflow names each try anew, by a UUID that begins with the time; its number begins again in a run made anew."""
    name = getattr(ti, "id", None)
    return str(name) if isinstance(name, UUID) and name.version == 7 else ""


def homes_of(dag: Any) -> list[Path]:
    """Return the folders that relative paths are relative to: the DAG's ``template_searchpath``, its file's folder."""
    searched = getattr(dag, "template_searchpath", None) or []
    return [*map(Path, searched), Path(getattr(dag, "fileloc", None) or ".").resolve().parent]


def find_file(dag: Any, name: str, folder: str) -> str:
    """Find a file that the author named: a suite, a template.

    Looked for as given when the path is absolute, else beside the DAG file and in the DAG's ``template_searchpath``
    (the folder of the YAML file, for a pipeline from one): there itself, in ``<folder>``, in ``include/<folder>``, and
    in ``include/<folder>`` of the project around the dags folder.

    :param dag: the task's DAG.
    :param name: file name or path as written.
    :param folder: ``expectations``, ``templates``, ``corrections`` or ``keys``.
    :return: absolute path.
    :raises SpecError: when it is in none of these places; a retry does not help.
    """
    homes = homes_of(dag)
    places = [home / inner / name for home in homes for inner in ("", folder, f"include/{folder}")]
    places += [parent / "include" / folder / name for home in homes for parent in (home.parent, home.parent.parent)]
    places = list(dict.fromkeys(places))
    for place in places:
        if place.is_file():
            return str(place)
    looked = ", ".join(str(place) for place in places)
    raise SpecError(
        f"file {name!r} not found. Looked for: {looked}. Put it in one of these places, or give an absolute path.",
        faults=[(name, "file not found")],
    )
