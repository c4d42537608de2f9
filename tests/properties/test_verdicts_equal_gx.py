"""Each kernel against Great Expectations itself: same rows, same reasons, or both cannot judge.

Every example asks both doors (``kernels=True`` and ``False``) about the same rows. Columns are those that decoding
makes and some that typed files bring; values are chosen to sit on the edges: nulls, NaN, infinities, integers about
2**53 and 2**63, texts of several scripts, newlines, empty ones.
"""

from __future__ import annotations

import datetime as dt
import os
import re
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from airflow_ai_provider.core.ingest.validate import GxValidator
from airflow_ai_provider.errors import BatchRejectedError, SpecError

UTC_US = pa.timestamp("us", tz="UTC")
EDGES = [0, 1, -1, 2, 10, 2**53 - 1, 2**53, 2**53 + 1, -(2**53) - 1, 2**63 - 1, -(2**63)]
INTEGERS = st.sampled_from(EDGES) | st.integers(-12, 12)
FLOATS = st.sampled_from([0.0, -0.0, 0.5, 1.0, 1e308, float("inf"), float("-inf"), float("nan"), 2.0**53]) | st.floats()
TEXTS = st.sampled_from(
    ["", "a", "ab", "abc", "12", "é", "١٢", "a\n", "\n", " ", "\x0b", "😀", "e\u0301", "x\0y", "1.0"]
)
TIMES = st.datetimes(dt.datetime(1, 1, 2), dt.datetime(9999, 12, 30)) | st.sampled_from(
    [dt.datetime(2020, 1, 1), dt.datetime(2020, 1, 1, microsecond=1), dt.datetime(2019, 12, 31, 23, 59, 59, 999999)]
)
COLUMNS: dict[str, tuple[pa.DataType, st.SearchStrategy[Any]]] = {
    "i": (pa.int64(), INTEGERS),
    "f": (pa.float64(), FLOATS),
    "s": (pa.string(), TEXTS | st.text(max_size=4)),
    "b": (pa.bool_(), st.booleans()),
    "t": (UTC_US, TIMES),
    "i32": (pa.int32(), st.integers(-12, 12)),
    "large": (pa.large_string(), TEXTS),
    "day": (pa.date32(), st.dates()),
    "ns": (pa.timestamp("ns"), st.datetimes(dt.datetime(1700, 1, 1), dt.datetime(2200, 1, 1))),
}
NUMBERS = st.sampled_from([*EDGES, 0.5, -0.5, 1e300]) | st.integers(-12, 12) | st.floats(-12, 12)
ISO = st.sampled_from(["2020-01-01", "2020-01-01T00:00", "2020-01-01T02:00:00.000001+02:00", "1969-12-31T23:59:59Z"])
PATTERNS = ["^a", "b$", r"^\d+$", r"\w", r"\W", r"\bab", r"\s", "^$", "a|b", "[^a-c]", "(a)(b)?", ".", r"^.{2}$", r"\."]
PATTERNS += [
    r"^[\w.]+$",
    "(?i)A",
    "[[:alpha:]]",
    r"\pL",
    r"\x41",
    r"\Aa",
    "a{1,2}",
    r"[\d]",
    r"\$",
    "[$]",
    "(?P<n>a)",
    "a*?",
    "é",
]
PATTERNS += ["^a$", "^[a-c]{2}$", "^ab{1}[a-z]$", "^[A-Za-z0-9]{2}$", r"^1\.[0-9]$", "^ $", "^[a-]b{0}$", "^[0-9]{2}$"]
ONLY_PYTHON = ["(?=b)", "^(?!a)", "(?<=a)b", "(?<!a)b", r"(.)\1", r"(?P<n>a)(?P=n)", r"b\Z"]
REGEXES = st.sampled_from([*PATTERNS, *ONLY_PYTHON])


def rule(kind: str, column: str, **kwargs: Any) -> dict[str, Any]:
    name = kind if kind.startswith("expect_") else f"expect_column_values_to_{kind}"
    return {"type": name, "kwargs": {"column": column, **kwargs}}


