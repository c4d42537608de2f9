"""Calibration: what it promises about order, truth and what is no score."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from airflow_ai_provider.core.decide.calibrate import (
    Calibration,
    calibration_error,
    fit_isotonic,
    fit_platt,
    reliability,
)
from airflow_ai_provider.errors import SpecError


def overconfident(count: int = 20_000, seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Scores of a model that is right less often than it says: with score s it is right in s² of the cases."""
    chance = np.random.default_rng(seed)
    scores = chance.uniform(0.3, 1.0, count)
    return scores, chance.random(count) < scores**2


@pytest.mark.parametrize("fit", [fit_platt, fit_isotonic])
def test_fitting_makes_confidence_mean_what_it_says(fit) -> None:
    calibration = fit(*overconfident())
    scores, right = overconfident(seed=4)
    before = calibration_error(reliability(scores, right))
    after = calibration_error(reliability(calibration.apply(scores), right))
    assert before > 0.1
    assert after < 0.02


def test_platt_finds_the_curve_that_made_the_labels() -> None:
    chance = np.random.default_rng(5)
    scores = chance.uniform(0.01, 0.99, 50_000)
    truth = Calibration("platt", {"a": 0.6, "b": -0.4})
    found = fit_platt(scores, chance.random(50_000) < truth.apply(scores))
    assert found.params["a"] == pytest.approx(0.6, abs=0.03)
    assert found.params["b"] == pytest.approx(-0.4, abs=0.03)


@pytest.mark.parametrize("fit", [fit_platt, fit_isotonic])
@pytest.mark.parametrize(
    ("scores", "right"),
    [([1.0, 1.0, 1.0], [1, 1, 1]), ([0.5], [0]), ([0.0, 1.0], [1, 1]), ([0.9] * 50 + [0.2] * 50, [0] * 50 + [1] * 50)],
)
def test_poor_samples_still_give_a_curve_that_rises_within_bounds(fit, scores, right) -> None:
    curve = fit(scores, right).apply(np.linspace(0, 1, 101))
    assert ((curve >= 0) & (curve <= 1)).all()
    assert (np.diff(curve) >= 0).all()


def test_what_is_no_score_has_no_confidence() -> None:
    scores = pa.chunked_array([[0.5, None, float("nan")], [1.1, -0.1, float("inf"), 1.0000001]])
    for calibration in (
        Calibration(),
        Calibration("platt", {"a": 1.0, "b": 0.0}),
        Calibration("isotonic", {"x": [0.0, 1.0], "y": [0.0, 1.0]}),
    ):
        got = calibration.apply(scores)
        assert np.isnan(got).tolist() == [False, True, True, True, True, True, False]
        assert got[[0, 6]] == pytest.approx([0.5, 1.0], abs=1e-6)
    assert len(Calibration().apply(pa.chunked_array([], pa.float64()))) == 0


def test_it_travels_as_json() -> None:
    calibration = fit_isotonic(*overconfident(500))
    again = Calibration.from_dict(calibration.to_dict())
    assert again == calibration
    assert again.digest == calibration.digest
    assert Calibration.from_dict(None) == Calibration("identity")


@pytest.mark.parametrize(
    "data",
    [
        {"method": "magic"},
        {"method": "platt", "params": {"a": 1.0}},
        {"method": "platt", "params": {"a": -1.0, "b": 0.0}},
        {"method": "platt", "params": {"a": float("nan"), "b": 0.0}},
        {"method": "platt", "params": {"a": "1", "b": 0.0}},
        {"method": "isotonic", "params": {"x": [0.1, 0.1], "y": [0.1, 0.2]}},
        {"method": "isotonic", "params": {"x": [0.1, 0.2], "y": [0.3, 0.2]}},
        {"method": "isotonic", "params": {"x": [], "y": []}},
        {"method": "isotonic", "params": {"x": [0.1, 0.2], "y": [0.1, 1.2]}},
        {"method": "isotonic", "params": {"x": 1, "y": None}},
        {"params": {}},
        "platt",
        5,
    ],
)
def test_a_curve_that_cannot_be_trusted_is_refused(data) -> None:
    with pytest.raises(SpecError, match="cannot be used"):
        Calibration.from_dict(data)


def test_labels_must_fit_the_scores() -> None:
    with pytest.raises(SpecError, match="2 scores and 1 labels"):
        fit_platt([0.1, 0.2], [1])
    with pytest.raises(SpecError, match="0 scores"):
        fit_isotonic([], [])
    with pytest.raises(SpecError, match="not a number from 0 to 1"):
        fit_platt([1.5], [1])


def test_reliability_counts_each_row_with_a_confidence_once() -> None:
    table = reliability([0.05, 0.05, 0.95, 1.0, float("nan")], [0, 1, 1, 1, 1], bins=10)
    assert table["row_count"].to_pylist() == [2, 0, 0, 0, 0, 0, 0, 0, 0, 2]
    assert table["share_correct"].to_pylist()[0] == 0.5
    assert table["share_correct"].to_pylist()[1] is None
    assert calibration_error(table) == pytest.approx((0.45 * 2 + 0.025 * 2) / 4)
    assert calibration_error(reliability([], [])) == 0.0
