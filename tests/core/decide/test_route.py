"""Routes and their reasons, on small tables written out."""

from __future__ import annotations

import time

import numpy as np
import pyarrow as pa
import pytest

from airflow_ai_provider.core.decide.calibrate import Calibration
from airflow_ai_provider.core.decide.policy import Fallback, Policy
from airflow_ai_provider.core.decide.route import route
from airflow_ai_provider.errors import SpecError

RULE = Fallback("radius > 16.8", then="malignant", otherwise="benign")
NAN = float("nan")


def rows(score: list, prediction: list | None = None, radius: list | None = None) -> pa.Table:
    count = len(score)
    return pa.table(
        {
            "radius": pa.array(radius or [1.0] * count, pa.float64()),
            "prediction": pa.array(prediction or ["benign"] * count, pa.string()),
            "score": pa.array(score, pa.float64()),
        }
    )


def column(table: pa.Table, name: str) -> list:
    return table[name].to_pylist()


def test_each_route_with_its_reason_bar_and_decision() -> None:
    table = route(
        rows(
            [0.97, 0.95, 0.7, 0.6, 0.31, 0.31, 0.31, None, NAN, 0.99],
            ["benign"] * 9 + [None],
            [1, 1, 1, 1, 20, 1, NAN, 1, 1, 1],
        ),
        Policy(0.95, 0.60, fallback=RULE),
    )
    assert list(zip(column(table, "route"), column(table, "reason"), strict=True)) == [
        ("act", "confidence 0.97 ≥ act 0.95"),
        ("act", "confidence 0.95 ≥ act 0.95"),
        ("review", "review 0.60 ≤ confidence 0.70 < act 0.95"),
        ("review", "review 0.60 ≤ confidence 0.60 < act 0.95"),
        ("fallback", "confidence 0.31 < review 0.60: rule radius > 16.8 says malignant"),
        ("fallback", "confidence 0.31 < review 0.60: rule radius > 16.8 says benign"),
        ("review", "confidence 0.31 < review 0.60: rule radius > 16.8 has no answer, a value is missing"),
        ("review", "no confidence: the score is missing or no number from 0 to 1"),
        ("review", "no confidence: the score is missing or no number from 0 to 1"),
        ("review", "no prediction"),
    ]
    assert column(table, "bar") == [0.95, 0.95, 0.6, 0.6, 0.6, 0.6, 0.6, None, None, None]
    assert column(table, "decision") == ["benign", "benign", None, None, "malignant", "benign", None, None, None, None]
    assert column(table, "decided_by") == ["model", "model", None, None, "rule", "rule", None, None, None, None]
    assert column(table, "confidence")[7:9] == [None, None]


@pytest.mark.parametrize("otherwise", ["hold", "review"])
def test_without_a_rule_the_rest_waits(otherwise: str) -> None:
    table = route(rows([0.31]), Policy(0.95, 0.60, otherwise))
    assert column(table, "route") == [otherwise]
    assert column(table, "reason") == [f"confidence 0.31 < review 0.60: otherwise {otherwise}"]
    assert column(table, "decision") == [None]


def test_a_confidence_just_below_a_bar_is_not_written_as_the_bar() -> None:
    table = route(rows([0.949999999, 0.57, 0.29, 1.0, 0.0]), Policy(0.95, 0.29))
    assert column(table, "reason") == [
        "review 0.29 ≤ confidence 0.9499 < act 0.95",
        "review 0.29 ≤ confidence 0.57 < act 0.95",
        "review 0.29 ≤ confidence 0.29 < act 0.95",
        "confidence 1.00 ≥ act 0.95",
        "confidence 0.00 < review 0.29: otherwise hold",
    ]
    fine = route(rows([0.99995, 0.999949]), Policy(0.99995, 0.1))
    assert column(fine, "reason") == [
        "confidence 0.99995 ≥ act 0.99995",
        "review 0.10 ≤ confidence 0.99994 < act 0.99995",
    ]
    many = route(rows([0.12345678901, 0.12345678902]), Policy(0.123456789015, 0.1))
    assert column(many, "route") == ["review", "act"]
    assert column(many, "reason")[1] == "confidence 0.12345678902 ≥ act 0.123456789015"


def test_confidence_is_the_calibrated_score() -> None:
    halved = Calibration("isotonic", {"x": [0.0, 1.0], "y": [0.0, 0.5]})
    table = route(rows([0.98, None]), Policy(0.95, 0.4), halved)
    assert column(table, "confidence") == [0.49, None]
    assert column(table, "score") == [0.98, None]
    assert column(table, "route") == ["review", "review"]


def test_no_rows() -> None:
    table = route(rows([0.5]).slice(0, 0), Policy(0.95, 0.6, fallback=RULE))
    assert table.num_rows == 0
    assert table.schema.equals(route(rows([0.5]), Policy(0.95, 0.6, fallback=RULE)).schema)


@pytest.mark.parametrize(
    ("kind", "value", "then", "otherwise"),
    [
        (pa.int64(), 1, 1, 0),
        (pa.float32(), 1.0, 1, 0.5),
        (pa.bool_(), True, True, False),
        (pa.large_string(), "a", "a", "b"),
        (pa.dictionary(pa.int8(), pa.string()), "a", "a", "b"),
    ],
)
def test_decisions_have_the_type_of_the_predictions(kind, value, then, otherwise) -> None:
    table = rows([0.99, 0.1]).set_column(1, "prediction", pa.array([value, value], kind))
    decided = route(table, Policy(0.9, 0.5, fallback=Fallback("radius > 16.8", then, otherwise)))
    assert column(decided, "decision") == [value, otherwise]


@pytest.mark.parametrize(
    ("kind", "then", "otherwise"),
    [(pa.string(), True, False), (pa.int64(), "a", "b"), (pa.int64(), 1.5, 0.5), (pa.bool_(), 1, 0)],
)
def test_a_rule_cannot_decide_what_the_model_could_not_say(kind, then, otherwise) -> None:
    table = rows([0.99]).set_column(1, "prediction", pa.nulls(1, kind))
    with pytest.raises(SpecError, match="but the model predicts"):
        route(table, Policy(0.9, 0.5, fallback=Fallback("radius > 1", then, otherwise)))


def test_columns_that_the_decision_adds_may_not_be_there() -> None:
    with pytest.raises(SpecError, match="columns named reason"):
        route(rows([0.5]).append_column("reason", pa.array(["x"])), Policy(0.9, 0.5))
    with pytest.raises(SpecError, match="the rows have no score"):
        route(rows([0.5]).drop_columns("score"), Policy(0.9, 0.5))


def test_an_unknown_column_names_those_there_are() -> None:
    with pytest.raises(SpecError, match=r"no column 'worst_radius'; the rows have radius, prediction, score"):
        route(rows([0.5]), Policy(0.9, 0.5, fallback=Fallback("worst_radius > 1", "a", "b")))


def test_a_million_rows_take_well_under_three_seconds() -> None:
    # Measured: 0.4 s on two cores, in the time that this process worked, for a machine's other work is not the code's;
    # the bar leaves no room for a loop over rows.
    chance, count = np.random.default_rng(1), 1_000_000
    table = rows(chance.random(count).tolist(), ["benign"] * count, (chance.random(count) * 30).tolist())
    start = time.process_time()
    decided = route(table, Policy(0.95, 0.6, fallback=RULE), Calibration("platt", {"a": 1.2, "b": -0.1}))
    assert time.process_time() - start < 3
    assert decided.num_rows == count
