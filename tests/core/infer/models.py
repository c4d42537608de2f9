"""Small real models, trained here from the data sets that scikit-learn ships, as pinned files without a registry."""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from skl2onnx import to_onnx
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from airflow_ai_provider.core.batch import ROW_ID, Pin
from tests.core.infer.dense import columns_signature, dense_onnx, fresh_folder, pin_folder, tensor_signature

__all__ = ["columns_signature", "dense_onnx", "fresh_folder", "pin_folder", "tensor_signature"]


@functools.cache
def cancer_rows() -> pa.Table:
    data = load_breast_cancer(as_frame=True).data
    names = [name.replace(" ", "_") for name in data.columns]
    columns = {name: pa.array(data[old].to_numpy()) for name, old in zip(names, data.columns, strict=True)}
    return pa.table({ROW_ID: [f"biopsies/0/{i}" for i in range(len(data))], **columns})


@functools.cache
def cancer_model() -> Any:
    data = load_breast_cancer()
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)).fit(data.data, data.target)


@functools.cache
def cancer_onnx() -> tuple[Pin, Path]:
    """ONNX from scikit-learn: a label and probabilities, zipmap off; names of classes in the metadata."""
    folder = fresh_folder("cancer")
    model = to_onnx(cancer_model(), load_breast_cancer().data[:1].astype(np.float32), options={"zipmap": False})
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    signature = columns_signature(cancer_rows().column_names[1:])
    return pin_folder(folder, "onnx", signature, classes=["malignant", "benign"]), folder


def pyfunc_folder(name: str, rows: pa.Table, save: Any, **metadata: Any) -> tuple[Pin, Path]:
    """What mlflow writes for a model, pinned as it would be where it is allowed."""
    from mlflow.models import infer_signature

    folder = fresh_folder(name)
    signature = infer_signature(rows.drop_columns([ROW_ID]).to_pandas())
    save(path=folder, signature=signature, pip_requirements=[])
    inputs = json.loads(signature.to_dict()["inputs"])
    return pin_folder(folder, "pyfunc", {"inputs": inputs, "outputs": []}, **metadata), folder


@functools.cache
def cancer_pickle() -> tuple[Pin, Path]:
    """The same model as :func:`cancer_onnx`, as mlflow pickles it: labels, and probabilities when asked."""
    import mlflow.sklearn

    save = functools.partial(mlflow.sklearn.save_model, cancer_model(), serialization_format="pickle")
    return pyfunc_folder("pickled_cancer", cancer_rows(), save, classes=["malignant", "benign"])


@functools.cache
def diabetes_onnx() -> tuple[Pin, Path, pa.Table, Any]:
    """ONNX regression: one number per row."""
    data = load_diabetes()
    model = LinearRegression().fit(data.data, data.target)
    folder = fresh_folder("diabetes")
    made = to_onnx(model, data.data[:1].astype(np.float32))
    (folder / "model.onnx").write_bytes(made.SerializeToString())
    columns = {name: pa.array(data.data[:, i]) for i, name in enumerate(data.feature_names)}
    rows = pa.table({ROW_ID: [f"d/{i}" for i in range(len(data.data))], **columns})
    return pin_folder(folder, "onnx", columns_signature(list(data.feature_names))), folder, rows, model


def png(pixels: np.ndarray[Any, Any], size: tuple[int, int] | None = None) -> bytes:
    image = Image.fromarray(pixels.astype(np.uint8))
    sink = io.BytesIO()
    (image.resize(size) if size else image).save(sink, "png")
    return sink.getvalue()


@functools.cache
def digit_rows(count: int = 300) -> pa.Table:
    images = (load_digits().images[:count] * 255 / 16).round()
    encoded = [png(image) for image in images]
    return pa.table({ROW_ID: [f"digits.png/{i}" for i in range(count)], "path": ["x"] * count, "bytes": encoded})


@functools.cache
def digit_net() -> torch.nn.Module:
    """A small convolutional net, trained for a moment: good enough that its classes are not all the same."""
    data = load_digits()
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(512, 32),
        torch.nn.ReLU(),
        torch.nn.Linear(32, 10),
    )
    images = torch.tensor((data.images * 255 / 16).round() / 255, dtype=torch.float32).unsqueeze(1)
    targets = torch.tensor(data.target)
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(images), targets).backward()
        optimizer.step()
    return net.eval()


@functools.cache
def digit_torch() -> tuple[Pin, Path]:
    """torch.export: logits of ten classes over encoded images."""
    folder = fresh_folder("digits")
    (folder / "data").mkdir()
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(digit_net(), (torch.zeros(4, 1, 8, 8),), dynamic_shapes=({0: batch},))
    torch.export.save(program, folder / "data" / "model.pt2")
    classes = [f"digit {i}" for i in range(10)]
    return pin_folder(folder, "torch", tensor_signature(1, 8, 8), classes=classes), folder
