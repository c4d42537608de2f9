"""The one door to Great Expectations: its verdicts, taken as complete index lists, as reasons per row.

Invariants: every verdict is Great Expectations' own, given by itself or, where that is proven to be the same, by
:mod:`.kernel`; an exception is not a verdict; a row is rejected for every rule it breaks.

How a block becomes its frame, and what that changes (see DATA_TRAPS in the docs):

- Columns are Arrow-backed, so a null leaves an integer an integer, and texts are Arrow's: a pattern is RE2's, or
  Python's where RE2 cannot read it (look-around, back-references). NaN is a
  value, not a null, and lies outside every range.
- A column of nulls only has no type: every row-level rule but not_be_null passes it.
- Times are UTC without a zone; bounds written as dates or with an offset are brought to the same.
- null breaks no rule but not_be_null, and rules that compare columns: there, as in Great Expectations' own frames, a
  row with some of its columns null fails unless ``ignore_row_if`` leaves it out.
- Bounds are floats, as Great Expectations reads them: exact up to 2**53.

Rules that each row answers alone run per block. All others (uniqueness, order, means, counts, and every rule with
``mostly`` below 1) are facts of the whole batch and run once over all decoded rows.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

# before the import below: it reads its settings then, and reports to its maker otherwise
os.environ["GX_ANALYTICS_ENABLED"] = "false"

import great_expectations as gx
import numpy as np
import pandas as pd  # type: ignore[import-untyped,unused-ignore]
import pyarrow as pa
import pyarrow.compute as pc
from great_expectations.data_context.types.base import ProgressBarsConfig
from great_expectations.exceptions import GreatExpectationsError  # type: ignore[attr-defined]
from great_expectations.expectations.expectation import (
    ColumnMapExpectation,
    ColumnPairMapExpectation,
    MulticolumnMapExpectation,
)
from great_expectations.expectations.expectation_configuration import ExpectationConfiguration
from great_expectations.expectations.registry import get_expectation_impl, list_registered_expectation_implementations

from airflow_ai_provider.core.batch import ROW_ID
from airflow_ai_provider.core.ingest.column import flags
from airflow_ai_provider.core.ingest.contract import BatchRules, Judgement, Verdict, no_reasons, with_reasons
from airflow_ai_provider.core.ingest.finding import Bound, Finding, holds_mostly, read_answer, unjudged
from airflow_ai_provider.core.ingest.json_rows import is_column
from airflow_ai_provider.core.ingest.kernel import arguments_of, find_broken
from airflow_ai_provider.core.ingest.rule_text import plain_bounds, reason, regex_faults
from airflow_ai_provider.core.ingest.suite import Faults, Rule, Suite, load_suite, nearest, open_validator, raise_faults

__all__ = ["GxValidator", "open_validator"]

_ROW_BY_ROW = frozenset(
    {
        "expect_column_pair_values_a_to_be_greater_than_b",
        "expect_column_pair_values_to_be_equal",
        "expect_column_pair_values_to_be_in_set",
        "expect_column_value_lengths_to_be_between",
        "expect_column_value_lengths_to_equal",
        "expect_column_values_to_be_between",
        "expect_column_values_to_be_in_set",
        "expect_column_values_to_be_null",
        "expect_column_values_to_match_json_schema",
        "expect_column_values_to_match_regex",
        "expect_column_values_to_match_regex_list",
        "expect_column_values_to_match_strftime_format",
        "expect_column_values_to_be_dateutil_parseable",
        "expect_column_values_to_be_json_parseable",
        "expect_column_values_to_not_be_in_set",
        "expect_column_values_to_not_be_null",
        "expect_column_values_to_not_match_regex",
        "expect_column_values_to_not_match_regex_list",
        "expect_multicolumn_sum_to_equal",
        "expect_select_column_values_to_be_unique_within_record",
    }
)
"""What a row answers alone; an expectation that is not listed is asked of the whole batch, which is always right."""
_COMPARES = frozenset(
    {
        "expect_column_pair_values_a_to_be_greater_than_b",
        "expect_column_pair_values_to_be_equal",
        "expect_column_pair_values_to_be_in_set",
        "expect_multicolumn_sum_to_equal",
    }
)
"""They raise on a null in Arrow-backed frames, so they see rows without nulls only, and the door decides the rest."""
_SETS = frozenset({"expect_column_values_to_be_in_set", "expect_column_values_to_not_be_in_set"})
"""They raise on a column of nulls only, whose lack of a type the set's members do not have; it breaks neither."""
_UNIQUE = frozenset({"expect_column_values_to_be_unique", "expect_compound_columns_to_be_unique"})
"""What a row breaks only when another one has the same values; of many rows, those few are all that is judged."""
_ANSWERED_BY_DTYPE = "expect_column_values_to_be_in_type_list"
_LEAVES_OUT_SOME = frozenset({"either_value_is_missing", "any_value_is_missing"})


