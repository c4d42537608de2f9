"""A pipeline file → a spec that can be run, or one error with all its faults, each with its path and line.

Invariants: a Spec that exists can be planned; no fault hides another of a different section; reading a spec touches
nothing but its own file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from airflow_ai_provider.core.decide.policy import Fallback, Policy
from airflow_ai_provider.core.decide.rule import find_faults
from airflow_ai_provider.core.infer.runner import FIELDS as RUNNER_FIELDS
from airflow_ai_provider.core.infer.runner import Runner
from airflow_ai_provider.core.pipeline.document import Document, DocumentError, Fault, Location, read_document
from airflow_ai_provider.core.pipeline.fault import explain, path_of
from airflow_ai_provider.core.pipeline.section import (
    METHODS,
    SOURCE_KEYS,
    Decide,
    FallbackRule,
    Infer,
    Ingest,
    Section,
    Sections,
    Step,
    WakeUp,
)
from airflow_ai_provider.errors import SpecError

T = TypeVar("T", bound=Section)
TASKS = ("pin", "ingest_plan", "ingest_shard", "ingest", "infer_shard", "infer", "decide", "review", "undo")
_FORMATS = {
    "kafka": ("json", "json_schema", "avro", "protobuf", "text", "bytes"),
    "files": ("auto", "jsonl", "csv", "parquet", "image"),
}


@dataclass(frozen=True)
class Spec:
    """What the author wrote, checked.

    :param dag_id: the DAG's id: the file's name without its ending.
    :param path: the file; empty when the spec was read from a text.
    :param sections: the file's sections, typed, with defaults filled in.
    :param policy: the policy that ``decide`` describes.
    """

    dag_id: str
    path: str
    sections: Sections
    policy: Policy

    @property
    def steps(self) -> tuple[tuple[str, Step], ...]:
        """The steps under ``act``, in order, with their names."""
        return tuple((name, step) for item in self.sections.act for name, step in item.items())

    def rows_of(self, step: Step) -> tuple[str, ...]:
        """Return the routes that a step acts on: those written, else every route on which something is decided."""
        if step.rows is not None:
            return tuple(dict.fromkeys(step.rows))
        review = ("review",) if self.sections.review else ()
        fallback = ("fallback",) if self.policy.fallback else ()
        return ("act", *review, *fallback)


def load_spec(path: str | Path) -> Spec:
    """Read a pipeline file.

    :param path: a YAML file; its name without the ending becomes the DAG's id.
    :return: the spec, which can be planned.
    :raises SpecError: when the file cannot be read or run, with every fault; a retry does not help.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _error(str(path), [((), 1, f"cannot be read: {error}")]) from error
    return parse_spec(text, Path(path).stem, str(path))


def parse_spec(text: str, dag_id: str, path: str = "") -> Spec:
    """Read a pipeline from its text.

    :param text: YAML.
    :param dag_id: the DAG's id.
    :param path: where the text comes from, for messages.
    :raises SpecError: as :func:`load_spec`.
    """
    name = path or f"{dag_id}.yaml"
    try:
        document = read_document(text)
    except DocumentError as error:
        raise _error(name, [((), line, fault) for line, fault in error.faults]) from error
    if not isinstance(document.data, dict):
        what = "is empty" if document.data is None else "is not a mapping"
        raise _error(name, [((), 1, f"the file {what}. Write at least ingest, infer and decide")])
    sections, faults = _read_sections(document)
    if not re.fullmatch(r"[\w.-]{1,200}", dag_id):
        faults.append(((), f"{dag_id!r} cannot be a DAG id. Name the file with letters, digits, - _ and . only"))
    if sections is None or faults:
        raise _error(name, [(location, document.line_of(location), fault) for location, fault in faults])
    policy = _policy(sections.decide)
    return Spec(dag_id, path, sections, policy)


def _error(name: str, faults: list[tuple[Location, int, str]]) -> SpecError:
    ordered = sorted(faults, key=lambda fault: fault[1])
    lines = [f"  line {line}: " + (f"{path_of(loc)}: " if loc else "") + text for loc, line, text in ordered]
    count = "1 fault" if len(lines) == 1 else f"{len(lines)} faults"
    return SpecError(
        f"{name} has {count}:\n" + "\n".join(lines),
        faults=[(path_of(location), text) for location, _, text in ordered],
        path=name,
    )


