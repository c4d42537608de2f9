"""The sections of a pipeline file, typed: what may be written under each key.

Invariants: frozen; unknown keys are faults; numbers, texts and yes-or-no are never turned into each other; what needs
two sections to judge is judged in ``spec.py``.
"""

from __future__ import annotations

import re
from datetime import UTC, date, datetime, time, timedelta
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Strict, Tag

from airflow_ai_provider.core.batch import share_or_count
from airflow_ai_provider.core.infer.choose import read_policies
from airflow_ai_provider.core.infer.shard import MOST
from airflow_ai_provider.core.ingest.limit import Limits, read_duration
from airflow_ai_provider.core.ingest.shard import MOST as MOST_INGESTING
from airflow_ai_provider.errors import SpecError

SOURCE_KEYS = {
    "kafka": ("by", "group", "reader_schema", "kafka_conn_id", "schema_registry_conn_id"),
    "files": ("name", "fs_conn_id", "verify"),
}
"""Keys of ``ingest`` that only one kind of source has, by their names in its value."""
METHODS = ("post", "put", "patch", "delete")
Route = Literal["act", "review", "fallback"]
_NAMES = ("once", "continuous", "hourly", "daily", "midnight", "weekly", "monthly", "quarterly", "yearly", "annually")
_PRESETS = tuple(f"@{name}" for name in _NAMES)
_ATOM = r"(?:[*?LR]|\d{1,2}|[A-Za-z]{3})[LW]?"
_FIELD = rf"{_ATOM}(?:[-/#,]{_ATOM})*"  # what a cron field looks like; Airflow judges its numbers


def _read_limit(value: Any) -> Any:
    try:
        # A bool is an int to Python, and "yes" a bool to YAML.
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            share_or_count(value)
            return value
    except SpecError:
        pass
    raise ValueError(f"{value!r} is not a share or a count of rows. Write 20%, 0.2 or 50")


def _read_bytes(value: Any) -> Any:
    if isinstance(value, int | str) and not isinstance(value, bool):
        _demand_limit(Limits(bytes=value), "a number of bytes. Write 500MB, 2GiB or a whole number")
        return value
    raise ValueError(f"{value!r} is not a number of bytes. Write 500MB, 2GiB or a whole number")


def _read_until(value: Any) -> Any:
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).isoformat()
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is neither a time nor an age. Write 2026-01-31T12:00:00Z, 5m or a template")
    if "{{" not in value:
        _demand_limit(Limits(until=value), "a time or an age. Write 2026-01-31T12:00:00Z, 5m or a template")
    return value


def _demand_limit(limits: Limits, what: str) -> None:
    try:
        limits.read(datetime(2026, 1, 1, tzinfo=UTC))
    except (SpecError, ValueError):
        raise ValueError(f"{limits.bytes or limits.until!r} is not {what}") from None


def _read_schedule(value: str) -> str:
    if value.startswith("@"):
        if value not in _PRESETS:
            raise ValueError(f"{value!r} is not a preset. There are {', '.join(_PRESETS)}")
    elif not re.fullmatch(rf"({_FIELD}\s+){{4,5}}{_FIELD}", value):
        near = f"@{value}" if f"@{value}" in _PRESETS else "@hourly"
        raise ValueError(f'{value!r} is not a schedule. Write a preset such as "{near}", a cron line or null')
    return value


def _read_sweep(value: str) -> str:
    if value in ("@once", "@continuous"):
        raise ValueError(f'{value!r} is no sweep by the clock. Write a preset such as "@hourly" or a cron line')
    return _read_schedule(value)


def _read_start(value: Any) -> datetime:
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            raise ValueError(f"{value!r} is not a date. Write it as 2026-01-31") from None
    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime.combine(value, time())
    if not isinstance(value, datetime):
        raise ValueError(f"{value!r} is not a date. Write it as 2026-01-31")
    return value if value.tzinfo else value.replace(tzinfo=UTC)


def _read_model(value: str) -> str:
    if not re.fullmatch(r"[^@/\s]+(@[\w-]+|/[1-9]\d*)", value):
        raise ValueError(f"{value!r} names no model. Write name@alias (triage@champion) or name/version (triage/3)")
    return value


def _read_policy(value: Any) -> Any:
    try:
        policies = read_policies(value)
    except (SpecError, TypeError):
        several = "Write auto, or one of current, as_run and as_of, or a list of these"
        raise ValueError(f"{value!r} does not say where the model is looked up. {several}") from None
    return value if value == "auto" else ", ".join(policies)


def _read_endpoint(value: str) -> str:
    if not value.startswith("/"):
        raise ValueError(f"{value!r} must start with '/': host and port are the connection's")
    if re.search(r"\s", value):
        raise ValueError(f"{value!r} has a space in it")
    if re.sub(r"\{\w+\}", "", value).count("{") or re.sub(r"\{\w+\}", "", value).count("}"):
        raise ValueError(f"{value!r} has a brace that names no field. Write it as {{id}}")
    return value


def _read_answer(value: Any) -> Any:
    if not isinstance(value, str | int | float | bool):
        raise ValueError(f"{value!r} is not a text, a number or yes or no")
    return value


