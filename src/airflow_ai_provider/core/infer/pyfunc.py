"""The door to MLflow's own loader, for models that are code: scikit-learn, XGBoost, LightGBM, a Python function.

Invariants: only what the author allowed by name gets here, and only files whose bytes were proved; a row on which the
model's code fails is a row error; a model that gives back another number of rows is stopped.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import numpy as np
import pandas as pd  # type: ignore[import-untyped,unused-ignore]
import pyarrow as pa
from mlflow import pyfunc

from airflow_ai_provider.core.batch import ROW_ID, Pin
from airflow_ai_provider.core.infer.apart import Apart, first_line
from airflow_ai_provider.core.infer.batching import suggest_batch_size
from airflow_ai_provider.core.infer.column import Column, separate_columns
from airflow_ai_provider.core.infer.engine import settle_device
from airflow_ai_provider.core.infer.features import features_of
from airflow_ai_provider.core.infer.inputs import Array, Each, Features, InputSpec
from airflow_ai_provider.core.infer.outcome import predictions, settle_reading
from airflow_ai_provider.errors import AiProviderError, RowMismatchError, SignatureError

log = logging.getLogger(__name__)
_TYPES: dict[str, Any] = {
    "double": np.float64,
    "float": np.float32,
    "long": np.int64,
    "integer": np.int32,
    "boolean": np.bool_,
    "string": np.object_,
}


class PyfuncEngine:
    """Predict rows with what ``mlflow.pyfunc`` loads.

    A classifier that gives labels only, and whose library can give probabilities (``predict_proba``), is asked for
    both. Calls go one at a time: nobody promises that the model's code may run twice at once.

    :param pin: signature and metadata of the model.
    :param folder: the model's files, their bytes already proved.
    :param device: as :func:`~airflow_ai_provider.core.infer.engine.open_engine` takes it; what the model's code does
        with a GPU cannot be seen from here, so ``require_cuda`` is refused.
    :raises DeviceError: ``require_cuda``; no retry helps.
    :raises SignatureError: the model cannot be loaded here, or does not take what its signature says; no retry helps.
    """

    name = "pyfunc"
    steady = False
    workers = 1
    tunable = False  # what it does with many rows at once is its own affair
    traits: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, pin: Pin, folder: Path, device: str) -> None:
        self.device = settle_device(device, "cpu", "a Python function shows no device, so none is promised")
        for difference in environment_differences(folder):
            log.warning("model %s version %s was made in another environment: %s", pin.name, pin.version, difference)
        self._what = f"model {pin.name} version {pin.version}"
        self._model = self._load(folder)
        self._features, self._names = _features(pin)
        self._scores = _probabilities_of(self._model)
        self._turn = threading.Lock()
        self.row_bytes = self._features.row_bytes
        self.batch_size = suggest_batch_size(self.row_bytes, "cpu")
        self._reading = settle_reading(self._try, pin.metadata)

    def needs(self, schema: pa.Schema) -> Sequence[str]:
        """Return the columns that predict reads, or raise SignatureError."""
        return self._features.needs(schema)

    def warm_up(self, batch_size: int) -> None:
        """Do nothing: what the model's code does first is its own affair."""

    def predict(self, rows: pa.Table, batch_size: int, each: Each = map) -> pa.Table:
        """Return one line per row, in the rows' order."""
        inputs = self._features.read(rows)
        errors = dict(inputs.errors)
        outputs = [output[:0] for output in self._try(0.0)]
        parts = [outputs]
        apart = Apart(self._run, lambda: self._try(0.0), errors)
        for start in range(0, rows.num_rows, batch_size):
            arrays = [array[start : start + batch_size] for array in inputs.arrays]
            parts.append(apart.run(arrays, range(start, start + len(arrays[0]))))
        joined = [np.concatenate(column) for column in zip(*parts, strict=True)]
        return predictions(rows[ROW_ID], joined, errors, self._reading)

    def close(self) -> None:
        """Free the model."""
        del self._model

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    def _load(self, folder: Path) -> Any:
        try:
            return pyfunc.load_model(str(folder))
        except Exception as error:  # whatever the model's own code or its library raises
            raise SignatureError(
                f"{self._what} cannot be loaded here: {type(error).__name__}: {first_line(error)}. Install what its "
                "requirements.txt names on this worker, or log it again from an environment like this one."
            ) from error

    def _run(self, arrays: list[Array]) -> list[Array]:
        row_count = len(arrays[0])
        given: Any = arrays[0]
        if self._names:
            given = pd.DataFrame(dict(zip(self._names, arrays, strict=True)))
        with self._turn:
            outputs = _arrays(self._model.predict(given))
            if self._scores:
                labels = [output for output in outputs if output.dtype.kind != "f"]
                outputs = [*labels, np.asarray(self._scores(given))]
        wrong = [len(output) for output in outputs if len(output) != row_count]
        if wrong:
            raise RowMismatchError(
                f"{self._what} was given {row_count} rows and gave back {wrong[0]}. Nothing of it was written. Its "
                "predict must return one line per row, in their order.",
                given=row_count,
                returned=wrong[0],
            )
        return outputs

    def _try(self, fill: float) -> list[Array]:
        sample = self._features.sample(fill, 2)
        try:
            return self._run(sample)
        except AiProviderError:
            raise
        except Exception as error:  # as above
            raise SignatureError(
                f"{self._what} does not take what its signature says ({[str(a.dtype) for a in sample]}, rows of "
                f"{fill}): {type(error).__name__}: {first_line(error)}. Log it again with the signature of its rows; "
                "a model of texts must take an empty one.",
            ) from error