class _Frame(pd.DataFrame):  # type: ignore[misc,unused-ignore]
    """A frame that Great Expectations does not hash: it leaves large ones out, and this one says that it is large.

    Hashing every block twice is 85 % of its time and serves only to name a batch, which nothing here reads.
    """

    @property
    def _constructor(self) -> type[_Frame]:
        return _Frame

    def memory_usage(self, index: bool = True, deep: bool = False) -> pd.Series:
        return pd.Series([2_000_000_000])


class GxValidator:
    """Judge rows by a Great Expectations suite.

    Each expectation may say in its ``meta`` what a failure means: ``{"on_failure": "quarantine" | "fail" | "warn"}``.
    Without it a row-level rule quarantines the rows that break it, a whole-batch rule refuses the batch.

    :param suite: in Great Expectations' JSON form, or the path of such a file.
    :param kernels: False has every rule judged by Great Expectations itself: slower, with the same verdicts.
    :raises SpecError: listing every fault (missing file, unknown expectation, wrong arguments); a retry does not help.
    """

    def __init__(self, suite: Mapping[str, Any] | str | Path, *, kernels: bool = True) -> None:
        parsed = load_suite(suite)
        self._suite, self._only_gx = parsed, not kernels
        where = "the expectation suite" if isinstance(suite, Mapping) else str(suite)
        bound = _bind(parsed, where)
        self._row_rules = [b for b in bound if b.by_row]
        self._whole_rules = [b for b in bound if not b.by_row]
        self.digest = parsed.digest
        named = [c for b in bound if b.names_rows for c in b.rule.columns]
        self.schema: Mapping[str, str] = {**parsed.types, **{c: "" for c in named if c not in parsed.types}}
        self._groups = _group(self._whole_rules)
        self.batch_rules = tuple(self._groups)

    def split(self, table: pa.Table) -> Verdict:
        """Apply the rules that each row answers alone.

        :raises BatchRejectedError: when a rule cannot be judged (it raised); a retry does not help.
        """
        if not self._row_rules or table.num_rows == 0:
            return Verdict(table, no_reasons(table.slice(0, 0)))
        reasons, failures, warnings = self._conclude(table, self._row_rules)
        if not reasons:
            return Verdict(table, no_reasons(table.slice(0, 0)), failures, warnings)
        bad = sorted(reasons)
        good = np.ones(table.num_rows, np.bool_)
        good[bad] = False
        rejected = with_reasons(table.take(pa.array(bad, pa.int64())), [reasons[i] for i in bad])
        return Verdict(table.filter(flags(good)), rejected, failures, warnings)

    def judge(self, table: pa.Table, rules: BatchRules | None = None) -> Judgement:
        """Apply the rules that only the whole batch answers.

        :param rules: one of :attr:`batch_rules`; None: all of them.
        :raises BatchRejectedError: when a rule cannot be judged (it raised); a retry does not help.
        """
        asked = self._whole_rules if rules is None else self._groups[rules]
        if not asked:
            return Judgement()
        reasons, failures, warnings = self._conclude(table, asked)
        ids = table[ROW_ID].take(pa.array(sorted(reasons), pa.int64())).to_pylist()
        return Judgement(dict(zip(ids, (reasons[i] for i in sorted(reasons)), strict=True)), failures, warnings)

    def _conclude(
        self, table: pa.Table, rules: Sequence[Bound]
    ) -> tuple[dict[int, list[str]], list[str], dict[str, int]]:
        findings = self._find(table, rules)
        reasons: dict[int, list[str]] = {}
        failures: list[str] = []
        warnings: dict[str, int] = {}
        for bound in rules:
            finding = findings[bound.number]
            if finding.holds:
                continue
            if bound.policy == "warn":
                warnings[str(bound.rule)] = len(finding.positions)
                continue
            if bound.policy == "fail":
                seen = "" if finding.observed is None else f" (observed {finding.observed})"
                failures.append(f"{bound.rule}{seen}")
            if finding.positions:
                rows = table.select(list(bound.rule.columns)).take(pa.array(finding.positions, pa.int64())).to_pylist()
                for position, row in zip(finding.positions, rows, strict=True):
                    reasons.setdefault(position, []).append(reason(bound.rule, row))
        return reasons, failures, warnings

    def _find(self, table: pa.Table, rules: Sequence[Bound]) -> dict[int, Finding]:
        authors = table.select([n for n in table.column_names if is_column(n)])
        if authors.num_rows == 0:  # no row has shown the columns, which are no less there for that
            lacking = dict.fromkeys(c for b in rules for c in b.rule.columns if c not in authors.column_names)
            authors = pa.table(
                {**{n: authors[n] for n in authors.column_names}, **{c: pa.nulls(0, pa.float64()) for c in lacking}}
            )
        findings = {} if self._only_gx else _judge_quickly(authors, rules)
        findings.update({b.number: Finding(True) for b in rules if _asks_nulls_for_a_set(authors, b)})
        rules = [b for b in rules if b.number not in findings]
        apart = [b for b in rules if b.rule.type in _COMPARES and _some_null(authors, b.rule.columns)]
        together = [b for b in rules if b not in apart]
        findings.update(self._ask(authors, together) if together else {})
        for bound in apart:
            findings[bound.number] = self._compare(authors, bound)
        return findings

    def _compare(self, table: pa.Table, bound: Bound) -> Finding:
        """Judge a rule that compares columns: rows without nulls by Great Expectations, the rest here, as it would."""
        valid = [pc.is_valid(table[name]) for name in bound.rule.columns]
        whole, some = valid[0], valid[0]
        for column in valid[1:]:
            whole, some = pc.and_(whole, column), pc.or_(some, column)
        left_out = str(bound.rule.kwargs.get("ignore_row_if", ""))
        broken = (
            pc.and_(some, pc.invert(whole)) if left_out not in _LEAVES_OUT_SOME else pc.and_(whole, pc.invert(whole))
        )
        if left_out == "never":
            broken = pc.invert(whole)
        at = pc.indices_nonzero(whole).to_pylist()
        finding = self._ask(table.take(pa.array(at, pa.int64())), [bound])[bound.number]
        positions = sorted([*(at[i] for i in finding.positions), *pc.indices_nonzero(broken).to_pylist()])
        return Finding(holds_mostly(bound, len(positions), table.num_rows), positions)

    def _ask(self, table: pa.Table, rules: Sequence[Bound]) -> dict[int, Finding]:
        suite = gx.ExpectationSuite(name=self._suite.name, expectations=[b.expectation for b in rules])
        batch = _batch_definition().get_batch({"dataframe": _frame(table)})
        result = batch.validate(suite, result_format={"result_format": "COMPLETE"})
        by_number = {b.number: b for b in rules}
        findings: dict[int, Finding] = {}
        for answer in result.results:
            bound = by_number[answer.expectation_config.meta["number"]]
            findings[bound.number] = read_answer(bound, answer, table)
        for bound in rules:
            if bound.number not in findings:
                raise unjudged(bound.rule, "Great Expectations gave no answer")
        return findings


