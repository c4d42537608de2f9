"""Pins without a registry, and a dense net made of nothing but onnx: what a bare GPU box can build."""

from __future__ import annotations

import atexit
import itertools
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from airflow_ai_provider.core.batch import Pin, digest_of
from airflow_ai_provider.core.infer.cache import hash_files


def pin_folder(folder: Path, flavor: str, signature: dict[str, Any], **metadata: Any) -> Pin:
    """Pin what lies in a folder, as resolve_pin would."""
    files = hash_files(folder)
    return Pin(folder.name, "1", "", digest_of(files), files, flavor, signature, metadata)


def columns_signature(names: list[str], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    return {"inputs": [{"type": "double", "name": n, "required": n not in optional} for n in names], "outputs": []}


def tensor_signature(*shape: int, dtype: str = "float32") -> dict[str, Any]:
    return {"inputs": [{"type": "tensor", "tensor-spec": {"dtype": dtype, "shape": [-1, *shape]}}], "outputs": []}


def fresh_folder(name: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="model-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / name).mkdir()
    return folder / name


def dense_onnx(widths: list[int], *, softmax: bool = True, seed: int = 0, rows: int | str = "rows") -> bytes:
    """ONNX of a dense net with random weights, the same for the same seed."""
    random = np.random.default_rng(seed)
    weights, nodes, last = [], [], "X"
    for layer, (n, m) in enumerate(itertools.pairwise(widths)):
        matrix = (random.standard_normal((n, m)) / np.sqrt(n)).astype(np.float32)
        weights += [numpy_helper.from_array(matrix, f"W{layer}")]
        weights += [numpy_helper.from_array(random.standard_normal(m).astype(np.float32), f"b{layer}")]
        nodes.append(helper.make_node("Gemm", [last, f"W{layer}", f"b{layer}"], [f"h{layer}"]))
        last = f"h{layer}"
        if layer < len(widths) - 2:
            nodes.append(helper.make_node("Relu", [last], [f"r{layer}"]))
            last = f"r{layer}"
    if softmax:
        nodes.append(helper.make_node("Softmax", [last], ["probabilities"], axis=1))
        last = "probabilities"
    graph = helper.make_graph(
        nodes,
        "dense",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, [rows, widths[0]])],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, [rows, widths[-1]])],
        weights,
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(made)
    return bytes(made.SerializeToString())


def register_dense(
    uri: str, name: str, columns: list[str], *, seed: int = 0, hidden: Sequence[int] = (), **options: Any
) -> str:
    """Register a dense net over named columns, two classes, as a model's next version."""
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema

    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    mlflow.set_experiment("dense nets")  # MLflow remembers one of the registry before
    logged = mlflow.onnx.log_model(
        onnx.load_from_string(dense_onnx([len(columns), *hidden, 2], seed=seed)),
        name="model",
        registered_model_name=name,
        pip_requirements=[],
        **{"signature": ModelSignature(Schema([ColSpec("double", column) for column in columns])), **options},
    )
    return str(logged.registered_model_version)
