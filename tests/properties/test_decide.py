"""What holds for any rows and any policy: rows are conserved, doubt never acts, reasons never contradict routes."""

from __future__ import annotations

import math
import re

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from airflow_ai_provider.core.batch import ROUTES
from airflow_ai_provider.core.decide.calibrate import Calibration, fit_isotonic, fit_platt
from airflow_ai_provider.core.decide.policy import Fallback, Policy
from airflow_ai_provider.core.decide.route import route
from airflow_ai_provider.core.decide.rule import answer, find_faults

BARS = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.5, 0.6, 0.95, 1.0]))
SCORES = st.one_of(st.none(), st.floats(), st.floats(0, 1), st.sampled_from([0.5, 0.6, 0.95, 0.9499999999999999]))
CALIBRATIONS = st.sampled_from(
    [
        None,
        Calibration("platt", {"a": 2.0, "b": -1.0}),
        Calibration("platt", {"a": 0.0, "b": 0.3}),
        Calibration("isotonic", {"x": [0.2, 0.5, 0.9], "y": [0.1, 0.1, 0.99]}),
    ]
)


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    low, high = sorted((draw(BARS), draw(BARS)))
    otherwise = draw(st.sampled_from(["fallback", "review", "hold"]))
    fallback = Fallback("x > 0 and x < 10", "yes", "no") if otherwise == "fallback" else None
    return Policy(high, low, otherwise, fallback)


@st.composite
def tables(draw: st.DrawFn) -> pa.Table:
    lines = draw(st.lists(st.tuples(SCORES, st.sampled_from(["yes", "no", None]), st.one_of(st.none(), st.floats()))))
    return pa.table(
        {
            "_row_id": [str(i) for i in range(len(lines))],
            "x": pa.array([line[2] for line in lines], pa.float64()),
            "prediction": pa.array([line[1] for line in lines], pa.string()),
            "score": pa.array([line[0] for line in lines], pa.float64()),
        }
    )


@given(tables(), policies(), CALIBRATIONS)
def test_every_row_comes_out_once_in_order_on_a_known_route(rows, policy, calibration) -> None:
    decided = route(rows, policy, calibration)
    assert repr(decided.select(rows.column_names).to_pylist()) == repr(rows.to_pylist())  # NaN is not equal to itself
    assert set(decided["route"].to_pylist()) <= set(ROUTES)
    assert decided["reason"].null_count == 0


@given(tables(), policies(), CALIBRATIONS)
def test_doubt_never_acts_and_only_decided_rows_have_a_decision(rows, policy, calibration) -> None:
    for row in route(rows, policy, calibration).to_pylist():
        if row["confidence"] is None or row["prediction"] is None:
            assert row["route"] == "review"
        assert row["confidence"] is None or 0 <= row["confidence"] <= 1
        decider = {"act": "model", "fallback": "rule"}.get(row["route"])
        assert row["decided_by"] == decider
        assert (row["decision"] is not None) == (decider is not None)
        assert (row["route"] == "act") == (
            row["prediction"] is not None and row["confidence"] is not None and row["confidence"] >= policy.act
        )


@given(tables(), policies(), BARS, CALIBRATIONS)
def test_raising_the_bar_never_acts_on_more(rows, policy, bar, calibration) -> None:
    higher = Policy(max(policy.act, bar), policy.review, policy.otherwise, policy.fallback)
    acts = [set(_ids(route(rows, p, calibration), "act")) for p in (policy, higher)]
    assert acts[1] <= acts[0]


def _ids(table: pa.Table, name: str) -> list[str]:
    return [row["_row_id"] for row in table.to_pylist() if row["route"] == name]


@given(tables(), policies())
def test_cutting_the_table_changes_no_row(rows, policy) -> None:
    half = rows.num_rows // 2
    cut = pa.concat_tables([route(rows.slice(0, half), policy), route(rows.slice(half), policy)])
    assert repr(cut.to_pylist()) == repr(route(rows, policy).to_pylist())


@given(st.lists(st.floats(0, 1), min_size=1), st.integers(0, 10_000), st.integers(0, 10_000))
def test_the_reason_never_contradicts_the_route(scores, one, two) -> None:
    low, high = sorted((one / 10_000, two / 10_000))
    rows = pa.table({"prediction": ["a"] * len(scores), "score": scores})
    for row in route(rows, Policy(high, low)).to_pylist():
        written = float(re.search(r"confidence (\S+)", row["reason"])[1].rstrip(":"))
        assert written <= row["confidence"]
        assert (written >= high) == (row["route"] == "act")
        assert (written >= low) == (row["route"] in ("act", "review"))


@settings(max_examples=50)
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60))
def test_a_fitted_curve_rises_and_stays_within_bounds(labelled) -> None:
    scores, right = [s for s, _ in labelled], [r for _, r in labelled]
    for fit in (fit_platt, fit_isotonic):
        curve = fit(scores, right).apply(np.linspace(0, 1, 51))
        assert ((curve >= 0) & (curve <= 1)).all()
        assert (np.diff(curve) >= -1e-12).all()


NUMBERS = st.one_of(st.integers(-100, 100), st.floats(-100, 100).map(lambda f: round(f, 3)))
COMPARE = st.sampled_from(["<", "<=", ">", ">=", "==", "!="])


@st.composite
def rules(draw: st.DrawFn, depth: int = 3) -> str:
    if depth == 0 or draw(st.booleans()):
        left = draw(st.sampled_from(["x", "y", "x + y", "x * 2", "-y", "x / y"]))
        return f"{left} {draw(COMPARE)} {draw(NUMBERS)}"
    kind = draw(st.sampled_from(["and", "or", "not"]))
    if kind == "not":
        return f"not ({draw(rules(depth - 1))})"
    return f"({draw(rules(depth - 1))}) {kind} ({draw(rules(depth - 1))})"


@given(rules(), st.lists(st.tuples(st.floats(-100, 100), st.floats(-100, 100)), min_size=1, max_size=10))
def test_a_rule_answers_as_python_would(rule, pairs) -> None:
    assert find_faults(rule) == []
    rows = pa.table({"x": [x for x, _ in pairs], "y": [y for _, y in pairs]})
    for (x, y), said in zip(pairs, answer(rule, rows).to_pylist(), strict=True):
        finite = y != 0 and math.isfinite(x / y)
        if finite or "/" not in rule:
            assert said == eval(rule, {}, {"x": x, "y": y})


@given(st.text(max_size=40))
def test_any_text_is_a_rule_or_has_faults_and_never_runs(text) -> None:
    faults = find_faults(text)
    assert all(isinstance(fault, str) and fault for fault in faults)