@st.composite
def ranges(draw: st.DrawFn, kind: str, column: str, bounds: st.SearchStrategy[Any]) -> dict[str, Any]:
    kwargs = {name: draw(bounds) for name in draw(st.sampled_from([("min_value",), ("max_value",), ("min_value", "max_value")]))}  # fmt: skip  # noqa: E501
    low, high = kwargs.get("min_value"), kwargs.get("max_value")
    if type(low) is not type(high) or (low is not None and low > high):  # the wrong way round is a test of its own
        kwargs.pop("max_value" if low is not None else "none", None)
    for name in draw(st.sets(st.sampled_from(["strict_min", "strict_max"]))):
        kwargs[name] = draw(st.booleans())
    return rule(kind, column, **kwargs)


@st.composite
def rules(draw: st.DrawFn) -> list[dict[str, Any]]:
    """One of each kernelled expectation, on a column where Great Expectations can judge it."""
    texts, any_column = draw(st.sampled_from(["s", "large"])), draw(st.sampled_from(sorted(COLUMNS)))
    of_int, of_text = st.lists(INTEGERS, max_size=4), st.lists(TEXTS, max_size=4)
    return [
        rule("not_be_null", any_column),
        rule("be_null", draw(st.sampled_from(sorted(COLUMNS)))),
        rule("be_unique", draw(st.sampled_from(sorted(COLUMNS)))),
        draw(ranges("be_between", draw(st.sampled_from(["i", "f", "i32"])), NUMBERS)),
        draw(ranges("be_between", draw(st.sampled_from(["i", "f"])), NUMBERS)),
        draw(ranges("be_between", draw(st.sampled_from(["t", "ns"])), ISO)),
        draw(ranges("expect_column_value_lengths_to_be_between", texts, st.integers(0, 3))),
        rule("expect_column_value_lengths_to_equal", texts, value=draw(st.sampled_from([0, 1, 2, 1.5]))),
        rule("be_in_set", "s", value_set=draw(of_text)),
        rule("not_be_in_set", "s", value_set=draw(of_text)),
        rule("be_in_set", draw(st.sampled_from(["i", "f", "b"])), value_set=draw(of_int)),
        rule("not_be_in_set", "i", value_set=draw(of_int)),
        rule("match_regex", "s", regex=draw(REGEXES)),
        rule("not_match_regex", texts, regex=draw(REGEXES)),
    ]


@st.composite
def tables(draw: st.DrawFn) -> pa.Table:
    count = draw(st.integers(0, 8))
    columns = {"_row_id": pa.array([f"r{i}" for i in range(count)], pa.string())}
    for name, (type_, values) in COLUMNS.items():
        one = st.none() | values if draw(st.booleans()) else values
        columns[name] = pa.array(draw(st.lists(one, min_size=count, max_size=count)), type_)
    return pa.table(columns)


def verdict(suite: list[dict[str, Any]], table: pa.Table, kernels: bool) -> object:
    """Everything that the door says, or that it cannot judge, and which rule that is."""
    door = GxValidator({"name": "s", "expectations": suite}, kernels=kernels)
    try:
        split, judged = door.split(table), door.judge(table)
    except BatchRejectedError as error:
        return "cannot be judged", error.expectation
    rejected = dict(zip(split.rejected["_row_id"].to_pylist(), split.rejected["_reasons"].to_pylist(), strict=True))
    accepted = split.accepted["_row_id"].to_pylist()
    return accepted, rejected, split.failures, dict(judged.reasons), judged.failures, dict(judged.warnings)


def agree(suite: list[dict[str, Any]], table: pa.Table) -> None:
    assert verdict(suite, table, kernels=True) == verdict(suite, table, kernels=False)


@seed(20261122)  # more: VERDICT_EXAMPLES=1000, a quarter of a second each
@settings(
    max_examples=int(os.environ.get("VERDICT_EXAMPLES", "40")), deadline=None, suppress_health_check=list(HealthCheck)
)
@given(rules(), tables())
def test_kernels_give_great_expectations_verdicts(suite: list[dict[str, Any]], table: pa.Table) -> None:
    agree(suite, table)


