"""A model's outputs as the columns of a prediction.

Invariants: how outputs are read is settled once, when the engine opens, and never depends on the rows; one line per
row, in the rows' order; a row with an error has nothing else; scores are uncalibrated.

Metadata that the trainer may put beside the model: ``classes`` (names in the order of the outputs), ``scores``
(``logits`` or ``probabilities``; without it the model is asked with fixed inputs whether its outputs add up to one).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pyarrow as pa

from airflow_ai_provider.core.batch import ROW_ID
from airflow_ai_provider.errors import SignatureError

if TYPE_CHECKING:
    import numpy.typing as npt

Array: TypeAlias = "npt.NDArray[Any]"
COLUMNS = [ROW_ID, "prediction", "score", "probabilities", "error"]
_PROBABILITIES = pa.list_(pa.float32())
_NOT_FINITE = "model_output: the model returned a number that is not finite"


@dataclass(frozen=True)
class Reading:
    """How outputs become a prediction.

    :param kind: ``classes`` (scores per class), ``labels`` (a label and no scores) or ``number``.
    :param scores: position of the output that holds scores or the number; -1 without one.
    :param label: position of the output that holds the model's own label; -1 without one.
    :param is_logits: true when scores must still become probabilities.
    :param is_binary: true when the one score is the probability of the second class.
    :param classes: names in the order of the scores; None takes the model's labels or the positions.
    """

    kind: str
    scores: int
    label: int
    is_logits: bool
    is_binary: bool
    classes: pa.Array | None


def settle_reading(run: Callable[[float], Sequence[Any]], metadata: Mapping[str, Any]) -> Reading:
    """Try the model with fixed inputs and settle how its outputs are read.

    :param run: gives the model's outputs for rows filled with one number.
    :param metadata: the pin's metadata.
    :raises SignatureError: when the outputs are none of the forms above, or do not fit ``classes``; a retry does not
        help.
    """
    tries = [[np.asarray(output) for output in _arrays(run(fill))] for fill in (0.0, 1.0, -0.5)]
    first = tries[0]
    scores = next((i for i, output in enumerate(first) if output.dtype.kind == "f" and output.ndim in (1, 2)), -1)
    label = next((i for i, output in enumerate(first) if output.dtype.kind in "iuOUb" and output.ndim == 1), -1)
    if scores < 0 and label < 0:
        raise SignatureError(
            f"the model returns {[f'{o.dtype}{list(o.shape)}' for o in first]}, no label, number or scores per class. "
            "Export it with scores per class of shape (rows, classes), zipmap off.",
        )
    names = list(metadata.get("classes") or [])
    width = 0 if scores < 0 else (first[scores].shape[1] if first[scores].ndim == 2 else 1)
    is_binary = width == 1 and len(names) == 2
    if names and width > 1 and width != len(names):
        raise SignatureError(
            f"the model returns {width} scores per row, its metadata names {len(names)} classes. Log it again with one "
            "name per score, in their order.",
            classes=names,
        )
    kind = "classes" if width > 1 or is_binary else ("number" if scores >= 0 and label < 0 else "labels")
    said = metadata.get("scores")
    is_logits = False
    if kind == "classes":
        is_logits = said == "logits" if said else not all(_add_up(t[scores], is_binary) for t in tries)
    classes = _names_array(names) if names and kind == "classes" else None
    return Reading(kind, scores, label, is_logits, is_binary, classes)


def narrow(reading: Reading) -> tuple[list[int], Reading]:
    """Leave out what is not read: a model may return hidden states beside its scores.

    :return: positions of the outputs that are read, and how those are read.
    """
    kept = [position for position in (reading.scores, reading.label) if position >= 0]
    places = {position: place for place, position in enumerate(kept)} | {-1: -1}
    return kept, replace(reading, scores=places[reading.scores], label=places[reading.label])


def predictions(row_ids: pa.ChunkedArray, outputs: Sequence[Any], errors: dict[int, str], reading: Reading) -> pa.Table:
    """Build the prediction columns.

    :param row_ids: the rows' ids, passed on.
    :param outputs: the model's outputs, first axis the rows.
    :param errors: reasons by position, of rows that never became input.
    """
    arrays = [np.asarray(output) for output in outputs]
    row_count = len(row_ids)
    if reading.kind == "labels":
        return _table(row_ids, _labels(arrays[reading.label]), None, None, errors)
    scores = arrays[reading.scores]
    finite = np.isfinite(scores)
    if not finite.all():
        bad = ~finite.reshape(row_count, -1).all(axis=1)
        errors = {row: _NOT_FINITE for row in np.flatnonzero(bad).tolist()} | errors
        scores = np.where(finite, scores, 0)
    if reading.kind == "number":
        return _table(row_ids, _column(scores.reshape(row_count), np.float64), None, None, errors)
    probabilities = _probabilities(scores, reading)
    chosen, best = _best(probabilities)
    return _table(row_ids, _names(chosen, arrays, reading), best, probabilities, errors)


def _names(chosen: npt.NDArray[np.int32], arrays: Sequence[Array], reading: Reading) -> pa.Array:
    if reading.classes is not None:
        return pa.DictionaryArray.from_arrays(_column(chosen, np.int32), reading.classes)
    return _labels(arrays[reading.label] if reading.label >= 0 else chosen)


def _probabilities(scores: Array, reading: Reading) -> npt.NDArray[np.float32]:
    values = scores.astype(np.float32, copy=False)
    if reading.is_binary:
        second = values.reshape(-1)
        if reading.is_logits:
            with np.errstate(over="ignore"):
                second = np.float32(1) / (np.float32(1) + np.exp(-second))
        return np.stack([np.float32(1) - second, second], axis=1)
    if reading.is_logits:
        values = np.exp(values - values.max(axis=1, keepdims=True))
        values /= values.sum(axis=1, keepdims=True)
    return values


def _best(probabilities: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Return the first greatest of each row and its position (argmax is slow over few columns)."""
    if probabilities.shape[1] > 16:
        chosen = probabilities.argmax(axis=1).astype(np.int32)
        return chosen, probabilities[np.arange(len(chosen)), chosen]
    best = probabilities[:, 0].copy()
    chosen = np.zeros(len(best), np.int32)
    for position in range(1, probabilities.shape[1]):
        column = probabilities[:, position]
        greater = column > best
        chosen[greater] = position
        np.maximum(best, column, out=best)
    return chosen, best


