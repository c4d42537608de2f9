"""What a broken rule says about a row, and rules' arguments brought to the form that the frames have.

Invariants: a reason is ``<code>: <detail>``, short whatever the value; the codes are those that counts are kept under.
"""

from __future__ import annotations

import datetime as dt
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pyarrow as pa

from airflow_ai_provider.core.ingest.suite import OF_TYPE, Rule

_CODES = {
    "expect_column_values_to_not_be_null": "missing_field",
    "expect_column_values_to_be_between": "out_of_range",
    "expect_column_values_to_be_in_set": "not_in_set",
    "expect_column_values_to_match_regex": "bad_format",
    "expect_column_values_to_match_regex_list": "bad_format",
    "expect_column_values_to_not_match_regex": "bad_format",
    "expect_column_values_to_not_match_regex_list": "bad_format",
    "expect_column_values_to_be_unique": "not_unique",
    "expect_compound_columns_to_be_unique": "not_unique",
}
_NOT_SHOWN = {"column", "column_A", "column_B", "column_list", "mostly"}


def reason(rule: Rule, row: Mapping[str, Any]) -> str:
    """Say why a row breaks a rule: its values, and the rule.

    :param row: the rule's columns of that row.
    """
    code = _CODES.get(rule.type, rule.type)
    shown = ", ".join(f"{name}={_brief(repr(value))}" for name, value in row.items())
    return f"{code}: {shown} {_rule_text(rule, code)}".rstrip()


class Finder:
    """Tell which rule a reason comes from; called with a reason, gives the rule and the values that it names.

    A reason is made of a code and columns at its front and the rule's words at its end, with values between.

    :param rules: in order; of two that say the same about the same columns the first is found.
    """

    def __init__(self, rules: Iterable[Rule]) -> None:
        self._rules: dict[str, list[tuple[str, Rule]]] = defaultdict(list)
        for rule in rules:
            code = "wrong_type" if rule.type == OF_TYPE else _CODES.get(rule.type, rule.type)
            tail = f" is not {rule.kwargs['type_']}" if rule.type == OF_TYPE else f" {_rule_text(rule, code)}"
            self._rules[f"{code}: {rule.columns[0]}" if rule.columns else code].append((tail, rule))

    def __call__(self, text: str) -> tuple[Rule, str] | None:
        front, _, rest = text.partition("=")
        for tail, rule in self._rules.get(front, ()):
            if rule.type == OF_TYPE:
                return rule, rest.rpartition(" is not ")[0]
            if rest.endswith(tail):
                return rule, rest.removesuffix(tail)
        return None


def _rule_text(rule: Rule, code: str) -> str:
    kwargs = rule.kwargs
    if code == "missing_field":
        return "must not be null"
    if code == "out_of_range":
        return f"is not between {kwargs.get('min_value', '-∞')} and {kwargs.get('max_value', '∞')}"
    if code == "not_in_set":
        return f"is not one of {_brief(json.dumps(kwargs.get('value_set'), default=str))}"
    if code == "not_unique":
        return "occurs more than once"
    told = {k: v for k, v in kwargs.items() if k not in _NOT_SHOWN}
    return f"breaks {_brief(json.dumps(told, default=str, ensure_ascii=False))}" if told else "breaks the rule"


def plain_bounds(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments with times as the frames have them: UTC without a zone, a date as its midnight.

    Great Expectations cannot compare a date, or a time with a zone, with a column of times without one.
    """
    return {k: _plain_time(v) if k in ("min_value", "max_value") else v for k, v in kwargs.items()}


def regex_faults(kwargs: Mapping[str, Any], match: Callable[[str], object]) -> list[str]:
    """Find patterns that cannot be judged; found later they would stop a batch in the middle.

    :param match: matches a text with a pattern, by the engine that judges the rows; raises when it cannot.
    """
    patterns = [kwargs.get("regex"), *(kwargs.get("regex_list") or ())]
    faults = []
    for pattern in patterns:
        if isinstance(pattern, str):
            try:
                match(pattern)
            except (pa.ArrowException, re.error, NotImplementedError, OverflowError, RecursionError) as error:
                faults.append(f"regex {pattern!r} is neither RE2's nor, as far as pandas asks it, Python's: {error}")
    return faults


def _plain_time(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        moment = dt.datetime.fromisoformat(value)
    except ValueError:
        return value
    if moment.tzinfo is not None:
        moment = moment.astimezone(dt.UTC).replace(tzinfo=None)
    return moment.isoformat()


def _brief(text: str) -> str:
    return text if len(text) <= 80 else text[:80] + "…"
