"""Nets that need four megabytes per row between their layers, to run out of memory with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from airflow_ai_provider.core.batch import ROW_ID, Pin
from tests.core.infer.dense import columns_signature, dense_onnx, fresh_folder, pin_folder, tensor_signature

WIDE = 1 << 20


def rows() -> pa.Table:
    return pa.table({ROW_ID: [f"r{i}" for i in range(600)], "x": np.arange(600) / 600})


def by_onnx() -> tuple[Pin, Path]:
    folder = fresh_folder("wide")
    (folder / "model.onnx").write_bytes(dense_onnx([1, WIDE, 2]))
    return pin_folder(folder, "onnx", columns_signature(["x"]), classes=["a", "b"]), folder


def by_torch() -> tuple[Pin, Path]:
    import torch

    net = torch.nn.Sequential(torch.nn.Linear(1, WIDE), torch.nn.ReLU(), torch.nn.Linear(WIDE, 2)).eval()
    folder = fresh_folder("wide")
    rows = torch.export.Dim("rows", min=2)
    torch.export.save(torch.export.export(net, (torch.zeros(4, 1),), dynamic_shapes=({0: rows},)), folder / "model.pt2")
    return pin_folder(folder, "torch", tensor_signature(1), classes=["a", "b"], features=["x"]), folder
