"""The contract of a Validator, over the fake and Great Expectations."""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa
import pytest

from airflow_ai_provider.core.ingest.contract import Validator
from airflow_ai_provider.core.ingest.validate import GxValidator
from airflow_ai_provider.testing import RuleValidator

BETWEEN = {"type": "expect_column_values_to_be_between", "kwargs": {"column": "x", "min_value": 0, "max_value": 9}}
UNIQUE = {"type": "expect_column_values_to_be_unique", "kwargs": {"column": "x"}}
TYPED = {"type": "expect_column_values_to_be_of_type", "kwargs": {"column": "x", "type_": "int"}}
FULL = {"type": "expect_table_row_count_to_be_between", "kwargs": {"min_value": 3}}


def ranged(row: dict[str, int | None]) -> str | None:
    x = row["x"]
    return None if x is None or 0 <= x <= 9 else f"out_of_range: x={x} is not between 0 and 9"


def few(table: pa.Table) -> list[str]:
    return ["too few"] if table.num_rows < 3 else []


Make = Callable[[bool, bool], Validator]


def rule(unique: bool, full: bool) -> Validator:
    return RuleValidator(ranged, {"x": "int64"}, "x" if unique else None, few if full else None)


def gx(unique: bool, full: bool) -> Validator:
    listed = [TYPED, BETWEEN, *([UNIQUE] if unique else []), *([FULL] if full else [])]
    return GxValidator({"name": "s", "expectations": listed})


@pytest.fixture(params=[rule, gx], ids=lambda make: make.__name__)
def make(request: pytest.FixtureRequest) -> Make:
    found: Make = request.param
    return found


def table(*values: int | None) -> pa.Table:
    return pa.table({"_row_id": [f"r{i}" for i in range(len(values))], "x": pa.array(values, pa.int64()), "_offset": list(range(len(values)))})  # noqa: E501  # fmt: skip


def test_split_keeps_order_columns_and_every_row(make: Make) -> None:
    rows = table(1, -1, None, 10, 9)
    verdict = make(False, False).split(rows)
    assert verdict.accepted.equals(rows.take(pa.array([0, 2, 4])))
    assert verdict.rejected.drop_columns(["_reasons"]).equals(rows.take(pa.array([1, 3])))
    assert [len(r) for r in verdict.rejected["_reasons"].to_pylist()] == [1, 1]
    assert all(r[0].startswith("out_of_range: x=") for r in verdict.rejected["_reasons"].to_pylist())
    assert list(verdict.failures) == []


def test_split_of_good_and_of_no_rows(make: Make) -> None:
    for rows in (table(1, 2), table()):
        verdict = make(False, False).split(rows)
        assert verdict.accepted.equals(rows)
        assert verdict.rejected.num_rows == 0
        assert verdict.rejected.column_names == [*rows.column_names, "_reasons"]


def test_without_whole_batch_rules_there_is_nothing_to_judge(make: Make) -> None:
    validator = make(False, False)
    assert validator.batch_rules == ()
    assert not validator.judge(table(1, 1)).reasons


def test_judge_names_every_row_of_a_double(make: Make) -> None:
    validator = make(True, False)
    (rules,) = validator.batch_rules
    assert (rules.rejects_rows, rules.repeats, rules.columns) == (True, True, ("x",))
    rows = table(1, 2, None, 1, None, 1)
    assert validator.split(rows).rejected.num_rows == 0, "a double is a fact of the batch"
    judged = validator.judge(rows.select(["_row_id", "x"]))
    assert set(judged.reasons) == {"r0", "r3", "r5"}
    assert all(reasons[0].startswith("not_unique: ") for reasons in judged.reasons.values())
    few = rows.select(["_row_id", "x"]).take([0, 3, 5])
    assert validator.judge(few, rules) == judged, "rows whose value occurs once need not be shown"


def test_each_group_of_rules_is_judged_by_itself(make: Make) -> None:
    validator = make(True, True)
    found = {rules.repeats: validator.judge(table(1, 1), rules) for rules in validator.batch_rules}
    assert (set(found[True].reasons), found[True].failures) == ({"r0", "r1"}, [])
    assert (found[False].reasons, len(found[False].failures)) == ({}, 1)
    whole = validator.judge(table(1, 1))
    assert (whole.reasons, whole.failures) == (found[True].reasons, found[False].failures)


def test_judge_says_when_the_whole_batch_fails(make: Make) -> None:
    validator = make(False, True)
    assert [(rules.rejects_rows, rules.repeats) for rules in validator.batch_rules] == [(False, False)]
    assert len(validator.judge(table(1, 2)).failures) == 1
    assert not validator.judge(table(1, 2, 3)).failures


def test_the_digest_names_the_rules_and_the_schema_is_declared(make: Make) -> None:
    assert make(True, False).digest == make(True, False).digest != make(False, False).digest
    assert dict(make(False, False).schema) == {"x": "int64"}
