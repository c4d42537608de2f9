"""Models registered with a real MLflow for the tests of pins, and what is done to their files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import mlflow
import numpy as np
import onnx
import torch
from mlflow import MlflowClient
from mlflow.models import ModelSignature, infer_signature
from mlflow.types import Schema, TensorSpec
from sklearn.datasets import load_breast_cancer

from tests.core.infer import models

FRAME = load_breast_cancer(as_frame=True).data.rename(columns=lambda name: name.replace(" ", "_"))


def log_onnx(name: str, **options: Any) -> None:
    options = {
        "onnx_model": onnx.load(str(models.cancer_onnx()[1] / "model.onnx")),
        "signature": infer_signature(FRAME, models.cancer_model().predict(FRAME.to_numpy())),
        "metadata": {"classes": ["malignant", "benign"]},
        **options,
    }
    mlflow.onnx.log_model(name="model", registered_model_name=name, pip_requirements=[], **options)


def log_torch(name: str, net: torch.nn.Module, **options: Any) -> None:
    shape = Schema([TensorSpec(np.dtype("float32"), (-1, 1, 8, 8))])
    answer = Schema([TensorSpec(np.dtype("float32"), (-1, 10))])
    mlflow.pytorch.log_model(
        net,
        name="model",
        signature=ModelSignature(shape, answer),
        registered_model_name=name,
        pip_requirements=[],
        **{"input_example": np.zeros((4, 1, 8, 8), np.float32), **options},
    )


def fill(uri: str) -> None:
    """Register what the tests ask for: an alias, two versions, safe and unsafe flavors, one without a signature."""
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    mlflow.set_experiment("tests of pins")
    client = MlflowClient(uri, uri)
    log_onnx("triage")
    log_onnx("triage", metadata={"classes": ["bad", "good"]})
    client.set_registered_model_alias("triage", "champion", "1")
    client.set_registered_model_alias("triage", "challenger", "2")
    log_onnx("unsigned", signature=None)
    mlflow.sklearn.log_model(
        models.cancer_model(),
        name="model",
        registered_model_name="pickled",
        signature=infer_signature(FRAME),
        serialization_format="pickle",
        pip_requirements=[],
    )


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def change_artifacts(uri: str, name: str, edit: Callable[[Path], None]) -> None:
    folder = Path(urlsplit(MlflowClient(uri, uri).get_model_version_download_uri(name, "1")).path)
    edit(folder)
