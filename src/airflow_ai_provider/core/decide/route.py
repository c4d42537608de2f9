"""Predictions → decisions: each row on exactly one route, with the reason that a person can read.

Invariants: pure; order and number of rows are kept; a row without confidence never acts; whatever is decided below
the bars is decided by the rule, never by the model; the reason's numbers never contradict the route (digits are cut
off, not rounded up across a bar).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from airflow_ai_provider.core.batch import ROUTES
from airflow_ai_provider.core.decide.calibrate import Calibration
from airflow_ai_provider.core.decide.policy import Fallback, Policy
from airflow_ai_provider.core.decide.rule import answer
from airflow_ai_provider.errors import SpecError

ADDED = ("confidence", "route", "reason", "bar", "decision", "decided_by")
PREDICTED = ("prediction", "score")
_ACT, _REVIEW, _FALLBACK, _HOLD = (ROUTES.index(name) for name in ("act", "review", "fallback", "hold"))
# Why a row is on its route; the order of _texts().
_SURE, _UNSURE, _BELOW, _YES, _NO, _SILENT, _BARE, _EMPTY = range(8)
_BY_RULE, _BY_MODEL = 0, 1
Codes = npt.NDArray[np.int64]


def route(rows: pa.Table, policy: Policy, calibration: Calibration | None = None) -> pa.Table:
    """Decide every row.

    :param rows: the rows with ``prediction`` and ``score`` (0 to 1, null when there is none).
    :param policy: the bars, and what becomes of the rest.
    :param calibration: how a score becomes a confidence; None takes the score as it is.
    :return: the same rows in the same order with ``confidence``, ``route``, ``reason``, ``bar`` (the bar that decided),
        ``decision`` and ``decided_by`` (``model`` or ``rule``); the last two are null where nobody has decided yet.
    :raises SpecError: when the rule does not fit the rows, or a column has the name of one of these; a retry does not
        help.
    """
    _check_columns(rows)
    confidence = (calibration or Calibration()).apply(rows["score"])
    why = _why(rows, policy, confidence)
    codes = _routes(policy)[why]
    bars = np.array([policy.act, *[policy.review] * 5, np.nan, np.nan])[why]
    added = {
        "confidence": pa.array(confidence, mask=np.isnan(confidence)),
        "route": pa.DictionaryArray.from_arrays(codes.astype(np.int8), list(ROUTES)).cast(pa.string()),
        "reason": _reasons(policy, confidence, why),
        "bar": pa.array(bars, mask=np.isnan(bars)),
        "decision": _decisions(rows["prediction"], policy.fallback, why),
        "decided_by": _decided_by(why),
    }
    for name, column in added.items():
        rows = rows.append_column(name, column)
    return rows


def check_fallback(prediction: pa.DataType, fallback: Fallback | None) -> pa.DataType:
    """Return the type of the decisions.

    :param prediction: the type of the model's predictions.
    :raises SpecError: when what the rule decides is not of the type that the model predicts; a retry does not help.
    """
    decided = prediction.value_type if pa.types.is_dictionary(prediction) else prediction
    if fallback is None or pa.types.is_null(decided):
        return decided if fallback is None else pa.scalar(fallback.then).type
    for value in (fallback.then, fallback.otherwise):
        fits = (
            isinstance(value, bool) == pa.types.is_boolean(decided)
            and isinstance(value, str) == (pa.types.is_string(decided) or pa.types.is_large_string(decided))
            and (not isinstance(value, float) or pa.types.is_floating(decided))
        )
        if not fits:
            what = f"decides {value!r}, but the model predicts {decided}"
            raise SpecError(
                f"the fallback rule {fallback.rule!r} {what}. Let 'then' and 'else' be values that it predicts.",
                faults=[("fallback.then", what)],
            )
    return decided


def _check_columns(rows: pa.Table) -> None:
    names = rows.column_names
    taken = [name for name in ADDED if name in names]
    if taken:
        raise SpecError(
            f"the rows have columns named {', '.join(taken)}, which the decision adds. Rename them at the source.",
            faults=[(name, "is the name of a column that the decision adds") for name in taken],
        )
    missing = [name for name in PREDICTED if name not in names]
    if missing:
        raise SpecError(
            f"the rows have no {' and no '.join(missing)}; they have {', '.join(names)}. Decide predictions only.",
            faults=[(name, "is missing") for name in missing],
        )


def _why(rows: pa.Table, policy: Policy, confidence: npt.NDArray[np.float64]) -> Codes:
    # NaN compares false with everything: it lands on no bar
    why = np.where(confidence >= policy.act, _SURE, np.where(confidence >= policy.review, _UNSURE, _BELOW))
    if policy.fallback is not None:
        said = answer(policy.fallback.rule, rows)
        yes = pc.fill_null(said, False).to_numpy(zero_copy_only=False)
        ruled = np.where(said.is_null().to_numpy(zero_copy_only=False), _SILENT, np.where(yes, _YES, _NO))
        why = np.where(why == _BELOW, ruled, why)
    why = np.where(np.isnan(confidence), _BARE, why)
    return np.where(rows["prediction"].is_null().to_numpy(zero_copy_only=False), _EMPTY, why)


def _routes(policy: Policy) -> Codes:
    below = ROUTES.index(str(policy.otherwise))
    return np.array([_ACT, _REVIEW, below, _FALLBACK, _FALLBACK, _REVIEW, _REVIEW, _REVIEW])


def _texts(policy: Policy) -> list[tuple[str, str]]:
    """What comes before and after the confidence in the reason for each code."""
    act, review, rule = _digits(policy.act), _digits(policy.review), policy.fallback
    below = f" < review {review}"
    then = [f": rule {rule.rule} says {_word(v)}" for v in (rule.then, rule.otherwise)] if rule else ["", ""]
    silent = f": rule {rule.rule} has no answer, a value is missing" if rule else ""
    return [
        ("confidence ", f" ≥ act {act}"),
        (f"review {review} ≤ confidence ", f" < act {act}"),
        ("confidence ", f"{below}: otherwise {policy.otherwise}"),
        ("confidence ", below + then[0]),
        ("confidence ", below + then[1]),
        ("confidence ", below + silent),
        ("no confidence: the score is missing or no number from 0 to 1", ""),
        ("no prediction", ""),
    ]


def _reasons(policy: Policy, confidence: npt.NDArray[np.float64], why: Codes) -> pa.Array:
    """Write each distinct reason once and let the rows point to it: a million rows have some thousand reasons."""
    places = max(4, *(len(repr(float(bar)).partition(".")[2]) for bar in (policy.act, policy.review)))
    scale = 10 ** min(places, 15)
    sure = np.nan_to_num(confidence)
    step = np.floor(sure * scale).astype(np.int64)
    # 0.57 * 10000 is 5699.999…: correct what the multiplication lost
    step += (step + 1) / scale <= sure
    step -= step / scale > sure
    step = np.where(why >= _BARE, 0, step)
    distinct, index = _distinct(why * (scale + 1) + step, 8 * (scale + 1))
    texts = _texts(policy)
    words = []
    for code in distinct.tolist():
        kind, value = divmod(code, scale + 1)
        before, after = texts[kind]
        words.append(before if kind >= _BARE else f"{before}{_digits(value / scale)}{after}")
    return pa.DictionaryArray.from_arrays(index, pa.array(words, pa.string())).cast(pa.string())


def _distinct(codes: Codes, bound: int) -> tuple[Codes, npt.NDArray[np.int32]]:
    """Return the codes that occur and, per row, the place of its own among them."""
    if bound > 10**7:  # a bar with many decimals: sort rather than keep a table that large
        found, inverse = np.unique(codes, return_inverse=True)
        return found, inverse.astype(np.int32)
    occurs = np.zeros(bound, dtype=bool)
    occurs[codes] = True
    distinct = np.flatnonzero(occurs).astype(np.int64)
    place = np.zeros(bound, dtype=np.int32)
    place[distinct] = np.arange(len(distinct), dtype=np.int32)
    return distinct, place[codes]


def _digits(value: float) -> str:
    """Write a confidence with at least two decimals, and no digit more than it has."""
    text = repr(float(value))
    whole, _, decimals = text.partition(".")
    return text if "e" in text else f"{whole}.{decimals:0<2}"


def _word(value: Any) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _decisions(prediction: pa.ChunkedArray, fallback: Fallback | None, why: Codes) -> pa.ChunkedArray:
    decided = check_fallback(prediction.type, fallback)
    result = pc.if_else(pa.array(why == _SURE), prediction.cast(decided), pa.scalar(None, decided))
    if fallback is not None:
        for code, value in ((_YES, fallback.then), (_NO, fallback.otherwise)):
            result = pc.if_else(pa.array(why == code), pa.scalar(value, decided), result)
    return result


def _decided_by(why: Codes) -> pa.Array:
    by = np.full(8, -1)
    by[[_YES, _NO]], by[_SURE] = _BY_RULE, _BY_MODEL
    codes = by[why]
    indices = pa.array(codes.astype(np.int8), mask=codes < 0)
    return pa.DictionaryArray.from_arrays(indices, ["rule", "model"]).cast(pa.string())
