"""Model servers that take rows as JSON: ``mlflow models serve``, TorchServe, TensorFlow Serving.

Sources: MLflow's scoring server (``/invocations``: ``dataframe_split`` and ``instances``), TorchServe's inference API
with the JSON service envelope (``instances`` → ``predictions``), TensorFlow Serving's RESTful API (row format).

Invariants: pure but for the questions of ``meet``; numbers are written so that they are read back as they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

import msgspec
import numpy as np

from airflow_ai_provider.core.batch import Pin
from airflow_ai_provider.core.infer.inputs import Features, InputSpec
from airflow_ai_provider.core.infer.remote.endpoint import RemoteEndpoint
from airflow_ai_provider.core.infer.remote.frame import Frame
from airflow_ai_provider.core.infer.remote.wire import (
    JSON_TYPE,
    Array,
    Ask,
    Asking,
    Reply,
    column_output,
    declared_specs,
    demand_settled,
    features_for,
    fit,
    found,
    mismatch,
    read_json,
    read_mapping,
)
from airflow_ai_provider.errors import EngineUnavailableError, ModelPinError, SignatureError

_TENSORFLOW_TYPES = {
    "DT_FLOAT": np.float32,
    "DT_DOUBLE": np.float64,
    "DT_HALF": np.float16,
    "DT_INT64": np.int64,
    "DT_INT32": np.int32,
    "DT_UINT8": np.uint8,
    "DT_BOOL": np.bool_,
    "DT_STRING": np.object_,
}


class MlflowWire:
    """Speak to ``mlflow models serve``; it does not tell which version it serves.

    A signature of columns is sent as ``dataframe_split``, a tensor as ``instances``.
    """

    specs: list[InputSpec]
    proof = ""

    def __init__(self, pin: Pin, endpoint: RemoteEndpoint) -> None:
        self._pin, self.specs = pin, []
        self._frame = Frame(pin) if pin.signature["inputs"][0].get("type") != "tensor" else None

    async def meet(self, ask: Asking) -> None:
        """Ask whether the server is well: there is nothing else to ask it."""
        demand_settled(await ask(Ask("/ping")), "its health")

    def features(self) -> Features:
        """Say how rows become arrays."""
        if self._frame is None:
            self.specs = declared_specs(self._pin, "instances")
            return features_for(self._pin, self.specs)
        return self._frame

    def encode(self, arrays: Sequence[Array]) -> Ask:
        """Write rows as a request."""
        if self._frame is None:
            named = {spec.name: array.tolist() for spec, array in zip(self.specs, arrays, strict=True)}
            asked = {"instances": arrays[0].tolist()} if len(named) == 1 else {"inputs": named}
            return Ask("/invocations", msgspec.json.encode(asked), JSON_TYPE)
        # An optional column that the rows do not have is left out: not every type takes a null.
        columns = {name: values.tolist() for name, values in zip(self._frame.names, arrays, strict=True)}
        columns = {name: values for name, values in columns.items() if any(value is not None for value in values)}
        frame = {"columns": list(columns), "data": list(zip(*columns.values(), strict=True))}
        body = msgspec.json.encode({"dataframe_split": frame})
        return Ask("/invocations", body, JSON_TYPE)

    def decode(self, reply: Reply, asked: Ask, row_count: int) -> dict[str, Array]:
        """Read outputs by name."""
        return column_output(read_mapping(reply.body).get("predictions"), row_count)


class TorchServeWire:
    """Speak to TorchServe's inference API, its model archived with the JSON service envelope.

    The version is part of the address, and TorchServe answers 404 for one that it does not serve.
    """

    def __init__(self, pin: Pin, endpoint: RemoteEndpoint) -> None:
        version = endpoint.version or pin.version
        self._pin, self._path = (
            pin,
            f"/predictions/{quote(endpoint.model or pin.name, safe='')}/{quote(version, safe='')}",
        )
        self.specs = declared_specs(pin, "instances")
        self.proof = "" if endpoint.version else f"its address names version {version}"

    async def meet(self, ask: Asking) -> None:
        """Ask whether the server is well; its address proves the version when the first rows are predicted."""
        demand_settled(await ask(Ask("/ping")), "its health")

    def features(self) -> Features:
        """Say how rows become arrays."""
        return features_for(self._pin, self.specs)

    def encode(self, arrays: Sequence[Array]) -> Ask:
        """Write rows as a request."""
        is_mixed = any(spec.dtype.kind == "O" for spec in self.specs)
        body = msgspec.json.encode({"instances": _instances(arrays, self.specs, by_name=is_mixed)})
        return Ask(self._path, body, JSON_TYPE, refuses=_handler_failed)

    def decode(self, reply: Reply, asked: Ask, row_count: int) -> dict[str, Array]:
        """Read outputs by name; a handler without the envelope answers with a bare list."""
        answer = read_json(reply.body)
        return column_output(answer.get("predictions") if isinstance(answer, dict) else answer, row_count)


class TensorFlowWire:
    """Speak to TensorFlow Serving by REST; it tells the versions that it serves and the inputs that it takes."""

    def __init__(self, pin: Pin, endpoint: RemoteEndpoint) -> None:
        self._pin, self._is_ours = pin, not endpoint.version
        self._version, self._name = endpoint.version or pin.version, endpoint.model or pin.name
        self._path = f"/v1/models/{quote(self._name, safe='')}/versions/{quote(self._version, safe='')}"
        self.specs: list[InputSpec] = []
        self.proof = ""

    async def meet(self, ask: Asking) -> None:
        """Ask for the version's state and for its signature."""
        what = f"version {self._version} of model {self._name}"
        status = found(await ask(Ask(self._path)), what)
        lines = (status or {}).get("model_version_status") or []
        states = {str(line.get("version")): line.get("state") for line in lines if isinstance(line, dict)}
        if self._version not in states:
            raise ModelPinError(
                f"the model server does not serve {what}; it says {states or 'that there is none'}. Let it load that "
                "version, or pin the one that it serves.",
                found=states,
            )
        if states[self._version] != "AVAILABLE":
            raise EngineUnavailableError(
                f"{what} is {states[self._version]} on the model server, not AVAILABLE. The retry asks again.",
                state=states[self._version],
            )
        self.proof = f"it says that version {self._version} is AVAILABLE" if self._is_ours else ""
        described = found(await ask(Ask(f"{self._path}/metadata")), f"the signature of {what}")
        self.specs = _tensorflow_specs(described or {}) or declared_specs(self._pin, "instances")

    def features(self) -> Features:
        """Say how rows become arrays."""
        return features_for(self._pin, self.specs)

    def encode(self, arrays: Sequence[Array]) -> Ask:
        """Write rows as a request."""
        body = msgspec.json.encode(
            {"instances": _instances(fit(arrays, self.specs), self.specs, by_name=len(arrays) > 1)}
        )
        return Ask(f"{self._path}:predict", body, JSON_TYPE)

    def decode(self, reply: Reply, asked: Ask, row_count: int) -> dict[str, Array]:
        """Read outputs by name."""
        predictions = read_mapping(reply.body).get("predictions")
        if not isinstance(predictions, list):
            raise mismatch("predictions", row_count, f"a {type(predictions).__name__}")
        return column_output(predictions, row_count)


