"""A model's score → a confidence that means what it says: of rows with confidence 0.9, nine in ten are right.

Invariants: pure; a calibration never reorders rows (a higher score never gives a lower confidence) and is plain JSON,
kept beside the model; what is no number from 0 to 1 gives NaN, which never acts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from airflow_ai_provider.core.batch import digest_of
from airflow_ai_provider.errors import SpecError

Floats = npt.NDArray[np.float64]
_METHODS = {"identity": (), "platt": ("a", "b"), "isotonic": ("x", "y")}
_SLACK = 1e-6  # 32-bit probabilities may add up to a little more than 1
_EDGE = 1e-9  # a softmax of exactly 1 has no finite log-odds


@dataclass(frozen=True)
class Calibration:
    """Turn scores into confidences.

    :param method: ``identity`` keeps the score; ``platt`` is a logistic curve over its log-odds (``a``, ``b``);
        ``isotonic`` is a rising line through the points ``x``, ``y``.
    :param params: the method's numbers, plain JSON.
    :raises SpecError: when the numbers do not describe a curve that rises within 0 to 1; a retry does not help.
    """

    method: str = "identity"
    params: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = _METHODS.get(self.method)
        if known is None:
            raise _unusable(f"method {self.method!r} is not one of {', '.join(_METHODS)}")
        if set(self.params) != set(known):
            raise _unusable(f"{self.method} has params {sorted(self.params)}, needs {sorted(known)}")
        if self.method == "platt":
            _check_platt(self.params["a"], self.params["b"])
        elif self.method == "isotonic":
            _check_isotonic(self.params["x"], self.params["y"])

    def apply(self, scores: npt.ArrayLike | pa.Array | pa.ChunkedArray) -> Floats:
        """Return one confidence per score; NaN where the score is null or no number from 0 to 1."""
        score = _as_floats(scores)
        inside = (score >= -_SLACK) & (score <= 1 + _SLACK)
        score = np.where(inside, np.clip(score, 0, 1), np.nan)
        if self.method == "platt":
            return _logistic(self.params["a"] * _log_odds(score) + self.params["b"])
        if self.method == "isotonic":
            return np.asarray(np.interp(score, self.params["x"], self.params["y"]))
        return score

    @property
    def digest(self) -> str:
        """SHA-256 of this calibration."""
        return digest_of(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON, as it is kept in the model's metadata."""
        return {"method": self.method, "params": dict(self.params)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any] | None) -> Calibration:
        """Read what :meth:`to_dict` wrote; None is ``identity``.

        :raises SpecError: when it is not a calibration; a retry does not help.
        """
        if data is None:
            return cls()
        if not isinstance(data, Mapping) or not isinstance(data.get("params", {}), Mapping) or "method" not in data:
            raise _unusable(f"{data!r} is not a mapping with method and params")
        return cls(data["method"], data.get("params", {}))


def fit_platt(scores: npt.ArrayLike, correct: npt.ArrayLike) -> Calibration:
    """Fit a logistic curve over the log-odds of the score (Platt 1999, with his targets that keep off 0 and 1).

    :param scores: probability of the predicted class, one per row that the model has not been trained on.
    :param correct: whether the prediction was right.
    :return: a calibration; constant where a higher score does not mean more right answers.
    :raises SpecError: when there are no rows, or the two differ in length; a retry does not help.
    """
    score, right = _labelled(scores, correct)
    count, hits = len(right), right.sum()
    target = np.where(right, (hits + 1) / (hits + 2), 1 / (count - hits + 2))
    design = np.column_stack([_log_odds(score), np.ones(count)])
    weights = np.array([0.0, _log_odds(np.array([target.mean()]))[0]])
    for _ in range(100):
        p = _logistic(design @ weights)
        # A tiny ridge keeps the step finite when all scores are equal.
        hessian = (design * (p * (1 - p))[:, None]).T @ design + 1e-9 * np.eye(2)
        step = np.linalg.solve(hessian, design.T @ (p - target))
        weights -= np.clip(step, -5, 5)
        if np.abs(step).max() < 1e-10:
            break
    if not weights[0] > 0:
        weights = np.array([0.0, _log_odds(np.array([target.mean()]))[0]])
    return Calibration("platt", {"a": float(weights[0]), "b": float(weights[1])})