def _demand_text(value: str) -> str:
    if not value.strip():
        raise ValueError("is empty")
    return value


Text = Annotated[str, AfterValidator(_demand_text)]
Answer = Annotated[Any, AfterValidator(_read_answer)]
Limit = Annotated[float | int | str, BeforeValidator(_read_limit)]
Endpoint = Annotated[str, AfterValidator(_read_endpoint)]
Bar = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class Section(BaseModel):
    """A mapping with known keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Ingest(Section):
    """Where rows come from, and what they must fulfil."""

    kafka: Text | None = None
    files: Text | None = None
    format: (
        Literal["auto", "json", "json_schema", "avro", "protobuf", "text", "bytes", "jsonl", "csv", "parquet", "image"]
        | None
    ) = None
    key: Text | None = None
    by: Literal["cursor", "window"] | None = None
    group: Text | None = None
    reader_schema: Text | None = None
    kafka_conn_id: Text | None = None
    schema_registry_conn_id: Text | None = None
    name: Text | None = None
    fs_conn_id: Text | None = None
    verify: Literal["changed", "always"] | None = None
    expectations: Text | None = None
    max_rejected: Limit | None = None
    row_limit: Annotated[int, Field(ge=0)] = 0
    dead_letter_topic: Text | None = None
    byte_limit: Annotated[int | str, BeforeValidator(_read_bytes)] | None = None
    until: Annotated[str, BeforeValidator(_read_until)] | None = None
    shards: Annotated[int, Field(ge=1, le=MOST_INGESTING)] | None = None


class Infer(Section):
    """Which model predicts, and on what."""

    model: Annotated[str, AfterValidator(_read_model)]
    model_policy: Annotated[str, BeforeValidator(_read_policy)] = "auto"
    allow_pickle: Annotated[tuple[Text, ...], Strict(False)] = ()
    signed_by: Text | None = None
    device: Literal["auto", "cpu", "cuda", "require_cuda"] = "auto"
    batch_size: Annotated[int, Field(ge=1)] | None = None
    max_failed: Limit | None = None
    endpoint: Text | None = None
    engine: Literal["local", "ray", "spark"] | None = None
    cluster: Text | None = None
    workers: Annotated[int, Field(ge=1)] | None = None
    precision: Literal["bfloat16", "float16"] | None = None
    compile: bool | None = None
    shards: Annotated[int, Field(ge=1, le=MOST)] | None = None
    gpu: Annotated[int, Field(ge=1)] | None = None
    pool: Text | None = None
    queue: Text | None = None


class FallbackRule(Section):
    """What decides where the model is not sure."""

    rule: Text
    then: Answer = True
    otherwise: Annotated[Answer, Field(alias="else")] = False


class Decide(Section):
    """The two bars, and what becomes of the rest."""

    act: Bar
    review: Bar
    otherwise: Literal["fallback", "review", "hold"] | None = None
    fallback: FallbackRule | None = None


class Review(Section):
    """How a person is asked."""

    timeout: Annotated[timedelta, BeforeValidator(read_duration)]
    on_timeout: Literal["hold", "fail"] = "hold"
    columns: Annotated[tuple[Text, ...], Strict(False)] | None = None
    max_rows: Annotated[int, Field(ge=1, le=1000)] = 100


class UndoCall(Section):
    """The call that undoes a step."""

    delete: Endpoint | None = None
    post: Endpoint | None = None
    put: Endpoint | None = None
    patch: Endpoint | None = None


class Step(Section):
    """One effect per row on the outside."""

    post: Endpoint | None = None
    put: Endpoint | None = None
    patch: Endpoint | None = None
    delete: Endpoint | None = None
    body: Annotated[Text | None, Field(alias="json")] = None
    rows: Annotated[tuple[Route, ...], Strict(False)] | None = None
    undo: UndoCall | None = None
    max_refused: Limit = 0

    @property
    def methods(self) -> list[str]:
        """The methods that are written; a step that can be run has one."""
        return [name for name in METHODS if getattr(self, name) is not None]


class WakeUp(Section):
    """A schedule that an event starts, and the clock besides."""

    when: Literal["topic"]  # not "on", which YAML reads as true
    sweep: Annotated[str, AfterValidator(_read_sweep)] | None = "@hourly"
    every: Annotated[timedelta, BeforeValidator(read_duration)] = timedelta(seconds=10)


# A tag becomes part of a fault's path; fault.py takes it out again.
Schedule = Annotated[
    Annotated[str, AfterValidator(_read_schedule), Tag("cron")] | Annotated[WakeUp, Tag("event")],
    Discriminator(lambda value: "event" if isinstance(value, dict | WakeUp) else "cron"),
]


class Sections(Section):
    """A whole file."""

    schedule: Schedule | None = None
    description: str = ""
    tags: Annotated[tuple[Text, ...], Strict(False)] = ()
    start_date: Annotated[datetime, BeforeValidator(_read_start)] | None = None
    catchup: bool = False
    max_active_runs: Annotated[int, Field(ge=1)] = 1
    owner: Text = "airflow"
    ingest: Ingest
    infer: Infer
    decide: Decide
    review: Review | None = None
    act: Annotated[tuple[dict[str, Step], ...], Strict(False)] = ()