def _instances(arrays: Sequence[Array], specs: Sequence[InputSpec], *, by_name: bool) -> list[Any]:
    """One value per row, or one mapping per row."""
    if not by_name:
        values: list[Any] = arrays[0].tolist()
        return values
    columns = [array.reshape(len(array), *array.shape[1:] if array.shape[1:] != (1,) else ()) for array in arrays]
    names = [spec.name for spec in specs]
    return [dict(zip(names, line, strict=True)) for line in zip(*(c.tolist() for c in columns), strict=True)]


def _handler_failed(reply: Reply) -> bool:
    # TorchServe answers 503 both when it has no free worker (later) and when the model's own code failed on the rows.
    return reply.status == 503 and b"Prediction failed" in reply.body


def _tensorflow_specs(described: dict[str, Any]) -> list[InputSpec]:
    try:
        signatures = described["metadata"]["signature_def"]["signature_def"]
        inputs = signatures["serving_default"]["inputs"]
        return [_tensorflow_spec(name, inputs[name]) for name in sorted(inputs)]
    except (KeyError, TypeError, ValueError) as error:
        raise SignatureError(
            f"the model server describes no signature 'serving_default' that can be read ({type(error).__name__}: "
            f"{error}). Save the model with tf.saved_model.save(..., signatures={{'serving_default': ...}})."
        ) from None


def _tensorflow_spec(name: str, declared: dict[str, Any]) -> InputSpec:
    dtype = _TENSORFLOW_TYPES[declared["dtype"]]
    shape = declared.get("tensor_shape") or {}
    return InputSpec(name, np.dtype(dtype), tuple(int(dim["size"]) for dim in shape.get("dim") or []))