def fit_isotonic(scores: npt.ArrayLike, correct: npt.ArrayLike) -> Calibration:
    """Fit the rising line nearest to the share of right answers (pool adjacent violators, Ayer et al. 1955).

    Parameters and errors as for :func:`fit_platt`; needs some hundreds of rows to be worth it.
    """
    score, right = _labelled(scores, correct)
    x, group = np.unique(score, return_inverse=True)
    weight = np.bincount(group).astype(float)
    mean = np.bincount(group, weights=right) / weight
    blocks: list[tuple[float, float, int]] = []  # mean, weight, scores in it
    for m, w in zip(mean, weight, strict=True):
        block = (float(m), float(w), 1)
        while blocks and blocks[-1][0] >= block[0]:
            before = blocks.pop()
            total = before[1] + block[1]
            block = ((before[0] * before[1] + block[0] * block[1]) / total, total, before[2] + block[2])
        blocks.append(block)
    y = np.repeat([b[0] for b in blocks], [b[2] for b in blocks])
    # Only where the line bends; between two points of the same height nothing needs to be kept.
    flat = np.zeros(len(y), dtype=bool)
    flat[1:-1] = (y[1:-1] == y[:-2]) & (y[1:-1] == y[2:])
    return Calibration("isotonic", {"x": x[~flat].tolist(), "y": np.clip(y[~flat], 0, 1).tolist()})


def reliability(confidence: npt.ArrayLike, correct: npt.ArrayLike, bins: int = 10) -> pa.Table:
    """Compare confidence with the share of right answers, bin by bin.

    :param confidence: one per row, 0 to 1; rows without one are left out.
    :param correct: whether the decision was right.
    :param bins: how many bins of equal width.
    :return: one row per bin: ``low``, ``high``, ``row_count``, ``mean_confidence``, ``share_correct`` (null if empty).
    """
    sure, right = np.asarray(confidence, dtype=float), np.asarray(correct, dtype=bool)
    has = ~np.isnan(sure)
    sure, right = sure[has], right[has]
    place = np.minimum((sure * bins).astype(int), bins - 1)
    count = np.bincount(place, minlength=bins)
    empty = count == 0
    share = np.bincount(place, weights=right, minlength=bins) / np.maximum(count, 1)
    mean = np.bincount(place, weights=sure, minlength=bins) / np.maximum(count, 1)
    edges = np.linspace(0, 1, bins + 1)
    return pa.table(
        {
            "low": edges[:-1],
            "high": edges[1:],
            "row_count": count,
            "mean_confidence": pa.array(mean, mask=empty),
            "share_correct": pa.array(share, mask=empty),
        }
    )


def calibration_error(table: pa.Table) -> float:
    """Return the expected calibration error: how far confidence is from the share of right answers, on average.

    :param table: what :func:`reliability` returned; 0.0 for one without rows.
    """
    count = table["row_count"].to_numpy()
    gap = np.abs(_as_floats(table["mean_confidence"]) - _as_floats(table["share_correct"]))
    return float(np.nansum(gap * count) / max(count.sum(), 1))


def _as_floats(values: Any) -> Floats:
    if isinstance(values, pa.Array | pa.ChunkedArray):
        values = values.cast(pa.float64()).to_numpy(zero_copy_only=False) if len(values) else []
    return np.asarray(values, dtype=np.float64)


def _log_odds(p: Floats) -> Floats:
    inside: Floats = np.clip(p, _EDGE, 1 - _EDGE)
    return np.asarray(np.log(inside) - np.log1p(-inside))


def _logistic(x: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-np.clip(x, -700, 700))))


def _labelled(scores: npt.ArrayLike, correct: npt.ArrayLike) -> tuple[Floats, npt.NDArray[np.bool_]]:
    score, right = _as_floats(scores), np.asarray(correct, dtype=bool)
    if len(score) == 0 or len(score) != len(right):
        raise _unusable(
            f"{len(score)} scores and {len(right)} labels were given; give one label per score, at least one"
        )
    if not ((score >= -_SLACK) & (score <= 1 + _SLACK)).all():
        raise _unusable("a score is not a number from 0 to 1; give the probability of the predicted class")
    return score, right


def _check_platt(a: Any, b: Any) -> None:
    numbers = [v for v in (a, b) if isinstance(v, int | float) and not isinstance(v, bool) and np.isfinite(v)]
    if len(numbers) != 2 or a < 0:
        raise _unusable(f"platt needs finite numbers a ≥ 0 and b, has {a!r} and {b!r}")


def _check_isotonic(x: Any, y: Any) -> None:
    try:
        rises = all(one < two for one, two in pairwise(x)) and all(one <= two for one, two in pairwise(y))
        fits = len(x) == len(y) > 0 and all(0 <= v <= 1 for v in [*x, *y])
    except TypeError:
        rises = fits = False
    if not (rises and fits):
        raise _unusable("isotonic needs lists x and y of one length, rising, within 0 to 1")


def _unusable(what: str) -> SpecError:
    return SpecError(
        f"this calibration cannot be used: {what}. Fit it again and log it beside the model.",
        faults=[("calibration", what)],
    )
