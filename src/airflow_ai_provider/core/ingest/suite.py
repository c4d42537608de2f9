"""An expectation suite as written → rules as values, without loading Great Expectations.

Invariants: all faults of a suite are reported together, each with its place; the same rules have the same digest,
whatever names, notes and ids stand beside them; ``expect_column_values_to_be_of_type`` is the row schema, which
decoding enforces row by row (Great Expectations answers it by dtype, without rows).
"""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_ai_provider.core.batch import digest_of
from airflow_ai_provider.core.ingest.contract import AcceptAll
from airflow_ai_provider.core.ingest.json_rows import is_column
from airflow_ai_provider.errors import SpecError

if TYPE_CHECKING:
    from airflow_ai_provider.core.ingest.contract import Validator

OF_TYPE = "expect_column_values_to_be_of_type"
POLICIES = ("quarantine", "fail", "warn")
_TYPES = {
    **dict.fromkeys(("int", "int64", "integer", "long", "bigint"), "int64"),
    **dict.fromkeys(("float", "float64", "double", "number"), "float64"),
    **dict.fromkeys(("str", "string", "text", "varchar"), "string"),
    **dict.fromkeys(("bool", "boolean"), "bool"),
    **dict.fromkeys(("timestamp", "datetime", "datetime64", "datetime64[ns]"), "timestamp"),
}
Faults = list[tuple[str, str]]


