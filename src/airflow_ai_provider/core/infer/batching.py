"""Arrays through a model in pieces of one size.

Invariants: outputs keep the rows' order and number; a piece that is filled up is cut back before anyone sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from airflow_ai_provider.errors import RowMismatchError

Array = npt.NDArray[Any]
Run = Callable[[list[Array]], Sequence[Array]]


def suggest_batch_size(row_bytes: int, device: str) -> int:
    """Return how many rows to give a model at once: few enough to stay in the processor's caches.

    Measured on two x86 cores: dense nets are fastest at 256 … 2 048 rows, convolutions at about 64 images of
    3 × 64 × 64; a GPU wants more.
    """
    budget, most = (4 << 20, 1024) if device == "cpu" else (64 << 20, 8192)
    fitting = max(16, min(most, budget // max(1, row_bytes)))
    return 1 << (fitting.bit_length() - 1)


def run_in_batches(run: Run, arrays: Sequence[Array], batch_size: int, least: int) -> list[Array]:
    """Run a model over all rows.

    :param run: the model: arrays in, arrays out, first axis the rows.
    :param batch_size: rows per call.
    :param least: a call with fewer rows is filled up to so many by repeating its last row.
    :raises RowMismatchError: when the model returns another number of rows than it got; no retry helps.
    """
    row_count = len(arrays[0])
    pieces: list[list[Array]] = []
    for start in range(0, row_count, batch_size):
        piece = [array[start : start + batch_size] for array in arrays]
        length = len(piece[0])
        if length < least:
            piece = [np.concatenate([part, np.repeat(part[-1:], least - length, axis=0)]) for part in piece]
        outputs = [np.asarray(output) for output in run(piece)]
        for output in outputs:
            if output.ndim == 0 or len(output) != len(piece[0]):
                raise RowMismatchError(
                    f"the model got {len(piece[0])} rows and returned an output of shape {list(output.shape)}. It must "
                    "return one line per row: export it with the first axis as the rows.",
                    given=len(piece[0]),
                    returned=list(output.shape),
                )
        pieces.append([output[:length] for output in outputs])
    return pieces[0] if len(pieces) == 1 else [np.concatenate(column) for column in zip(*pieces, strict=True)]
