"""Arrays through a model in calls of a size that suits it.

Invariants: outputs keep the rows' order and number; rows that fill a call up are cut off before anyone sees them; what
call a row is in depends on the rows and the size alone, never on time; rows that the model refuses become row errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from airflow_ai_provider.core.infer.apart import Apart
from airflow_ai_provider.core.infer.inputs import Array, Each, Features, Inputs, Sequences
from airflow_ai_provider.errors import RowMismatchError

Run = Callable[[list[Array]], Sequence[Array]]
_BLOCK_TOKENS = 1 << 18  # rows of one width are filled up together: call by call that takes three times as long


@dataclass(frozen=True)
class Calls:
    """How a model wants to be called.

    :param fixed: rows that it was exported for; 0 when it takes any number.
    :param steady: a row's bits do not depend on how many stand beside it; otherwise every call is filled up to the
        full size, by repeating its last row.
    """

    fixed: int
    steady: bool

    def rows(self, size: int) -> int:
        """Return rows per call."""
        return self.fixed or max(1, size)

    def least(self, size: int) -> int:
        """Return to how many rows a call is filled up."""
        # A single row takes another path through some kernels and rounds otherwise, so it never goes alone.
        return self.fixed or (2 if self.steady else max(2, size))


def suggest_batch_size(row_bytes: int, device: str) -> int:
    """Return how many rows to give a model at once: few enough to stay in the processor's caches.

    Measured on two x86 cores: dense nets are fastest at 256 … 2 048 rows, convolutions at about 64 images of
    3 × 64 × 64; a GPU wants more.
    """
    budget, most = (4 << 20, 1024) if device == "cpu" else (64 << 20, 8192)
    fitting = max(16, min(most, budget // max(1, row_bytes)))
    return 1 << (fitting.bit_length() - 1)


def suggest_token_budget(device: str) -> int:
    """Return how many tokens to give a model at once. Measured on two x86 cores: 500 … 4 000 are equally fast."""
    return 1024 if device == "cpu" else 16_384


def warm_up(run: Run, features: Features, size: int, calls: Calls) -> None:
    """Make one call of the size that calls will have, with made-up rows."""
    width = features.sample(0.0, 1)[0].shape[1] if features.padding else 1
    run(features.sample(0.0, calls.least(max(1, size // width))))


def run_inputs(
    run: Run, inputs: Inputs, size: int, calls: Calls, blank: Callable[[], Sequence[Array]], *, each: Each = map
) -> list[Array]:
    """Run a model over all rows.

    :param run: the model: arrays in, arrays out, first axis the rows.
    :param inputs: the rows; the reasons of those that the model refuses are added to its errors.
    :param size: rows per call; for sequences, tokens per call.
    :param blank: gives outputs of the model for any rows, asked for their types when there is no row to run, and
        whether the model still answers when it refuses some.
    :param each: makes the calls for sequences.
    :raises RowMismatchError: when the model returns another number of rows than it got; no retry helps.
    :raises EngineUnavailableError: when the model refuses whatever it is given; a retry may help.
    """

    def filled_up(least: int) -> Apart:
        return Apart(partial(_call, run, least), blank, inputs.errors)

    if inputs.sequences is not None:
        outputs = _run_by_width(inputs.sequences, size, calls, filled_up, each)
        return outputs or _room(blank(), len(inputs.sequences.widths))
    if not len(inputs.arrays[0]):
        return [np.asarray(output)[:0] for output in blank()]
    return _run_in_batches(inputs.arrays, size, calls, filled_up)


def _run_in_batches(arrays: Sequence[Array], size: int, calls: Calls, filled_up: Callable[[int], Apart]) -> list[Array]:
    """Run rows of one size, in their order."""
    row_count, step, model = len(arrays[0]), calls.rows(size), filled_up(calls.least(size))
    pieces = [
        model.run([array[start : start + step] for array in arrays], range(start, min(start + step, row_count)))
        for start in range(0, row_count, step)
    ]
    return pieces[0] if len(pieces) == 1 else [np.concatenate(column) for column in zip(*pieces, strict=True)]


@dataclass(frozen=True)
class _Piece:
    """Rows of one width for one call: their places, and what the model is given."""

    chosen: Array
    width: int
    arrays: list[Array]


def _run_by_width(
    sequences: Sequences, budget: int, calls: Calls, filled_up: Callable[[int], Apart], each: Each
) -> list[Array]:
    """Run rows of one width together, so many that their tokens fit the budget; put the answers in the rows' order.
    Without a row to run there are none."""

    def answer(piece: _Piece) -> tuple[Array, list[Array]]:
        model = filled_up(calls.least(budget // piece.width))
        return piece.chosen, model.run(piece.arrays, piece.chosen.tolist())

    outputs: list[Array] = []
    for chosen, answers in each(answer, _pieces(sequences, budget, calls)):
        outputs = outputs or _room(answers, len(sequences.widths))
        for output, part in zip(outputs, answers, strict=True):
            output[chosen] = part
    return outputs


def _pieces(sequences: Sequences, budget: int, calls: Calls) -> Iterator[_Piece]:
    """Cut rows into calls: full ones first, then what is left over of each width, the most tokens first, so that
    workers who share the calls end together."""
    left = []
    order = np.argsort(sequences.widths, kind="stable")
    widths, starts = np.unique(sequences.widths[order], return_index=True)
    for width, first, end in zip(widths.tolist(), starts, [*starts[1:], len(order)], strict=False):
        if not width:  # a row that has an error
            continue
        group = order[first:end]
        step = calls.rows(budget // width)
        block = step * max(1, _BLOCK_TOKENS // (step * width))
        for rows in (group[start : start + block] for start in range(0, len(group), block)):
            arrays = sequences.fill(rows, width)
            for start in range(0, len(rows), step):
                part = slice(start, start + step)
                piece = _Piece(rows[part], width, [array[part] for array in arrays])
                if len(piece.chosen) < step:
                    left.append(piece)
                else:
                    yield piece
    yield from sorted(left, key=lambda piece: -len(piece.chosen) * piece.width)


def _room(answers: Sequence[Array], row_count: int) -> list[Array]:
    shapes = [((row_count, *answer.shape[1:]), answer.dtype) for answer in map(np.asarray, answers)]
    # texts as objects: an array of texts would cut those that are longer than the first answer's
    return [np.full(s, "", object) if dtype.kind in "OUS" else np.zeros(s, dtype) for s, dtype in shapes]


def _call(run: Run, least: int, arrays: list[Array]) -> list[Array]:
    length = len(arrays[0])
    if length < least:
        arrays = [np.concatenate([array, np.repeat(array[-1:], least - length, axis=0)]) for array in arrays]
    outputs = [np.asarray(output) for output in run(arrays)]
    for output in outputs:
        if output.ndim == 0 or len(output) != len(arrays[0]):
            raise RowMismatchError(
                f"the model got {len(arrays[0])} rows and returned an output of shape {list(output.shape)}. It must "
                "return one line per row: export it with the first axis as the rows.",
                given=len(arrays[0]),
                returned=list(output.shape),
            )
    return [output[:length] for output in outputs]