@cache
def _batch_definition() -> Any:
    """The door's one context: to open it takes longer than to judge a small block."""
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False, metric_calculations=False)
    asset = context.data_sources.add_pandas("rows").add_dataframe_asset("block")
    return asset.add_batch_definition_whole_dataframe("whole")


def _judge_quickly(table: pa.Table, rules: Sequence[Bound]) -> dict[int, Finding]:
    """Judge what the kernels can; what is missing from the answer is Great Expectations' to judge."""
    findings: dict[int, Finding] = {}
    for bound in rules:
        column = bound.rule.kwargs.get("column")
        if bound.kernel is None or column not in table.column_names:
            continue
        broken = find_broken(bound.rule.type, bound.kernel, table[column])
        if broken is not None:
            positions = pc.indices_nonzero(broken).to_pylist()
            findings[bound.number] = Finding(not positions, positions)
    return findings


def _asks_nulls_for_a_set(table: pa.Table, bound: Bound) -> bool:
    name = bound.rule.kwargs.get("column")
    return bound.rule.type in _SETS and name in table.column_names and 0 < table[name].null_count == table.num_rows


def _bind(suite: Suite, where: str) -> list[Bound]:
    faults: Faults = []
    bound = []
    for number, rule in enumerate(suite.rules):
        expectation = _build(rule, number, faults)
        if expectation is None:
            continue
        names_rows = isinstance(
            expectation, ColumnMapExpectation | ColumnPairMapExpectation | MulticolumnMapExpectation
        )
        if rule.on_failure == "quarantine" and not names_rows:
            faults.append((f"{rule.place}.meta.on_failure", f"{rule.type} names no rows: use fail or warn"))
        by_row = names_rows and rule.type in _ROW_BY_ROW and rule.kwargs.get("mostly", 1) == 1
        bound.append(Bound(rule, number, expectation, names_rows, by_row, _kernel_arguments(rule, expectation)))
    raise_faults(where, faults)
    return bound