@pytest.mark.parametrize("pattern", ONLY_PYTHON)
def test_a_pattern_that_only_python_reads_is_judged_as_python_reads_it(pattern: str) -> None:
    texts = ["ab", "b", "aab", "c", "", "é1é1", "b\n", "aa\nb", None, "\U0001f600a\u0301b"]
    table = pa.table({"_row_id": [str(n) for n in range(len(texts))], "s": texts})
    found = {str(n) for n, text in enumerate(texts) if text is None or re.search(pattern, text)}
    for kind, wanted in (("", found), ("_list", found)):
        name = "regex_list" if kind else "regex"
        given: Any = [pattern] if kind else pattern
        match = [rule(f"match_regex{kind}", "s", **{name: given})]
        differ = [rule(f"not_match_regex{kind}", "s", **{name: given})]
        for kernels in (True, False):
            assert set(verdict(match, table, kernels)[0]) == wanted  # type: ignore[index]
            assert set(verdict(differ, table, kernels)[0]) == set(table["_row_id"].to_pylist()) - wanted | {"8"}  # type: ignore[index]


@pytest.mark.parametrize(
    "wrong",
    [
        rule("be_between", "s", min_value=0),  # texts cannot be compared with a number
        rule("be_between", "i", min_value=2, max_value=1),
        rule("be_between", "i", min_value="2020-01-01"),
        rule("be_between", "t", min_value=1),
        rule("be_between", "t", min_value="2021-01-01", max_value="2020-01-01"),
        rule("expect_column_value_lengths_to_be_between", "s"),
        rule("expect_column_value_lengths_to_be_between", "i", min_value=1),
        rule("be_in_set", "s", value_set=[1, "a"]),
        rule("be_in_set", "i", value_set=["1"]),
        rule("be_in_set", "i", value_set=[True, 2.0]),
        rule("be_in_set", "b", value_set=[1]),
        rule("not_be_in_set", "t", value_set=["2020-01-01"]),
        rule("match_regex", "i", regex=r"^\d+$"),
        rule("match_regex", "f", regex="nan"),
        rule("be_between", "gone", min_value=0),
        rule("be_between", "s", min_value=0, mostly=0.5),
        rule("be_unique", "s", mostly=0.1),
    ],
)
def test_what_a_kernel_declines_is_judged_by_great_expectations(wrong: dict[str, Any]) -> None:
    table = pa.table(
        {
            "_row_id": ["r0", "r1", "r2"],
            "i": pa.array([1, None, 2**53 + 1], pa.int64()),
            "f": [1.0, float("nan"), None],
            "s": ["1", "a", None],
            "b": [True, False, None],
            "t": pa.array([0, 1, None], UTC_US),
        }
    )
    try:
        agree([wrong], table)
    except SpecError as error:  # refused before any row, with kernels or without
        assert error.faults


def test_an_empty_batch_gets_the_same_verdicts() -> None:
    """Of whole-batch rules too, and where no row has shown a column."""
    suite = [rule("be_unique", "i"), rule("not_be_null", "s"), rule("be_between", "i", min_value=0)]
    empty = pa.table({"_row_id": pa.array([], pa.string()), "i": pa.array([], pa.int64())})
    agree(suite, empty)
    agree([*suite, {"type": "expect_column_mean_to_be_between", "kwargs": {"column": "i", "min_value": 0}}], empty)


def test_large_blocks_of_one_value_that_is_different() -> None:
    """Chunked columns, as blocks are after decoding and filtering."""
    part = {"s": ["ab"] * 4000, "i": [3] * 4000}
    odd = pa.table({"s": ["é\n", None], "i": [-1, None]})
    table = pa.concat_tables([pa.table(part), odd, pa.table(part)])
    table = table.add_column(0, "_row_id", pa.array([f"r{i}" for i in range(table.num_rows)]))
    suite = [rule("match_regex", "s", regex=r"^\w+$"), rule("be_in_set", "s", value_set=["ab"])]
    suite += [rule("be_between", "i", min_value=0.5, max_value=3.5), rule("not_be_null", "i")]
    agree(suite, table)


def test_no_kernel_stands_in_for_an_authors_own_expectation() -> None:
    """A class of the author's under Great Expectations' name keeps its own verdict."""
    from great_expectations.expectations import registry
    from great_expectations.expectations.core import ExpectColumnValuesToNotBeNull

    name = "expect_column_values_to_not_be_null"
    held = registry._registered_expectations[name]
    try:
        own = type("ExpectColumnValuesToNotBeNull", (ExpectColumnValuesToNotBeNull,), {"__module__": "authors"})
        registry._registered_expectations[name] = own
        door = GxValidator({"name": "s", "expectations": [rule("not_be_null", "i")]})
        assert [bound.kernel for bound in door._row_rules] == [None]
    finally:
        registry._registered_expectations[name] = held
