"""The Great Expectations door: verdicts as reasons per row, exceptions that are no verdicts, faults before any row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from airflow_ai_provider.core.ingest.contract import AcceptAll
from airflow_ai_provider.core.ingest.suite import load_suite, open_validator
from airflow_ai_provider.core.ingest.validate import GxValidator, _Frame
from airflow_ai_provider.errors import BatchRejectedError, SpecError

UTC_US = pa.timestamp("us", tz="UTC")


def rule(kind: str, on_failure: str | None = None, /, **kwargs: Any) -> dict[str, Any]:
    name = kind if kind.startswith("expect_") else f"expect_column_values_to_{kind}"
    return {"type": name, "kwargs": kwargs, "meta": {"on_failure": on_failure} if on_failure else {}}


def validator(*rules: dict[str, Any]) -> GxValidator:
    return GxValidator({"name": "s", "expectations": list(rules)})


def table(**columns: Any) -> pa.Table:
    arrays = {name: pa.array(values) if isinstance(values, list) else values for name, values in columns.items()}
    count = len(next(iter(arrays.values())))
    return pa.table({"_row_id": [f"r{i}" for i in range(count)], **arrays})


def rejected(found: GxValidator, rows: pa.Table) -> dict[str, list[str]]:
    verdict = found.split(rows)
    assert verdict.accepted.num_rows + verdict.rejected.num_rows == rows.num_rows
    kept = verdict.accepted["_row_id"].to_pylist()
    assert kept == [i for i in rows["_row_id"].to_pylist() if i in set(kept)], "rows keep their order"
    return dict(zip(verdict.rejected["_row_id"].to_pylist(), verdict.rejected["_reasons"].to_pylist(), strict=True))


def test_all_reasons_of_a_row_in_the_order_of_the_suite() -> None:
    found = validator(
        rule("not_be_null", column="s"),
        rule("be_between", column="a", min_value=0, max_value=10),
        rule("be_in_set", column="s", value_set=["x", "y"]),
        rule("match_regex", column="s", regex="^[a-z]$"),
        rule("expect_column_value_lengths_to_be_between", column="s", max_value=1),
    )
    rows = table(a=[1, 11, None, 5, -1], s=["x", "zz", "y", None, "Q"])
    assert rejected(found, rows) == {
        "r1": [
            "out_of_range: a=11 is not between 0 and 10",
            'not_in_set: s=\'zz\' is not one of ["x", "y"]',
            'bad_format: s=\'zz\' breaks {"regex": "^[a-z]$"}',
            "expect_column_value_lengths_to_be_between: s='zz' breaks {\"max_value\": 1}",
        ],
        "r3": ["missing_field: s=None must not be null"],
        "r4": [
            "out_of_range: a=-1 is not between 0 and 10",
            'not_in_set: s=\'Q\' is not one of ["x", "y"]',
            'bad_format: s=\'Q\' breaks {"regex": "^[a-z]$"}',
        ],
    }


def test_more_than_200_rows_are_named_each() -> None:
    found = validator(rule("be_between", column="a", min_value=0))
    assert len(rejected(found, table(a=[-1] * 1000 + [1] * 5))) == 1000


def test_a_null_leaves_integers_integers() -> None:
    found = validator(rule("match_regex", column="a", regex=r"^\d+$"), rule("be_unique", column="a"))
    rows = table(a=[1, None, 2**53, 2**53 + 1])
    assert rejected(found, rows) == {}
    assert found.judge(rows).reasons == {}


def test_nan_is_a_value_out_of_every_range_and_null_is_not() -> None:
    found = validator(rule("be_between", column="x", min_value=0))
    assert list(rejected(found, table(x=pa.array([1.0, float("nan"), None])))) == ["r1"]


def test_a_column_of_nulls_only_breaks_nothing_but_not_be_null() -> None:
    rules = [rule("be_in_set", column="a", value_set=[1]), rule("be_between", column="a", min_value=0)]
    nulls = table(a=pa.nulls(2, pa.string()))
    assert rejected(validator(*rules), nulls) == {}
    assert list(rejected(validator(*rules, rule("not_be_null", column="a")), nulls)) == ["r0", "r1"]


@pytest.mark.parametrize("bound", ["2020-01-01", "2020-01-01T00:00", "2020-01-01T02:00+02:00", "2020-01-01T00:00:00Z"])
def test_bounds_of_times_may_be_written_in_any_iso_form(bound: str) -> None:
    times = pa.array(["2019-12-31T23:59:59Z", "2020-01-01T00:00:00Z", None]).cast(UTC_US)
    assert list(rejected(validator(rule("be_between", column="t", min_value=bound)), table(t=times))) == ["r0"]


PAIRS = {"a": [1, 5, None, None, 3], "b": [0, None, 4, None, 9]}


@pytest.mark.parametrize(
    ("type_", "kwargs", "broken"),
    [
        # as Great Expectations judges them in its own, numpy-backed frames
        ("expect_column_pair_values_a_to_be_greater_than_b", {}, ["r1", "r2", "r4"]),
        ("expect_column_pair_values_a_to_be_greater_than_b", {"ignore_row_if": "either_value_is_missing"}, ["r4"]),
        ("expect_column_pair_values_to_be_equal", {}, ["r0", "r1", "r2", "r4"]),
    ],
)
def test_nulls_in_rules_that_compare_columns(type_: str, kwargs: dict[str, Any], broken: list[str]) -> None:
    found = validator(rule(type_, column_A="a", column_B="b", **kwargs))
    assert list(rejected(found, table(**PAIRS))) == broken
    summed = validator(rule("expect_multicolumn_sum_to_equal", column_list=["a", "b"], sum_total=1))
    assert list(rejected(summed, table(**PAIRS))) == ["r1", "r2", "r4"]


def test_whole_batch_rules_are_judged_over_all_rows_once() -> None:
    found = validator(
        rule("be_unique", column="a"),
        rule("expect_column_mean_to_be_between", column="a", max_value=2),
        rule("expect_table_row_count_to_be_between", min_value=10),
        rule("be_between", column="a", min_value=0, mostly=0.5),
        rule("be_between", column="a", min_value=3, mostly=0.9),
    )
    rows = table(a=[1, 1, 2, -1, 9])
    assert rejected(found, rows) == {}, "nothing here is a row's own affair"
    repeats, others = found.batch_rules
    assert (repeats.repeats, others.repeats) == (True, False)
    assert (repeats.rejects_rows, others.rejects_rows, repeats.columns, others.columns) == (True, True, ("a",), ("a",))
    judged = found.judge(rows)
    assert judged.failures == ["expect_column_mean_to_be_between(a) (observed 2.4)", "expect_table_row_count_to_be_between() (observed 5)"]  # fmt: skip  # noqa: E501
    assert judged.reasons["r0"] == ["not_unique: a=1 occurs more than once", "out_of_range: a=1 is not between 3 and ∞"]
    assert set(judged.reasons) == {"r0", "r1", "r2", "r3"}


def test_a_batch_without_rows_fails_what_needs_some() -> None:
    empty = pa.table({"_row_id": pa.array([], pa.string()), "a": pa.array([], pa.int64())})
    rows = validator(rule("expect_table_row_count_to_be_between", min_value=1), rule("be_unique", column="a"))
    assert rows.judge(empty).failures == ["expect_table_row_count_to_be_between() (observed 0)"]
    assert rows.judge(empty.select(["_row_id"])).failures


def test_the_policy_decides_what_a_failure_means() -> None:
    rows = table(a=[1, -1, -2])
    assert list(rejected(validator(rule("be_between", "quarantine", column="a", min_value=0)), rows)) == ["r1", "r2"]
    warned = validator(rule("be_between", "warn", column="a", min_value=0)).split(rows)
    assert (warned.accepted.num_rows, dict(warned.warnings)) == (3, {"expect_column_values_to_be_between(a)": 2})
    failed = validator(rule("be_between", "fail", column="a", min_value=0)).split(rows)
    assert (failed.failures, failed.rejected.num_rows) == (["expect_column_values_to_be_between(a)"], 2)
    mean = validator(rule("expect_column_mean_to_be_between", "warn", column="a", min_value=0)).judge(rows)
    assert (mean.failures, dict(mean.warnings)) == ([], {"expect_column_mean_to_be_between(a)": 0})


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        (rule("be_between", column="s", min_value=0), "same type"),
        (rule("match_json_schema", column="s", json_schema={"type": "object"}), "Expecting value"),
        (rule("be_between", column="gone", min_value=0), "not there"),
    ],
)
def test_an_exception_is_not_a_verdict(broken: dict[str, Any], why: str) -> None:
    found = validator(rule("not_be_null", column="s"), broken)
    with pytest.raises(BatchRejectedError, match=rf"expectations\[1\].*could not be judged.*{why}"):
        found.split(table(s=["x", None]))


def test_types_are_the_row_schema_and_never_asked_of_great_expectations() -> None:
    types = {"i": "INTEGER", "f": "float64", "s": "str", "b": "bool", "t": "datetime64[ns]"}
    found = validator(*(rule("be_of_type", column=c, type_=t) for c, t in types.items()), rule("be_null", column="z"))
    assert found.schema == {"i": "int64", "f": "float64", "s": "string", "b": "bool", "t": "timestamp", "z": ""}
    assert validator(rule("be_of_type", column="i", type_="int")).split(table(i=["x"])).rejected.num_rows == 0


def test_all_faults_of_a_suite_come_together() -> None:
    suite = [
        rule("be_betwen", column="a", min_value=0),
        rule("be_between", column="a"),
        rule("be_between", min_value=0),
        rule("be_in_set", column="a", value_set=None),
        rule("match_regex", column="a", regex="(a)?(?(1)b|c)"),
        rule("match_regex_list", column="a", regex_list=["(", "ok"]),
        rule("be_between", column="a", min_value=0, bogus=1),
        rule("expect_column_mean_to_be_between", "quarantine", column="a", min_value=0),
        rule("be_in_type_list", column="a", type_list=["int"]),
    ]
    with pytest.raises(SpecError) as caught:
        validator(*suite)
    text = str(caught.value)
    assert [place for place, _ in caught.value.faults] == [
        "expectations[0].type",
        "expectations[1].kwargs",
        "expectations[2].kwargs",
        "expectations[3].kwargs",
        "expectations[4].kwargs",
        "expectations[5].kwargs",
        "expectations[6].kwargs",
        "expectations[7].meta.on_failure",
        "expectations[8]",
    ]
    assert "did you mean expect_column_values_to_be_between?" in text
    assert "cannot both be None" in text
    assert "is neither RE2" in text
    assert "bogus: extra fields not permitted" in text


def test_faults_of_form_are_found_without_great_expectations() -> None:
    wrong: list[Any] = [
        {"expectation_type": "x"},
        {"type": "expect_x", "kwargs": []},
        rule("be_null", "explode", column="a"),
        rule("be_null", column="_row_id"),
        rule("be_of_type", column="a", type_="intt"),
        rule("be_of_type", column="b", type_="int"),
        rule("be_of_type", column="b", type_="str"),
        rule("be_of_type", "fail", column="c", type_="str"),
    ]
    with pytest.raises(SpecError) as caught:
        load_suite({"expectations": wrong})
    assert len(caught.value.faults) == 7
    with pytest.raises(SpecError, match='"expectations"'):
        load_suite({})


def test_a_missing_or_broken_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"no expectation suite at .*gone\.json.*Write it there"):
        open_validator(tmp_path / "gone.json")
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(SpecError, match="cannot be read as JSON"):
        open_validator(str(broken))
    assert isinstance(open_validator(None), AcceptAll)
    whole = tmp_path / "whole.json"
    whole.write_text(
        json.dumps({"name": "w", "expectations": [rule("be_null", column="a"), rule("be_null", column="a")]})
    )
    assert isinstance(open_validator(whole), GxValidator)


def test_the_digest_is_of_what_the_rules_say() -> None:
    one = {"name": "a", "expectations": [{**rule("be_null", column="a"), "id": "1", "notes": "n"}], "meta": {"v": "1"}}
    assert load_suite(one).digest == load_suite({"expectations": [rule("be_null", column="a")]}).digest
    assert load_suite(one).digest != load_suite({"expectations": [rule("be_null", "warn", column="a")]}).digest
    assert load_suite(one).digest != load_suite({"expectations": [rule("be_null", column="b")]}).digest


def test_no_frame_is_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    import pandas.util

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a block was hashed")

    monkeypatch.setattr(pandas.util, "hash_pandas_object", refuse)
    assert rejected(validator(rule("be_null", column="a")), table(a=[None, 1])) != {}
    assert isinstance(_Frame({"a": [1]})[["a"]], _Frame)
