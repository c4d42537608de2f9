"""Templates: rows cannot break out, names that are missing are said, the result is JSON."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_ai_provider.core.act.template import open_template, plain
from airflow_ai_provider.errors import SpecError

RUN = {"run_id": "r1", "pipeline": "p", "action": "ticket", "model": {"name": "triage", "version": "3"}}
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


def render(text: str | None, **row: Any) -> Any:
    return open_template("ticket", text, RUN)({"_row_id": "orders/0/7", **row})


def test_a_template_sees_the_row_and_the_run() -> None:
    text = (
        '{"subject": "{{ row.id }}", "score": {{ row.score }}, "model": "{{ run.model.version }}", "ok": {{ row.ok }}}'
    )
    assert render(text, id="B-1", score=0.97, ok=True) == {"subject": "B-1", "score": 0.97, "model": "3", "ok": True}
    assert render(
        '[{{ row.x }}, {{ row.l }}, {{ row.d | tojson }}, "{{ run.run_id }}"]', x=None, l=[1, "a"], d={"k": "é"}
    ) == [
        None,
        [1, "a"],
        {"k": "é"},
        "r1",
    ]


@given(st.text())
def test_a_text_cannot_break_out_of_its_quotes(value: str) -> None:
    assert render('{"a": "{{ row.v }}", "b": {{ row.v | tojson }}}', v=value) == {"a": value, "b": value}


@given(json_values)
def test_tojson_prints_any_value_whole(value: Any) -> None:
    assert render('{"v": {{ row.v | tojson }}}', v=value) == {"v": value}


def test_a_text_made_in_the_template_is_escaped_too() -> None:
    assert render('{"a": "{{ row.x ~ row.y }}", "b": "{{ row.x | upper }}"}', x='q"', y="\\") == {
        "a": 'q"\\',
        "b": 'Q"',
    }


def test_without_a_template_the_rows_own_columns_are_sent() -> None:
    row = {"id": "B-1", "_offset": 7, "at": datetime(2026, 1, 2, tzinfo=UTC), "score": float("nan"), "raw": b"\x00\xff"}
    assert render(None, **row) == {"id": "B-1", "at": "2026-01-02T00:00:00+00:00", "score": None, "raw": "AP8="}


def test_values_as_json() -> None:
    values = [date(2026, 1, 2), timedelta(minutes=1), Decimal("1.10"), (1, {"a": float("inf")}), 2**70]
    assert [plain(v) for v in values] == ["2026-01-02", 60.0, "1.10", [1, {"a": None}], 2**70]
    with pytest.raises(SpecError, match="object has no JSON form"):
        plain(object())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": "{{ row.nope }}"}', "'dict object' has no attribute 'nope'"),
        ('{"a": {{ row.nope }}}', "has no attribute 'nope'"),
        ('{"a": "{{ nope }}"}', "'nope' is undefined"),
        ('{"a": {{ row.name }}}', "printed no JSON"),
        ('{"a": NaN}', "NaN is not JSON"),
        ('{"a": 1,}', "printed no JSON"),
        ("", "printed no JSON"),
        ('{"a": {{ row.name + 1 }}}', "can only concatenate"),
        ('{"a": {{ 1 / row.zero }}}', "division by zero"),
        ("{% for i in range(1000000000) %}{{ i }}{% endfor %}", "Range too big"),
        ("{{ row.__class__.__mro__ }}", "unsafe"),
        ("{{ ''.__class__ }}", "unsafe"),
        ("{{ row.update({'a': 1}) }}", "unsafe"),
        ("{% include 'secret' %}", "no loader"),
    ],
)
def test_faults_name_template_row_and_next_move(text: str, says: str) -> None:
    with pytest.raises(SpecError) as caught:
        render(text, name="Zoë", zero=0)
    told = str(caught.value)
    assert says in told
    assert told.startswith("template of action ticket: row orders/0/7: ")
    assert "default" in told or "tojson" in told


def test_a_template_that_is_none_is_said_before_any_row() -> None:
    with pytest.raises(SpecError, match=r"template of action ticket: line 2: .*Correct the template"):
        open_template("ticket", '{\n"a": {{ row.x }', RUN)


def test_render_is_json_plain() -> None:
    assert json.loads(json.dumps(render('{"a": [1.5, "x", null]}'))) == {"a": [1.5, "x", None]}