@dataclass(frozen=True)
class Rule:
    """One expectation.

    :param place: where it stands in the suite, for messages: ``expectations[3]``.
    :param type: Great Expectations' name of it.
    :param kwargs: its arguments.
    :param on_failure: ``quarantine``, ``fail``, ``warn``, or None: the default of its kind.
    """

    place: str
    type: str
    kwargs: Mapping[str, Any]
    on_failure: str | None

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that it reads; none for a rule about the table."""
        names = [self.kwargs.get(k) for k in ("column", "column_A", "column_B")]
        return tuple(n for n in [*names, *(self.kwargs.get("column_list") or ())] if isinstance(n, str))

    def __str__(self) -> str:
        return f"{self.type}({', '.join(self.columns)})"


@dataclass(frozen=True)
class Suite:
    """A suite's rules and row schema.

    :param name: its name, for messages.
    :param rules: the expectations, without those about types.
    :param types: column → declared type.
    :param digest: SHA-256 over what the rules say.
    :param data_docs: whether batches judged by it get a page of Great Expectations' Data Docs; its ``meta`` may say no.
    """

    name: str
    rules: tuple[Rule, ...]
    types: Mapping[str, str]
    digest: str
    data_docs: bool = True


def open_validator(suite: Mapping[str, Any] | str | Path | None) -> Validator:
    """Make the validator of a suite; None gives one that accepts every row, and loads nothing.

    :raises SpecError: listing every fault of the suite; a retry does not help.
    """
    if suite is None:
        return AcceptAll()
    # before it is loaded: it fills a task's log with its own housekeeping, dozens of lines on import alone
    logging.getLogger("great_expectations").setLevel(logging.WARNING)
    from airflow_ai_provider.core.ingest.validate import GxValidator

    return GxValidator(suite)


def load_suite(suite: Mapping[str, Any] | str | Path) -> Suite:
    """Read a suite in Great Expectations' own JSON form, from a file or as a value.

    :raises SpecError: when the file is missing or is not JSON, or with every fault of the suite's form; a retry does
        not help.
    """
    data, where = (suite, "the expectation suite") if isinstance(suite, Mapping) else (_read(Path(suite)), str(suite))
    faults: Faults = []
    listed = data.get("expectations") if isinstance(data, Mapping) else None
    if not isinstance(listed, list):
        raise_faults(where, [("expectations", 'missing; a suite is {"name": …, "expectations": [{"type": …}]}')])
        raise AssertionError  # raise_faults has raised
    meta = data.get("meta") or {}
    docs = meta.get("data_docs", True) if isinstance(meta, Mapping) else True
    if not isinstance(docs, bool):
        faults.append(("meta.data_docs", f"{docs!r} is not true or false"))
    rules = [rule for i, item in enumerate(listed) if (rule := _rule(f"expectations[{i}]", item, faults))]
    types = _schema([r for r in rules if r.type == OF_TYPE], faults)
    raise_faults(where, faults)
    kept: dict[str, Rule] = {}
    for rule in rules:
        if rule.type != OF_TYPE:
            kept.setdefault(_text(rule), rule)  # written twice, it still is one rule
    name = str(data.get("name") or "suite")
    digest = digest_of({"types": types, "rules": list(kept)})
    return Suite(name, tuple(kept.values()), types, digest, docs)


def raise_faults(where: str, faults: Faults) -> None:
    """Raise all faults of a suite together, if there are any.

    :raises SpecError: with ``faults``.
    """
    if faults:
        listed = "".join(f"\n  {place}: {what}" for place, what in faults)
        raise SpecError(
            f"{where} has {len(faults)} fault(s); no row was read:{listed}\nMend the suite and clear the task.",
            faults=faults,
        )


def nearest(word: str, words: list[str]) -> str:
    """Return "; did you mean X?" for a word that is nearly one of the others."""
    found = difflib.get_close_matches(word, words, 1)
    return f"; did you mean {found[0]}?" if found else ""


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise SpecError(
            f"there is no expectation suite at {path}. Write it there (Great Expectations' JSON form), or correct the "
            "expectations argument; None checks nothing but that rows can be decoded.",
            faults=[("expectations", "file not found")],
            path=str(path),
        ) from None
    except (OSError, ValueError) as error:
        raise SpecError(
            f"the expectation suite at {path} cannot be read as JSON: {error}. Correct the file.",
            faults=[("expectations", str(error))],
            path=str(path),
        ) from error


def _rule(place: str, item: Any, faults: Faults) -> Rule | None:
    if not isinstance(item, Mapping) or not isinstance(item.get("type"), str):
        old = isinstance(item, Mapping) and "expectation_type" in item
        faults.append((f"{place}.type", "missing" + ('; it is no longer called "expectation_type"' if old else "")))
        return None
    kwargs, meta = item.get("kwargs", {}), item.get("meta") or {}
    if not isinstance(kwargs, Mapping):
        faults.append((f"{place}.kwargs", f"must be an object, is {kwargs!r}"))
        return None
    policy = meta.get("on_failure") if isinstance(meta, Mapping) else None
    if policy not in (None, *POLICIES):
        faults.append((f"{place}.meta.on_failure", f"{policy!r} is not one of {', '.join(POLICIES)}"))
    rule = Rule(place, item["type"], dict(kwargs), policy)
    own = [c for c in rule.columns if not is_column(c)]
    if own:
        faults.append((f"{place}.kwargs", f"{own}: names that begin with _ are the provider's own"))
    return rule


def _schema(rules: list[Rule], faults: Faults) -> dict[str, str]:
    types: dict[str, str] = {}
    for rule in rules:
        column, written = rule.kwargs.get("column"), rule.kwargs.get("type_")
        kind = _TYPES.get(str(written).lower())
        if not isinstance(column, str):
            faults.append((f"{rule.place}.kwargs.column", "missing"))
        elif kind is None:
            known = f"{written!r} is not one of int, float, string, bool, timestamp"
            faults.append((f"{rule.place}.kwargs.type_", known + nearest(str(written), list(_TYPES))))
        elif types.setdefault(column, kind) != kind:
            faults.append((f"{rule.place}.kwargs.type_", f"{column} is declared {types[column]} already"))
        if rule.on_failure not in (None, "quarantine") or rule.kwargs.get("mostly", 1) != 1:
            faults.append((rule.place, f"{OF_TYPE} holds for each row: a misfit is quarantined, always"))
    return types


def _text(rule: Rule) -> str:
    return json.dumps([rule.type, rule.kwargs, rule.on_failure], sort_keys=True, default=str)
