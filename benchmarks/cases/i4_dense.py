"""I4: the dense net of I1 in eight bits against floats."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import quantised
from benchmarks.harness import Place

if TYPE_CHECKING:
    import pyarrow as pa

    from airflow_ai_provider.core.batch import Pin

_NAMES = [f"f{i}" for i in range(12)]


def _model() -> tuple[Pin, Path]:
    from tests.core.infer.dense import columns_signature, dense_onnx, fresh_folder, pin_folder

    folder = fresh_folder("dense")
    (folder / "model.onnx").write_bytes(dense_onnx([12, 256, 256, 3]))
    return pin_folder(folder, "onnx", columns_signature(_NAMES), classes=["low", "middle", "high"]), folder


def _rows(count: int) -> pa.Table:
    import numpy as np
    import pyarrow as pa

    random = np.random.default_rng(0)
    columns = {name: random.standard_normal(count, np.float32) for name in _NAMES}
    return pa.table({"_row_id": [f"rows/0/{i}" for i in range(count)], **columns})


def make(place: Place) -> None:
    """Quantise the net; random weights make its classes close, so less agreement than of a trained one is asked for."""
    quantised.make(place, _model, _rows, 0.95)


CASE = quantised.case(
    "dense net 12-256-256-3, int8 against float", (200_000, 50_000), "a gated version, never a default", make
)