def _table(
    row_ids: pa.ChunkedArray,
    prediction: pa.Array,
    score: npt.NDArray[np.float32] | None,
    probabilities: npt.NDArray[np.float32] | None,
    errors: dict[int, str],
) -> pa.Table:
    row_count = len(row_ids)
    reasons = pa.nulls(row_count, pa.string())
    scores = pa.nulls(row_count, pa.float64()) if score is None else _column(score, np.float64)
    lists = pa.nulls(row_count, _PROBABILITIES) if probabilities is None else _lists(probabilities)
    if errors:
        import pyarrow.compute as pc  # a fifth of a cold start, and most chunks have no error

        texts = [errors.get(row) for row in range(row_count)]
        reasons = pa.array(texts, pa.string())
        failed = reasons.is_valid()
        prediction, scores, lists = (
            pc.if_else(failed, pa.scalar(None, column.type), column) for column in (prediction, scores, lists)
        )
    return pa.Table.from_arrays([row_ids, prediction, scores, lists, reasons], names=COLUMNS)


# Arrays are made from their buffers where no row is at fault: pyarrow's own conversion imports pandas, which takes
# longer than all the rest of a cold start.


def _column(values: Array, dtype: type) -> pa.Array:
    given: Array = np.ascontiguousarray(values, dtype)
    return pa.Array.from_buffers(pa.from_numpy_dtype(given.dtype), len(given), [None, pa.py_buffer(given)])


def _labels(values: Array) -> pa.Array:
    return _column(values, np.int64) if values.dtype.kind in "iu" else pa.array(values)


def _names_array(names: list[Any]) -> pa.Array:
    if not all(isinstance(name, str) for name in names):
        return pa.array(names)
    texts = [name.encode() for name in names]
    offsets = np.cumsum([0, *map(len, texts)], dtype=np.int32)
    return pa.StringArray.from_buffers(len(texts), pa.py_buffer(offsets), pa.py_buffer(b"".join(texts)))


def _lists(probabilities: npt.NDArray[np.float32]) -> pa.Array:
    row_count, width = probabilities.shape
    offsets = _column(np.arange(0, row_count * width + 1, width), np.int32)
    return pa.ListArray.from_arrays(offsets, _column(probabilities.reshape(-1), np.float32), type=_PROBABILITIES)


def _arrays(outputs: Sequence[Any]) -> Sequence[Any]:
    if any(isinstance(output, (list, dict)) for output in outputs):
        raise SignatureError(
            "the model returns a list of mappings (zipmap), not scores per class. Export it with zipmap off: "
            "to_onnx(..., options={'zipmap': False}).",
        )
    return outputs


def _add_up(scores: Array, is_binary: bool) -> bool:
    if not np.isfinite(scores).all() or scores.min() < 0 or scores.max() > 1:
        return False
    return is_binary or bool(np.allclose(scores.reshape(len(scores), -1).sum(axis=1), 1, atol=1e-3))