def _read_sections(document: Document) -> tuple[Sections | None, list[Fault]]:
    data = document.data
    try:
        sections = Sections.model_validate(data)
        faults: list[Fault] = []
    except ValidationError as error:
        sections, faults = None, explain(error)
    # Each section is judged for itself, so that a fault in one does not hide those of another.
    # Dependencies between keys are judged on what is sound, so that a faulty key does not hide them.
    faults += _ingest_faults(data.get("ingest"))
    faults += _infer_faults(data.get("infer"))
    faults += _decide_faults(data.get("decide"))
    faults += _step_faults(data)
    if "review" in data and data["review"] is None:
        faults.append((("review",), "is empty. Write {timeout: 4h}, or leave it out: then review rows are held"))
    if sections is not None and sections.schedule == "@continuous" and sections.max_active_runs != 1:
        faults.append((("max_active_runs",), f"is {sections.max_active_runs}; @continuous allows one run at a time"))
    faults += _schedule_faults(data)
    return sections, faults


def _schedule_faults(data: Mapping[str, Any]) -> Iterator[Fault]:
    if _sound(WakeUp, data.get("schedule")) is None:
        return
    ingest = _sound(Ingest, data.get("ingest"))
    topic = ingest.kafka if ingest is not None else "unknown"
    if topic is None:
        yield ("schedule", "when"), "is topic, and ingest reads files. Write a preset or a cron line"
    elif "{{" in topic:
        yield ("schedule", "when"), f"is topic, and {topic!r} is known only to a run. Write the topic's own name"


def _sound(kind: type[T], value: Any, stand_ins: Mapping[str, Any] | None = None) -> T | None:
    """Read a section without its faulty keys.

    :param stand_ins: taken for required keys that are faulty.
    :return: the section; None when it is no mapping, or a required key without stand-in is faulty.
    """
    if not isinstance(value, dict):
        return None
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        faulty = {detail["loc"][0] for detail in error.errors() if detail["loc"]}
    try:
        return kind.model_validate(
            dict(stand_ins or {}) | {key: item for key, item in value.items() if key not in faulty}
        )
    except ValidationError:
        return None


def _ingest_faults(raw: Any) -> Iterator[Fault]:
    ingest = _sound(Ingest, raw)
    if ingest is None:
        return
    sources = [name for name in _FORMATS if raw.get(name) is not None]
    if len(sources) != 1:
        found = "both are written" if sources else "neither is written"
        yield ("ingest",), f"needs either kafka: TOPIC or files: PATTERN; {found}"
        return
    fits = _FORMATS[sources[0]]
    if ingest.format is not None and ingest.format not in fits:
        what = f"{ingest.format!r} is not a format of {sources[0]}. There is {', '.join(fits)}"
        yield ("ingest", "format"), what
    yield from _source_faults(ingest, sources[0])
    if ingest.until is not None and sources[0] == "files":
        yield ("ingest", "until"), "is for topics: files have no time of arrival. Leave it out"
    yield from _topic_faults(ingest)


def _source_faults(ingest: Ingest, source: str) -> Iterator[Fault]:
    for kind, keys in SOURCE_KEYS.items():
        for name in keys if kind != source else ():
            if getattr(ingest, name) is not None:
                yield ("ingest", name), f"is for {kind}, and rows come from {source}. Leave it out"
    if source == "kafka" and ingest.format == "json_schema":
        if ingest.reader_schema is not None:
            yield ("ingest", "reader_schema"), "is for format: avro or protobuf. Write the format, or leave it out"
    elif source == "kafka" and ingest.format not in ("avro", "protobuf"):
        for name in ("reader_schema", "schema_registry_conn_id"):
            if getattr(ingest, name) is not None:
                yield ("ingest", name), "is for format: avro or protobuf. Write the format, or leave it out"


def _topic_faults(ingest: Ingest) -> Iterator[Fault]:
    for name in ("kafka", "dead_letter_topic"):
        topic = getattr(ingest, name) or ""
        if topic and "{{" not in topic and not re.fullmatch(r"[\w.-]{1,249}", topic):
            yield ("ingest", name), f"{topic!r} is not a topic name. It has letters, digits, . _ and - only"
    if ingest.kafka is not None and ingest.kafka == ingest.dead_letter_topic:
        yield ("ingest", "dead_letter_topic"), "is the topic that is read: each rejected row would come back for ever"