def environment_differences(folder: Path) -> list[str]:
    """Say which libraries of a model's requirements are here in another version, or not at all."""
    path = folder / "requirements.txt"
    wanted = re.findall(r"^([\w.-]+)(?:\[.*\])?==([\w.+!-]+)", path.read_text("utf-8"), re.M) if path.is_file() else []
    differences = []
    for name, version in wanted:
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            found = "none"
        if found != version:
            differences.append(f"{name} {version} there, {found} here")
    return differences


def _features(pin: Pin) -> tuple[Features, list[str]]:
    """Return how rows become input, and the names of a frame's columns; none for a tensor."""
    inputs = list(pin.signature["inputs"])
    if inputs[0].get("type") == "tensor":
        features = features_of(pin, [])
        if len(inputs) > 1 or features.padding is not None:
            raise SignatureError(
                f"model {pin.name} takes {len(inputs)} tensors or sequences, which a Python function is not given "
                "here: one tensor of a fixed size, or named columns. Give it a signature of these.",
                name=pin.name,
            )
        return features, []
    strange = [f"{i.get('name')} ({i.get('type')})" for i in inputs if i.get("type") not in _TYPES or not i.get("name")]
    if strange:
        raise SignatureError(
            f"model {pin.name} takes {', '.join(strange[:5])}; columns are of {', '.join(_TYPES)}, each with a name. "
            "Log it again with a signature of such columns.",
            columns=strange,
        )
    columns = [Column(i["name"], str(i["type"]), not i.get("required", True)) for i in inputs]
    specs = [InputSpec(column.name, np.dtype(_TYPES[column.type]), (-1,)) for column in columns]
    return separate_columns(columns, specs), [column.name for column in columns]


def _probabilities_of(model: Any) -> Callable[[Any], Any] | None:
    """Return the function by which a classifier that gives labels gives probabilities; None when there is none."""
    try:
        raw = model.get_raw_model()
    except NotImplementedError:
        return None
    said = (model.metadata.flavors.get("python_function") or {}).get("predict_fn", "predict")
    found = getattr(raw, "predict_proba", None)
    return found if said == "predict" and callable(found) else None


def _arrays(result: Any) -> list[Array]:
    """Take what a Python function may return apart into arrays, labels and numbers each for themselves."""
    if isinstance(result, pd.DataFrame):
        is_number = [pd.api.types.is_float_dtype(kind) for kind in result.dtypes]
        numbers = result.loc[:, is_number].to_numpy()
        labels = [result.iloc[:, i].to_numpy() for i, number in enumerate(is_number) if not number]
        scores = [numbers[:, 0] if numbers.shape[1] == 1 else numbers] if numbers.shape[1] else []
        return [*labels, *scores]
    if isinstance(result, dict):
        return [np.asarray(value) for value in result.values()]
    array = result.to_numpy() if isinstance(result, pd.Series) else np.asarray(result)
    if array.ndim == 0:
        raise SignatureError(f"the model returns one {type(result).__name__} for all rows. Let it return one per row.")
    return [array]
