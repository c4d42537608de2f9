"""Say what is wrong at a place of a pipeline file, in the words of the file and with the likely correction.

Invariants: pure; one fault per place; no fault names a class or a library.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ValidationError

from airflow_ai_provider.core.pipeline.document import Fault, Location
from airflow_ai_provider.core.pipeline.section import (
    Decide,
    FallbackRule,
    Infer,
    Ingest,
    Review,
    Sections,
    Step,
    UndoCall,
    WakeUp,
)

_NEEDED = {
    "ingest": "say where rows come from, such as {kafka: biopsies, key: biopsy_id}",
    "infer": "say which model predicts, such as {model: triage@champion}",
    "decide": "say when to act, such as {act: 0.95, review: 0.60}",
    "model": "write name@alias or name/version",
    "act": "the lowest confidence to act on, such as 0.95",
    "review": "the lowest confidence to show to a person, such as 0.60",
    "rule": "a question about a row, such as worst_radius > 16.8",
    "timeout": "how long a run waits for a person, such as 4h",
}
_TYPES = {
    "string_type": "is not text. Put it in quotes",
    "float_type": "is not a number",
    "int_type": "is not a whole number",
    "bool_type": "is not true or false",
    "tuple_type": "is not a list",
    "dict_type": "is not a mapping",
    "model_type": "is not a mapping",
    "finite_number": "is not a number",
}


def path_of(location: Location) -> str:
    """Write a location as the author reads it: ``act[0].ticket.post``."""
    path = ""
    for piece in location:
        path += f"[{piece}]" if isinstance(piece, int) else f".{piece}" if path else str(piece)
    return path


def explain(error: ValidationError) -> list[Fault]:
    """Turn what the sections' types found into faults."""
    return [_fault(detail) for detail in error.errors(include_url=False)]


def _fault(detail: Any) -> Fault:
    location, kind, value = _untagged(tuple(detail["loc"])), detail["type"], detail["input"]
    if location and location[-1] == "[key]":
        return location[:-1], f"{value!r} is not a text; keys are texts"
    if kind == "extra_forbidden":
        return location, _unknown(location)
    if kind == "missing":
        need = _NEEDED.get(str(location[-1]))
        return location, "is missing" + (f": {need}" if need else "")
    if kind == "value_error":
        return location, str(detail["ctx"]["error"])
    if kind == "literal_error":
        return location, _choice(value, detail["ctx"]["expected"])
    if kind in ("greater_than_equal", "less_than_equal"):
        return location, f"{_show(value)} is {_bound(kind, detail['ctx'])}"
    if kind in _TYPES:
        return location, f"{_show(value)} {_TYPES[kind]}"
    return location, f"{_show(value)}: {detail['msg']}"


def _untagged(location: Location) -> Location:
    """Leave out which of a schedule's two forms was read: it is no key."""
    return (location[0], *location[2:]) if location[:1] == ("schedule",) else location


def _bound(kind: str, context: Any) -> str:
    if kind == "greater_than_equal":
        return f"below {context['ge']:g}, the lowest allowed"
    return f"above {context['le']:g}, the highest allowed"


def _show(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "nothing", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _choice(value: Any, expected: str) -> str:
    options = [option.strip("'") for option in expected.replace(" or ", ", ").split(", ")]
    if value == "hold":
        return "'hold' rows wait and are not acted on. There are " + ", ".join(options)
    return f"{_show(value)} is not one of {', '.join(options)}" + _did_you_mean(str(value), options)


def _unknown(location: Location) -> str:
    key, known = str(location[-1]), _keys(_model_at(location[:-1]))
    hint = _did_you_mean(key, known)
    if not hint:
        hint = next((f"; it belongs under {name}" for name, model in _MODELS.items() if key in _keys(model)), "")
    return f"is not a key here{hint} (keys here: {', '.join(known)})"


def _did_you_mean(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def _keys(model: type[BaseModel]) -> list[str]:
    return list(_aliases(model))


def _aliases(model: type[BaseModel]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield field.alias or name


_MODELS: dict[str, type[BaseModel]] = {
    "schedule": WakeUp,
    "ingest": Ingest,
    "infer": Infer,
    "decide": Decide,
    "decide.fallback": FallbackRule,
    "review": Review,
    "a step of act": Step,
}


def _model_at(location: Location) -> type[BaseModel]:
    if not location:
        return Sections
    if location[0] == "act":
        return UndoCall if location[-1] == "undo" and len(location) == 4 else Step
    return _MODELS.get(".".join(str(piece) for piece in location), Sections)
