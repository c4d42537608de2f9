"""An engine that only adds up, for tests without a model.

Invariants: meets the contract of :class:`~airflow_ai_provider.core.infer.engine.Engine` by itself; breaks it only where
a test asks for that (``spoil``).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Self

import pyarrow as pa
import pyarrow.compute as pc

from airflow_ai_provider.core.batch import ROW_ID
from airflow_ai_provider.core.infer.inputs import Each
from airflow_ai_provider.errors import SignatureError


class ArithmeticEngine:
    """Call a row ``high`` when its columns add up to more than zero; the score is the sum's logistic.

    A row with a null or a number that is not finite is a row error.

    :param columns: the columns to add up.
    :param before: called with the rows of each call first; may raise, as a model may.
    :param spoil: changes what a call returns, to break the contract on purpose.
    """

    name = "arithmetic"
    device = "cpu"
    batch_size = 1000
    workers = 2
    steady = True
    tunable = True
    traits: Mapping[str, Any] = MappingProxyType({})

    def __init__(
        self,
        columns: Sequence[str] = ("x",),
        *,
        before: Callable[[pa.Table], None] = lambda rows: None,
        spoil: Callable[[pa.Table], pa.Table] = lambda predicted: predicted,
    ) -> None:
        self._columns, self._before, self._spoil = list(columns), before, spoil
        self._lock = threading.Lock()
        self.row_bytes = 8 * len(self._columns)
        self.seen: list[str] = []
        """Row ids of every call, in the order of the calls: what was really predicted, and how often."""

    def needs(self, schema: pa.Schema) -> Sequence[str]:
        """Return the columns to add up, or raise SignatureError."""
        missing = [name for name in self._columns if name not in schema.names]
        if missing:
            raise SignatureError(f"the rows have no column {', '.join(missing)}. Add it at ingest.", missing=missing)
        return self._columns

    def warm_up(self, batch_size: int) -> None:
        """Do nothing: the first call takes as long as the others."""

    def predict(self, rows: pa.Table, batch_size: int, each: Each = map) -> pa.Table:
        """Return one line per row, in the rows' order."""
        self._before(rows)
        with self._lock:
            self.seen += rows[ROW_ID].to_pylist()
        lines = [_line(values) for values in zip(*(rows[name].to_pylist() for name in self._columns), strict=True)]
        prediction, score, error = zip(*lines, strict=True) if lines else ((), (), ())
        probabilities = [None if s is None else [1 - s, s] if p == "high" else [s, 1 - s] for p, s, _ in lines]
        return self._spoil(
            pa.table(
                {
                    ROW_ID: rows[ROW_ID],
                    "prediction": pa.array(prediction, pa.string()),
                    "score": pa.array(score, pa.float64()),
                    "probabilities": pc.cast(pa.array(probabilities, pa.list_(pa.float64())), pa.list_(pa.float32())),
                    "error": pa.array(error, pa.string()),
                }
            )
        )

    def close(self) -> None:
        """Nothing is held."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()


def _line(values: tuple[float | None, ...]) -> tuple[str | None, float | None, str | None]:
    if any(value is None or not math.isfinite(value) for value in values):
        return None, None, "not_finite: a column is null or not finite"
    total = max(-700.0, min(700.0, math.fsum(value for value in values if value is not None)))
    high = 1 / (1 + math.exp(-total))
    return ("high", high, None) if total > 0 else ("low", 1 - high, None)
