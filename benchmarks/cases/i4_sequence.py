"""I4: the transformer encoder of I2 in eight bits against floats."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import quantised
from benchmarks.cases.i2 import LONGEST, SHAPE, VOCABULARY
from benchmarks.harness import Place

if TYPE_CHECKING:
    import pyarrow as pa

    from airflow_ai_provider.core.batch import Pin


def _model() -> tuple[Pin, Path]:
    from tests.core.infer.nets import sequence_pin

    return sequence_pin(**SHAPE)


def _rows(count: int) -> pa.Table:
    from tests.core.infer.nets import sequence_rows

    return sequence_rows(count, vocabulary=VOCABULARY, longest=LONGEST, median=29)


def make(place: Place) -> None:
    """Quantise the encoder; its weights are random, so its classes are close and less agreement is asked for."""
    quantised.make(place, _model, _rows, 0.8)


CASE = quantised.case(
    "transformer encoder over lists of tokens, int8 against float",
    (4_000, 1_000),
    "a gated version, never a default",
    make,
)