def _build(rule: Rule, number: int, faults: Faults) -> Any:
    if rule.type == _ANSWERED_BY_DTYPE:
        faults.append((rule.place, f"{rule.type} is answered by dtype, without rows: use expect_…_to_be_of_type"))
        return None
    try:
        get_expectation_impl(rule.type)
    except GreatExpectationsError:
        known = list_registered_expectation_implementations()
        faults.append((f"{rule.place}.type", f"{rule.type} is unknown{nearest(rule.type, known)}"))
        return None
    faults.extend((f"{rule.place}.kwargs", fault) for fault in regex_faults(rule.kwargs, _match_nothing))
    try:
        kwargs = plain_bounds(rule.kwargs)
        return ExpectationConfiguration(type=rule.type, kwargs=kwargs, meta={"number": number}).to_domain_obj()
    except (ValueError, TypeError, GreatExpectationsError) as error:
        for line in _messages(error):
            faults.append((f"{rule.place}.kwargs", line))
        return None


def _kernel_arguments(rule: Rule, expectation: Any) -> dict[str, Any] | None:
    if not type(expectation).__module__.startswith("great_expectations."):
        return None  # an author's own, under a name of Great Expectations'
    names = arguments_of(rule.type, rule.kwargs)
    return None if names is None else {name: getattr(expectation, name) for name in names}


def _messages(error: Exception) -> Iterable[str]:
    listed = getattr(error, "errors", None)
    if not callable(listed):
        return [str(error).partition("\n")[0]]
    return [
        f"{'.'.join(str(step) for step in e['loc'] if step != '__root__')}: {e['msg']}".lstrip(": ") for e in listed()
    ]


def _group(rules: Sequence[Bound]) -> dict[BatchRules, list[Bound]]:
    """Part the rules about repeated values, a group for each set of columns, from all others."""
    groups: dict[tuple[str, ...], list[Bound]] = {}
    for bound in rules:
        groups.setdefault(bound.rule.columns if _looks_for_repeats(bound) else (), []).append(bound)
    return {_needs(group, repeats=bool(columns)): group for columns, group in groups.items()}


def _looks_for_repeats(bound: Bound) -> bool:
    """Only arguments under which a row's verdict depends on rows of the same values alone."""
    known = {"column", "column_list", "ignore_row_if", "mostly"}
    plain = bound.rule.type in _UNIQUE and set(bound.rule.kwargs) <= known and bound.rule.kwargs.get("mostly", 1) == 1
    return plain and type(bound.expectation).__module__.startswith("great_expectations.")


def _match_nothing(pattern: str) -> None:
    """Match as Great Expectations' regex metrics do: pandas asks RE2, and Python's ``re`` for what that cannot read."""
    with warnings.catch_warnings(action="ignore"):  # of groups that nobody asks for
        pd.Series([""], dtype=pd.ArrowDtype(pa.string())).astype(str).str.contains(pattern)


def _needs(rules: Sequence[Bound], *, repeats: bool) -> BatchRules:
    about_columns = any(not b.rule.columns and "row_count" not in b.rule.type for b in rules)
    columns = tuple(dict.fromkeys(c for b in rules for c in b.rule.columns))
    rejects = any(b.names_rows and b.policy != "warn" for b in rules)
    return BatchRules(None if about_columns else columns, rejects, repeats)


def _frame(table: pa.Table) -> _Frame:
    columns = {}
    for name in table.column_names:
        column = table[name]
        if column.null_count == len(column) > 0:
            column = pa.nulls(len(column))
        elif pa.types.is_timestamp(column.type) and column.type.tz:
            column = column.cast(pa.timestamp(column.type.unit))
        columns[name] = column
    if not columns:  # rules about the number of rows need no column
        return _Frame(index=pd.RangeIndex(table.num_rows))
    return _Frame(pa.table(columns).to_pandas(types_mapper=pd.ArrowDtype))


def _some_null(table: pa.Table, columns: Sequence[str]) -> bool:
    return all(c in table.column_names for c in columns) and any(table[c].null_count for c in columns)