def _infer_faults(raw: Any) -> Iterator[Fault]:
    infer = _sound(Infer, raw, {"model": "m/1"})
    if infer is None:
        return
    if infer.endpoint is not None and infer.device == "require_cuda":
        yield ("infer", "device"), "is require_cuda, which a model server does not prove. Leave device or endpoint out"
    if infer.gpu is not None and (infer.endpoint is not None or infer.device == "cpu"):
        why = "device is cpu" if infer.endpoint is None else "the model server at endpoint predicts"
        yield ("infer", "gpu"), f"would reserve a GPU for nothing: {why}. Leave one of them out"
    if infer.shards is not None and infer.engine in ("ray", "spark"):
        yield ("infer", "shards"), f"and engine {infer.engine} both share the batch out. Leave one of them out"
    try:
        Runner.from_dict({name: getattr(infer, name) for name in RUNNER_FIELDS})
    except SpecError as error:
        yield from ((("infer", path), text) for path, text in error.faults)


def _policy(decide: Decide) -> Policy:
    rule = decide.fallback
    fallback = Fallback(rule.rule, rule.then, rule.otherwise) if rule else None
    return Policy(decide.act, decide.review, decide.otherwise, fallback)


def _decide_faults(raw: Any) -> Iterator[Fault]:
    if not isinstance(raw, dict):
        return
    rule = _sound(FallbackRule, raw.get("fallback"))
    if rule is not None:
        yield from _fallback_faults(rule)
    decide = _sound(Decide, raw, {"act": 1.0, "review": 0.0})
    if decide is None:
        return
    try:
        # The rule's own faults are found above; any rule shows whether the policy around it can be run.
        Policy(decide.act, decide.review, decide.otherwise, Fallback("True") if raw.get("fallback") else None)
    except SpecError as error:
        yield from ((("decide", path), text) for path, text in error.faults)


def _fallback_faults(rule: FallbackRule) -> Iterator[Fault]:
    written = rule.model_fields_set & {"then", "otherwise"}
    if len(written) == 1:
        missing = "else" if "then" in written else "then"
        yield ("decide", "fallback", missing), "is missing: say what is decided in both cases, or in none"
        yield from ((("decide", "fallback", "rule"), text) for text in find_faults(rule.rule))
        return
    try:
        Fallback(rule.rule, rule.then, rule.otherwise)
    except SpecError as error:
        yield from ((("decide", "fallback", path), text) for path, text in error.faults)


def _step_faults(data: Mapping[str, Any]) -> Iterator[Fault]:
    seen: dict[str, int] = {}
    for index, name, raw, key_count in _items(data.get("act")):
        where: Location = ("act", index, name)
        if key_count > 1:
            yield where, "shares its list item with another step. Begin each step with its own dash"
        if not re.fullmatch(r"[A-Za-z_][\w-]{0,199}", name):
            yield where, f"{name!r} cannot be a task id. Use letters, digits, _ and -"
        if name in TASKS:
            yield where, f"{name!r} is the name of another task of the pipeline ({', '.join(TASKS)}). Choose another"
        if name in seen:
            yield where, f"{name!r} is also the name of step {seen[name] + 1}. Task ids are unique"
        seen.setdefault(name, index)
        step = _sound(Step, raw)
        if step is not None:
            yield from _call_faults(where, raw)
            yield from _row_faults((*where, "rows"), step, data)


def _items(value: Any) -> Iterator[tuple[int, str, Any, int]]:
    """Yield (position, name, what is written, keys in that list item)."""
    for index, item in enumerate(value if isinstance(value, list) else []):
        for name, body in item.items() if isinstance(item, dict) else ():
            if isinstance(name, str):
                yield index, name, body, len(item)


def _call_faults(where: Location, raw: Mapping[str, Any]) -> Iterator[Fault]:
    methods = [name for name in METHODS if name in raw]
    if len(methods) != 1:
        found = " and ".join(methods) or "none"
        yield where, f"needs exactly one of {', '.join(METHODS)} with its path, such as post: /tickets; has {found}"
    undo = raw.get("undo")
    calls = [name for name in METHODS if isinstance(undo, dict) and name in undo]
    if isinstance(undo, dict) and len(calls) != 1:
        found = " and ".join(calls) or "none"
        yield (*where, "undo"), f'needs exactly one call, such as delete: "/tickets/{{id}}"; has {found}'


def _row_faults(where: Location, step: Step, data: Mapping[str, Any]) -> Iterator[Fault]:
    if step.rows is None:
        return
    if not step.rows:
        yield where, "is empty: the step would act on nothing. Leave it out to act on everything that is decided"
    if len(set(step.rows)) != len(step.rows):
        yield where, "names a route twice"
    if "review" in step.rows and data.get("review") is None:
        yield where, "names review, but nobody is asked. Add review: {timeout: 4h}, or leave review out of rows"
    decide = data.get("decide")
    if "fallback" in step.rows and isinstance(decide, dict) and decide.get("fallback") is None:
        yield where, "names fallback, but decide has no fallback rule. Add one, or leave fallback out of rows"
