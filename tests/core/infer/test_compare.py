"""Two models' predictions held against each other, against the truth and against a gate."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from airflow_ai_provider.core.batch import PREDICTIONS, ROW_ID, BatchRef
from airflow_ai_provider.core.infer.compare import Comparison, Gate, Score, compare, measure_speed
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.errors import RowMismatchError, SignatureError, SpecError
from airflow_ai_provider.testing import ArithmeticEngine
from tests.core.infer.batches import PIN, land, rows

OLD, NEW = PIN, replace(PIN, version="2", digest="sha256:" + "2" * 64)
_numbers = itertools.count()


def predicted(
    store: Store, parts: Sequence[pa.Table], values: Sequence[Any], scores: Sequence[float | None]
) -> BatchRef:
    """A stored batch of predictions; a row without a prediction has failed."""
    writer = store.open_batch("p", "predictions", f"made-{next(_numbers)}")
    at = failed = 0
    for part in parts:
        mine, own = list(values[at : at + part.num_rows]), list(scores[at : at + part.num_rows])
        at += part.num_rows
        failed += sum(value is None for value in mine)
        writer.write(
            PREDICTIONS,
            pa.table(
                {
                    ROW_ID: part[ROW_ID],
                    "prediction": pa.array(mine),
                    "score": pa.array(own, pa.float64()),
                    "probabilities": pa.nulls(len(mine), pa.list_(pa.float32())),
                    "error": pa.array(["broken" if value is None else None for value in mine], pa.string()),
                }
            ),
        )
    return writer.land({"accepted": at, "predicted": at - failed, "failed": failed}, {})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path))


def labelled(truth: Sequence[Any]) -> list[pa.Table]:
    """Two parts with a label column."""
    table = rows(len(truth)).append_column("truth", pa.array(truth))
    return [table.slice(0, 2), table.slice(2)]


def test_agreement_accuracy_and_failed_rows_are_counted_over_all_parts(store: Store) -> None:
    parts = labelled(["a", "b", "a", "b"])
    batch = land(store, parts)
    old = predicted(store, parts, ["a", "b", "b", None], [0.9, 0.8, 0.6, None])
    new = predicted(store, parts, ["a", "b", "a", None], [0.7, 0.9, 0.8, None])
    found = compare(store, batch, (OLD, old), (NEW, new), Gate("truth", max_accuracy_drop=0))
    assert (found.row_count, found.agreement) == (4, 0.5), "rows that both failed on are no agreement"
    assert (found.champion.accuracy, found.challenger.accuracy) == (0.5, 0.75)
    assert (found.champion.failed, found.challenger.failed) == (1, 1)
    assert found.challenger.mean_confidence == pytest.approx(0.8)
    assert found.champion.model == "sum/1"


def test_labels_may_be_numbers_where_predictions_are_texts_of_them(store: Store) -> None:
    parts = labelled([1, 0, None, 1])
    batch = land(store, parts)
    guess = predicted(store, parts, ["1", "0", "1", "0"], [1.0] * 4)
    found = compare(store, batch, (OLD, guess), (NEW, guess), Gate("truth", max_accuracy_drop=0))
    assert found.champion.accuracy == 0.5, "a row without a label is nobody's success"
    assert found.agreement == 1.0


def test_numbers_within_the_tolerance_are_the_same(store: Store) -> None:
    parts = labelled([1.0, 2.0, 3.0, 4.0])
    batch = land(store, parts)
    old = predicted(store, parts, [1.0, 2.0, 3.0, 4.0], [None] * 4)
    new = predicted(store, parts, [1.05, 2.05, 3.5, None], [None] * 4)
    found = compare(store, batch, (OLD, old), (NEW, new), Gate("truth", min_agreement=0.5, tolerance=0.1))
    assert found.agreement == 0.5
    assert (found.champion.accuracy, found.challenger.accuracy) == (1.0, 0.5)
    assert found.challenger.mean_confidence is None
    assert found.challenger.calibration_error is None, "no scores, no error of theirs"


def test_the_calibration_error_is_the_published_formula(store: Store) -> None:
    random = np.random.default_rng(3)
    truth = random.integers(0, 2, 500)
    scores = random.uniform(0.5, 1.0, 500)
    guess = np.where(random.uniform(size=500) < scores**2, truth, 1 - truth)
    table = rows(500).append_column("truth", pa.array(truth))
    batch = land(store, [table])
    ref = predicted(store, [table], guess.tolist(), scores.tolist())
    found = compare(store, batch, (OLD, ref), (NEW, ref), Gate("truth", max_calibration_error=1))
    expected = 0.0
    for low in np.arange(0, 1, 0.1):
        inside = (scores >= low) & (scores < low + 0.1)
        if inside.any():
            expected += inside.mean() * abs((guess == truth)[inside].mean() - scores[inside].mean())
    assert found.champion.calibration_error == pytest.approx(expected)
    assert expected > 0.05


def test_predictions_of_other_rows_are_refused(store: Store) -> None:
    parts = labelled(["a", "b", "a", "b"])
    batch = land(store, parts)
    guess = predicted(store, parts, ["a"] * 4, [1.0] * 4)
    foreign = predicted(
        store, [part.set_column(0, ROW_ID, part[ROW_ID].take([1, 0])) for part in parts], ["a"] * 4, [1.0] * 4
    )
    with pytest.raises(RowMismatchError, match="are not of the rows"):
        compare(store, batch, (OLD, guess), (NEW, foreign), Gate(min_agreement=0.5))


def test_a_label_that_is_not_there_is_named(store: Store) -> None:
    parts = labelled(["a", "b"])
    batch = land(store, parts)
    guess = predicted(store, parts, ["a"] * 2, [1.0] * 2)
    with pytest.raises(SignatureError, match="no column 'outcome'"):
        compare(store, batch, (OLD, guess), (NEW, guess), Gate("outcome", max_accuracy_drop=0))


def comparison(
    agreement: float = 1.0, old: float | None = 0.9, new: float | None = 0.9, error: float = 0.0
) -> Comparison:
    return Comparison(
        100, agreement, Score("m/1", "d", 0, old, 0.0, 0.9, 100.0), Score("m/2", "e", 0, new, error, 0.9, 150.0)
    )


@pytest.mark.parametrize(
    ("gate", "found", "failed"),
    [
        (Gate(min_agreement=0.99), comparison(0.99), ""),
        (Gate(min_agreement=0.99), comparison(0.98), "agreement 0.9800, at least 0.99"),
        (Gate("y", max_accuracy_drop=0.01), comparison(new=0.895), ""),
        (Gate("y", max_accuracy_drop=0.01), comparison(new=0.88), "accuracy drop 0.0200, at most 0.01"),
        (Gate("y", max_accuracy_drop=-0.01), comparison(new=0.9), "accuracy drop 0.0000, at most -0.01"),
        (Gate("y", max_accuracy_drop=0.5), comparison(old=None), "accuracy drop unknown"),
        (Gate("y", max_calibration_error=0.05), comparison(error=0.06), "calibration error 0.0600"),
        (Gate(min_speedup=1.4), comparison(), ""),
        (Gate(min_speedup=2), comparison(), "speedup 1.5000, at least 2"),
    ],
)
def test_a_gate_names_each_bar_that_is_not_reached(gate: Gate, found: Comparison, failed: str) -> None:
    failures = gate.failures(found)
    assert bool(failures) == bool(failed)
    assert failed in "; ".join(failures)
    assert Gate.from_dict(gate.to_dict()) == gate
    assert Gate.from_dict({k: str(v) for k, v in gate.to_dict().items()}) == gate, "as templates render it"


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({}, "lets every model pass"),
        ({"label": "y"}, "lets every model pass"),
        ({"max_accuracy_drop": 0.1}, "label: is not set"),
        ({"min_agreement": 1.5}, "not between 0 and 1"),
        ({"min_agreement": float("nan")}, "not between 0 and 1"),
    ],
)
def test_a_gate_that_cannot_be_used_is_refused(values: dict[str, Any], text: str) -> None:
    with pytest.raises(SpecError, match=text):
        Gate(**values)


def test_a_gate_from_a_mapping_names_what_it_does_not_know() -> None:
    with pytest.raises(SpecError, match="min_agrement"):
        Gate.from_dict({"min_agrement": 1})
    with pytest.raises(SpecError, match="could not convert"):
        Gate.from_dict({"min_agreement": "much"})


def test_speed_is_measured_in_turns() -> None:
    speeds = measure_speed([ArithmeticEngine(), ArithmeticEngine()], rows(50), repeats=3)
    assert len(speeds) == 2
    assert all(speed > 0 for speed in speeds)


def test_the_text_has_both_models_and_every_figure() -> None:
    text = comparison().to_text()
    assert "champion m/1" in text
    assert "| accuracy | 0.9000 | 0.9000 |" in text
    assert "| rows per s | 100 | 150 |" in text
