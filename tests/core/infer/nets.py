"""Nets of the shapes that people use (a BERT, a ResNet), small, with random weights, made of nothing but onnx."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
from onnx import TensorProto, helper, numpy_helper

from airflow_ai_provider.core.batch import ROW_ID, Pin
from tests.core.infer.dense import fresh_folder, pin_folder


class _Net:
    """Nodes and weights, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self.nodes: list[Any] = []
        self.weights: list[Any] = []

    def node(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str:
        names = [f"{kind}{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, **attributes))
        return names[0]

    def constant(self, values: Any) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def weight(self, *shape: int, fan_in: int) -> str:
        return self.constant((self._random.standard_normal(shape) / np.sqrt(fan_in)).astype(np.float32))

    def linear(self, x: str, n: int, m: int) -> str:
        product = self.node("MatMul", x, self.weight(n, m, fan_in=n))
        return self.node("Add", product, self.weight(m, fan_in=100))

    def norm(self, x: str, width: int) -> str:
        ones, zeros = np.ones(width, np.float32), np.zeros(width, np.float32)
        return self.node("LayerNormalization", x, self.constant(ones), self.constant(zeros), axis=-1, epsilon=1e-5)

    def model(self, inputs: list[Any], outputs: list[Any]) -> bytes:
        graph = helper.make_graph(self.nodes, "net", inputs, outputs, self.weights)
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.checker.check_model(made)
        return bytes(made.SerializeToString())


def bert_onnx(
    *,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    vocabulary: int = 1000,
    longest: int = 256,
    classes: int = 3,
    token_types: bool = False,
    seed: int = 0,
) -> bytes:
    """ONNX of a transformer encoder over ``input_ids`` and ``attention_mask``; logits of the classes."""
    net, size = _Net(seed), hidden // heads
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if token_types else [])]
    zero, one = net.constant(np.int64([0])), net.constant(np.int64([1]))
    width = net.node("Gather", net.node("Shape", "input_ids"), net.constant(np.int64(1)), axis=0)
    positions = net.node("Range", net.constant(np.int64(0)), width, net.constant(np.int64(1)))
    x = net.node("Gather", net.weight(vocabulary, hidden, fan_in=1), "input_ids", axis=0)
    x = net.node("Add", x, net.node("Gather", net.weight(longest, hidden, fan_in=1), positions, axis=0))
    if token_types:
        x = net.node("Add", x, net.node("Gather", net.weight(2, hidden, fan_in=1), "token_type_ids", axis=0))
    x = net.norm(x, hidden)
    mask = net.node("Cast", "attention_mask", to=TensorProto.FLOAT)
    hidden_ones = net.node("Sub", net.constant(np.float32(1)), mask)
    bias = net.node("Mul", hidden_ones, net.constant(np.float32(-1e4)))
    bias = net.node("Unsqueeze", bias, net.constant(np.int64([1, 2])))
    split, joined = net.constant(np.int64([0, 0, heads, size])), net.constant(np.int64([0, 0, hidden]))
    for _ in range(layers):
        queries, keys, values = (net.node("Reshape", net.linear(x, hidden, hidden), split) for _ in range(3))
        scores = net.node(
            "MatMul",
            net.node("Transpose", queries, perm=[0, 2, 1, 3]),
            net.node("Transpose", keys, perm=[0, 2, 3, 1]),
        )
        scores = net.node("Add", net.node("Div", scores, net.constant(np.float32(np.sqrt(size)))), bias)
        mixed = net.node(
            "MatMul", net.node("Softmax", scores, axis=-1), net.node("Transpose", values, perm=[0, 2, 1, 3])
        )
        mixed = net.node("Reshape", net.node("Transpose", mixed, perm=[0, 2, 1, 3]), joined)
        x = net.norm(net.node("Add", x, net.linear(mixed, hidden, hidden)), hidden)
        wide = net.linear(x, hidden, 4 * hidden)
        error = net.node("Erf", net.node("Div", wide, net.constant(np.float32(np.sqrt(2)))))
        gelu = net.node(
            "Mul",
            net.node("Mul", wide, net.node("Add", error, net.constant(np.float32(1)))),
            net.constant(np.float32(0.5)),
        )
        x = net.norm(net.node("Add", x, net.linear(gelu, 4 * hidden, hidden)), hidden)
    first = net.node("Squeeze", net.node("Slice", x, zero, one, one), one)
    pooled = net.node("Tanh", net.linear(first, hidden, hidden))
    net.nodes.append(helper.make_node("Identity", [net.linear(pooled, hidden, classes)], ["logits"]))
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, ["rows", "tokens"]) for name in names]
    return net.model(inputs, [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["rows", classes])])


def resnet_onnx(*, width: int = 64, classes: int = 10, seed: int = 0) -> bytes:
    """ONNX of a residual net of 18 layers over images of three channels; logits of the classes."""
    net = _Net(seed)

    def convolution(x: str, n: int, m: int, size: int, stride: int = 1) -> str:
        bias = net.constant(np.zeros(m, np.float32))
        kernel = net.weight(m, n, size, size, fan_in=n * size * size)
        return net.node("Conv", x, kernel, bias, pads=[size // 2] * 4, strides=[stride, stride])

    x = net.node("Relu", convolution("image", 3, width, 7, 2))
    x = net.node("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    n = width
    for stage in range(4):
        m = width << stage
        for block in range(2):
            stride = 2 if stage and not block else 1
            shortcut = x if n == m else convolution(x, n, m, 1, stride)
            inner = net.node("Relu", convolution(x, n, m, 3, stride))
            x, n = net.node("Relu", net.node("Add", convolution(inner, m, m, 3), shortcut)), m
    pooled = net.node("Flatten", net.node("GlobalAveragePool", x))
    net.nodes.append(helper.make_node("Identity", [net.linear(pooled, n, classes)], ["logits"]))
    inputs = [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["rows", 3, "height", "width"])]
    return net.model(inputs, [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["rows", classes])])


def sequence_signature(*names: str) -> dict[str, Any]:
    spec = {"dtype": "int64", "shape": [-1, -1]}
    return {"inputs": [{"type": "tensor", "name": name, "tensor-spec": spec} for name in names], "outputs": []}


def sequence_pin(*, longest: int, **shape: Any) -> tuple[Pin, Path]:
    """A transformer, pinned; its rows give ``input_ids`` only."""
    folder = fresh_folder("bert")
    (folder / "model.onnx").write_bytes(bert_onnx(longest=longest, **shape))
    metadata = {"classes": ["low", "middle", "high"], "sequence": {"longest": longest}}
    return pin_folder(folder, "onnx", sequence_signature("input_ids"), **metadata), folder


def sequence_rows(count: int, *, vocabulary: int, longest: int, median: int, seed: int = 0) -> pa.Table:
    """Rows with lists of tokens, most of them short."""
    random = np.random.default_rng(seed)
    lengths = np.clip(np.round(random.lognormal(np.log(median), 0.75, count)), 1, longest).astype(int)
    lists = [random.integers(1, vocabulary, length) for length in lengths]
    return pa.table(
        {ROW_ID: [f"texts/0/{i}" for i in range(count)], "input_ids": pa.array(lists, pa.list_(pa.int64()))}
    )
