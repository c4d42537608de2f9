"""Same model, same rows: the same bits, however the rows are cut into calls."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from skl2onnx import to_onnx
from sklearn.datasets import load_breast_cancer
from sklearn.ensemble import GradientBoostingClassifier, RandomForestClassifier

from airflow_ai_provider.core.batch import ROW_ID
from airflow_ai_provider.core.infer.engine import Engine, open_engine
from tests.core.infer import models

ONNX = ("linear", "dense", "odd dense", "convolution", "forest", "boosting")


def rows_of(width: int, count: int = 700) -> tuple[pa.Table, list[str]]:
    values = np.random.default_rng(3).standard_normal((count, width)).astype(np.float32)
    names = [f"x{i}" for i in range(width)]
    return pa.table({ROW_ID: [f"r{i}" for i in range(count)], **dict(zip(names, values.T, strict=True))}), names


def dense(widths: list[int]) -> tuple[Engine, pa.Table]:
    folder = models.fresh_folder("dense")
    (folder / "model.onnx").write_bytes(models.dense_onnx(widths, softmax=False))
    rows, names = rows_of(widths[0])
    return open_engine(models.pin_folder(folder, "onnx", models.columns_signature(names)), folder, "cpu"), rows


def trees(kind: type) -> tuple[Engine, pa.Table]:
    data = load_breast_cancer()
    model = kind(n_estimators=60, random_state=0).fit(data.data, data.target)
    folder = models.fresh_folder("trees")
    made = to_onnx(model, data.data[:1].astype(np.float32), options={"zipmap": False})
    (folder / "model.onnx").write_bytes(made.SerializeToString())
    rows = models.cancer_rows()
    pin = models.pin_folder(folder, "onnx", models.columns_signature(rows.column_names[1:]))
    return open_engine(pin, folder, "cpu"), rows


def convolution() -> tuple[Engine, pa.Table]:
    """The digit net's own weights, as ONNX."""
    net = models.digit_net()
    weights = {name: value.detach().numpy() for name, value in net.state_dict().items()}
    nodes = [
        helper.make_node("Conv", ["X", "0.weight", "0.bias"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Flatten", ["r"], ["f"]),
        helper.make_node("Gemm", ["f", "3.weight", "3.bias"], ["g"], transB=1),
        helper.make_node("Relu", ["g"], ["h"]),
        helper.make_node("Gemm", ["h", "5.weight", "5.bias"], ["logits"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "digits",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, ["rows", 1, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["rows", 10])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    folder = models.fresh_folder("convolution")
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (folder / "model.onnx").write_bytes(made.SerializeToString())
    return open_engine(models.pin_folder(folder, "onnx", models.tensor_signature(1, 8, 8)), folder, "cpu"), (
        models.digit_rows()
    )


@functools.cache
def engine_and_rows(name: str) -> tuple[Engine, pa.Table, pa.Table]:
    if name == "linear":
        pin, folder = models.cancer_onnx()
        engine, rows = open_engine(pin, folder, "cpu"), models.cancer_rows()
    elif name == "torch":
        pin, folder = models.digit_torch()
        engine, rows = open_engine(pin, folder, "cpu"), models.digit_rows()
    elif name == "convolution":
        engine, rows = convolution()
    elif name in ("forest", "boosting"):
        engine, rows = trees(RandomForestClassifier if name == "forest" else GradientBoostingClassifier)
    else:
        engine, rows = dense([12, 256, 256, 3] if name == "dense" else [13, 31, 5])
    return engine, rows, engine.predict(rows, 64)


@settings(max_examples=80, deadline=None)
@given(name=st.sampled_from(ONNX), batch_size=st.integers(1, 800), start=st.integers(0, 200), count=st.integers(1, 300))
def test_onnx_on_a_processor_rounds_the_same_at_every_batch_size(
    name: str, batch_size: int, start: int, count: int
) -> None:
    engine, rows, expected = engine_and_rows(name)
    assert engine.steady
    part = engine.predict(rows.slice(start, count), batch_size)
    assert part.to_pylist() == expected.slice(start, count).to_pylist()


@settings(max_examples=25, deadline=None)
@given(start=st.integers(0, 250), count=st.integers(1, 100))
def test_torch_rounds_the_same_wherever_a_row_stands_in_a_call_of_one_size(start: int, count: int) -> None:
    engine, rows, expected = engine_and_rows("torch")
    part = engine.predict(rows.slice(start, count), 64)
    assert part.to_pylist() == expected.slice(start, count).to_pylist()


def test_torch_does_not_at_other_sizes_and_says_so() -> None:
    """The reason why its batch size is part of a prediction batch's name: if this ever fails, it need not be."""
    engine, rows, expected = engine_and_rows("torch")
    assert not engine.steady
    differ = [s for s in (2, 3, 5, 7, 16, 100, 300) if not engine.predict(rows, s).equals(expected)]
    near = expected["score"].to_numpy() - engine.predict(rows, 7)["score"].to_numpy()
    assert np.abs(near).max() < 1e-4
    assert differ, "torch gave the same bits at every batch size on this processor"


def test_threads_of_torch_change_nothing() -> None:
    engine, rows, expected = engine_and_rows("torch")
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            assert engine.predict(rows, 64).equals(expected)
    finally:
        torch.set_num_threads(before)


def test_the_file_alone_decides(tmp_path: Path) -> None:
    """Two loads of the same file give the same bits."""
    for pin, folder, rows in (
        (*models.cancer_onnx(), models.cancer_rows()),
        (*models.digit_torch(), models.digit_rows()),
    ):
        with open_engine(pin, folder, "cpu") as first, open_engine(pin, folder, "cpu") as second:
            assert first.predict(rows, 64).equals(second.predict(rows, 64))
