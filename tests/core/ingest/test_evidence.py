"""Whole-batch rules over evidence on disk: the verdict is that over all rows, however many are shown."""

from __future__ import annotations

import os
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from airflow_ai_provider.core.ingest.contract import BatchRules
from airflow_ai_provider.core.ingest.evidence import find_repeated, judge
from airflow_ai_provider.core.ingest.validate import GxValidator
from airflow_ai_provider.testing import RuleValidator

COLUMNS = {
    "i": (st.none() | st.integers(-3, 3), pa.int64()),
    "f": (st.none() | st.sampled_from([0.0, -0.0, 1.5, float("nan"), float("inf")]), pa.float64()),
    "s": (st.none() | st.text("aé", max_size=2), pa.string()),
    "d": (st.none() | st.dates(date(2020, 1, 1), date(2020, 1, 4)), pa.date32()),
    "t": (st.none() | st.datetimes().map(lambda at: at.replace(year=2020, month=1, microsecond=0)), pa.timestamp("us")),
    "l": (st.none() | st.lists(st.integers(0, 1), max_size=1), pa.list_(pa.int64())),
}


def table(values: dict[str, list[Any]], first: int = 0) -> pa.Table:
    count = len(next(iter(values.values())))
    columns = {name: pa.array(column, COLUMNS[name][1]) for name, column in values.items()}
    return pa.table({"_row_id": [f"r{first + n}" for n in range(count)], **columns})


def same(value: Any) -> Any:
    """How Great Expectations sees a value: NaN is one value, and 0.0 has no sign."""
    return repr(value + 0.0 if isinstance(value, float) else value)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from([("i",), ("f",), ("s",), ("d",), ("t",), ("l",), ("i", "s"), ("f", "l")]))
def test_what_is_shown_holds_every_row_that_shares_its_values(data: st.DataObject, names: tuple[str, ...]) -> None:
    count = data.draw(st.integers(0, 30))
    rows = {n: data.draw(st.lists(COLUMNS[n][0], min_size=count, max_size=count)) for n in names}
    whole = table(rows)
    tables = [whole.slice(0, count // 3), whole.slice(count // 3)]
    shown = find_repeated(lambda: iter(tables), BatchRules(names, True, True), at_once=4)
    keys = list(zip(*([same(v) for v in rows[n]] for n in names), strict=True))
    often = Counter(keys)
    wanted = {f"r{i}" for i, key in enumerate(keys) if often[key] > 1 and (len(names) > 1 or key != ("None",))}
    assert wanted <= set(shown["_row_id"].to_pylist())
    assert shown["_row_id"].to_pylist() == sorted(shown["_row_id"].to_pylist(), key=lambda name: int(name[1:]))


UNIQUE = [
    {"type": "expect_column_values_to_be_unique", "kwargs": {"column": "s"}},
    {"type": "expect_compound_columns_to_be_unique", "kwargs": {"column_list": ["i", "s"]}},
    {
        "type": "expect_compound_columns_to_be_unique",
        "kwargs": {"column_list": ["i", "f"], "ignore_row_if": "any_value_is_missing"},
    },
    {"type": "expect_column_mean_to_be_between", "kwargs": {"column": "f", "max_value": 1}},
    {"type": "expect_column_values_to_be_unique", "kwargs": {"column": "i"}, "meta": {"on_failure": "warn"}},
]


@pytest.mark.parametrize("at", range(4))
def test_the_verdict_is_that_over_the_whole_table(at: int) -> None:
    """Great Expectations over all rows at once, beside the same rules over what is shown to them, in blocks."""
    rows = {
        "s": ["a", "b", "a", None, None, "c", "é", "é"],
        "i": [1, 2, 1, 3, 3, None, None, 4],
        "f": [0.5, float("nan"), 0.5, -0.0, 0.0, 9.0, 9.0, float("nan")],
    }
    whole = table({name: values[at:] + values[:at] for name, values in rows.items()})
    validator = GxValidator({"name": "s", "expectations": UNIQUE})
    assert [rules.repeats for rules in validator.batch_rules] == [True, True, True, False, True]
    expected = validator.judge(whole)
    found = judge(validator, lambda: iter([whole.slice(0, 3), whole.slice(3, 1), whole.slice(4)]))
    assert {row_id: sorted(reasons) for row_id, reasons in found.reasons.items()} == {
        row_id: sorted(reasons) for row_id, reasons in expected.reasons.items()
    }
    assert found.failures == list(expected.failures)
    assert dict(found.warnings) == dict(expected.warnings)


def test_a_rule_with_a_share_or_a_condition_sees_all_rows() -> None:
    for kwargs in ({"mostly": 0.5}, {"row_condition": "i > 1", "condition_parser": "pandas"}):
        rule = {"type": "expect_column_values_to_be_unique", "kwargs": {"column": "s", **kwargs}}
        assert [r.repeats for r in GxValidator({"name": "s", "expectations": [rule]}).batch_rules] == [False]


def test_a_column_that_is_not_there_is_for_the_validator_to_judge() -> None:
    rows = table({"i": [1, 1]})
    assert judge(RuleValidator(unique="s"), lambda: iter([rows])).reasons == {}
    assert set(judge(RuleValidator(unique="i"), lambda: iter([rows])).reasons) == {"r0", "r1"}
    assert judge(RuleValidator(whole=lambda t: [f"{t.num_rows} rows"]), lambda: iter([])).failures == ["0 rows"]


@pytest.mark.parametrize(
    ("rules", "block"),
    [
        pytest.param({"unique": "i"}, 4, id="hashes written"),
        pytest.param({"unique": "i"}, 6, id="hashes read"),
        pytest.param({"whole": lambda shown: ["no"]}, 3, id="columns written"),
    ],
)
def test_a_killed_landing_leaves_nothing_on_the_local_disk(
    rules: dict[str, Any], block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "of-somebody-else").touch()
    told, tell = os.pipe()
    count = 0

    def tables() -> Iterator[pa.Table]:
        nonlocal count
        for n in range(3):
            count += 1
            if count == block:
                os.write(tell, " ".join(str(file.resolve()) for file in Path("/proc/self/fd").iterdir()).encode())
                os.kill(os.getpid(), signal.SIGKILL)
            yield table({"i": [n, 1]}, first=2 * n)

    pid = os.fork()
    if pid == 0:
        judge(RuleValidator(**rules), tables)
        os._exit(0)
    os.close(tell)
    with os.fdopen(told, "rb") as pipe:
        assert str(tmp_path).encode() in pipe.read(), "it was writing there"
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["of-somebody-else"]
