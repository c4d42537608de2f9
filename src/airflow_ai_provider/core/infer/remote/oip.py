"""Open Inference Protocol 2 over HTTP: Triton, KServe, MLServer.

Source: the protocol's REST specification and Triton's extension for binary tensors (the header
``Inference-Header-Content-Length``; a text in a tensor is its length in four bytes and its bytes).

Invariants: binary tensors where the server says that it takes them, else JSON; an answer is read only if it names the
request that was sent and the version that was asked for.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

import msgspec
import numpy as np

from airflow_ai_provider.core.batch import Pin
from airflow_ai_provider.core.infer.inputs import Features, InputSpec
from airflow_ai_provider.core.infer.remote.endpoint import RemoteEndpoint
from airflow_ai_provider.core.infer.remote.wire import (
    JSON_TYPE,
    Array,
    Ask,
    Asking,
    Reply,
    declared_specs,
    features_for,
    fit,
    found,
    mismatch,
    read_mapping,
    squeeze,
)
from airflow_ai_provider.errors import ModelPinError, RowMismatchError, SignatureError

_TYPES = {
    "BOOL": np.bool_,
    "UINT8": np.uint8,
    "UINT16": np.uint16,
    "UINT32": np.uint32,
    "UINT64": np.uint64,
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
    "BYTES": np.object_,
}
_NAMES = {np.dtype(kind): name for name, kind in _TYPES.items()}
_LENGTH_HEADER = "Inference-Header-Content-Length"


class OipWire:
    """Speak to one model of one server.

    :param pin: the version that must be served.
    :param endpoint: the model's name there, the outputs to ask for.
    """

    def __init__(self, pin: Pin, endpoint: RemoteEndpoint) -> None:
        self._pin, self._endpoint = pin, endpoint
        self._name, self._version = endpoint.model or pin.name, endpoint.version or pin.version
        self._root = f"/v2/models/{quote(self._name, safe='')}"
        self._base = f"{self._root}/versions/{quote(self._version, safe='')}"
        self._is_binary = False
        self._ids = itertools.count(1)
        self._is_frame = False
        self.specs: list[InputSpec] = []
        self.proof = ""

    async def meet(self, ask: Asking) -> None:
        """Ask for the server's extensions, the model's versions and its inputs."""
        server = found(await ask(Ask("/v2")), "the server") or {}
        self._is_binary = "binary_tensor_data" in (server.get("extensions") or [])
        described = found(await ask(Ask(self._base)), f"version {self._version} of model {self._name}")
        if described is None:
            described = await self._meet_unversioned(ask)
        versions = [str(version) for version in described.get("versions") or []]
        if versions and self._version not in versions:
            raise self._another(f"versions {', '.join(versions)}")
        if versions:
            self._prove(f"its metadata lists version {self._version}")
        declared = described.get("inputs") or []
        self.specs = [_spec(line) for line in declared] or declared_specs(self._pin, "input-0")
        # Columns of several types for a server that declares none: MLServer then takes them as a pandas frame.
        self._is_frame = not declared and any(spec.dtype.kind == "O" for spec in self.specs)

    async def _meet_unversioned(self, ask: Asking) -> dict[str, Any]:
        """A server may know no versions at all; then only its answers can show which one it serves."""
        described = found(await ask(Ask(self._root)), f"model {self._name}")
        if described is None:
            raise ModelPinError(
                f"the model server has no model {self._name!r}. Let it load version {self._version} of it, or set the "
                "connection's extra 'model' to its name there.",
                name=self._name,
            )
        if self._endpoint.version:
            raise self._another(f"versions {described.get('versions') or 'unnamed'}")
        self._base = self._root
        return described

    def features(self) -> Features:
        """Say how rows become arrays."""
        return features_for(self._pin, self.specs)

    def encode(self, arrays: Sequence[Array]) -> Ask:
        """Write rows as a request."""
        arrays = fit(arrays, self.specs)
        asked: dict[str, Any] = {"id": str(next(self._ids)), "inputs": []}
        tail = []
        for spec, array in zip(self.specs, arrays, strict=True):
            line: dict[str, Any] = {"name": spec.name, "datatype": _NAMES[spec.dtype], "shape": list(array.shape)}
            if self._is_binary:
                tail.append(_to_bytes(array))
                line["parameters"] = {"binary_data_size": len(tail[-1])}
            else:
                line["data"] = array.reshape(-1).tolist()
            asked["inputs"].append(line)
        if self._endpoint.outputs:
            asked["outputs"] = [{"name": name} for name in self._endpoint.outputs]
        parameters: dict[str, Any] = {"binary_data_output": True} if self._is_binary else {}
        parameters |= {"content_type": "pd"} if self._is_frame else {}
        head = msgspec.json.encode(asked | ({"parameters": parameters} if parameters else {}))
        headers = {"Content-Type": "application/octet-stream", _LENGTH_HEADER: str(len(head))}
        body = b"".join([head, *tail])
        return Ask(f"{self._base}/infer", body, headers if self._is_binary else JSON_TYPE, asked["id"])

    def decode(self, reply: Reply, asked: Ask, row_count: int) -> dict[str, Array]:
        """Read outputs by name."""
        length = next((v for k, v in reply.headers.items() if k.lower() == _LENGTH_HEADER.lower()), "")
        head_size = int(length) if length.isdecimal() else len(reply.body)
        answer = read_mapping(memoryview(reply.body)[:head_size])
        self._demand_ours(answer, asked)
        outputs, place = {}, head_size
        for line in answer.get("outputs") or []:
            name = str(line.get("name")) if isinstance(line, dict) else "?"
            try:
                size = (line.get("parameters") or {}).get("binary_data_size")
                shape = [int(axis) for axis in line["shape"]]
                if size is None:
                    array = _from_json(line["datatype"], line["data"], shape)
                else:
                    array = _from_bytes(line["datatype"], reply.body[place : place + size], shape)
                    place += size
            except (KeyError, TypeError, ValueError, AttributeError, struct.error) as error:
                raise mismatch(name, row_count, f"what is no tensor ({type(error).__name__}: {error})") from None
            if array.shape[:1] != (row_count,):
                raise mismatch(name, row_count, f"shape {list(array.shape)}")
            outputs[name] = squeeze(array)
        return outputs

    def _demand_ours(self, answer: dict[str, Any], asked: Ask) -> None:
        said = answer.get("id")
        if said and str(said) != asked.id:
            raise RowMismatchError(
                f"the model server answered request {said!r} where {asked.id!r} was sent: rows of two requests are "
                "mixed up. Nothing was landed. Look for a proxy or cache before the server.",
                asked=asked.id,
                said=said,
            )
        version = answer.get("model_version")
        if version:
            if str(version) != self._version:
                raise self._another(f"version {version}")
            self._prove(f"its answers name version {self._version}")

    def _prove(self, how: str) -> None:
        if not self._endpoint.version:
            self.proof = self.proof or how

    def _another(self, served: str) -> ModelPinError:
        return ModelPinError(
            f"version {self._version} of model {self._name} is pinned, the model server serves {served}. Let it load "
            "that version, or pin the one that it serves.",
            name=self._name,
            version=self._version,
        )


def _spec(declared: Any) -> InputSpec:
    try:
        dtype = np.dtype(_TYPES[declared["datatype"]])
        return InputSpec(str(declared["name"]), dtype, tuple(int(size) for size in declared["shape"]))
    except (KeyError, TypeError, ValueError) as error:
        raise SignatureError(
            f"the model server describes an input that cannot be filled: {declared!r:.200} ({type(error).__name__}: "
            f"{error}). Inputs of {', '.join(_TYPES)} can."
        ) from None


def _to_bytes(array: Array) -> bytes:
    if array.dtype.kind == "O":
        texts = [text if isinstance(text, bytes) else str(text).encode() for text in array.reshape(-1).tolist()]
        return b"".join(struct.pack("<I", len(text)) + text for text in texts)
    return np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def _from_bytes(datatype: str, data: bytes, shape: list[int]) -> Array:
    dtype = np.dtype(_TYPES[datatype])
    if dtype.kind != "O":
        return np.frombuffer(data, dtype.newbyteorder("<")).astype(dtype, copy=False).reshape(shape)
    texts, place = [], 0
    for _ in range(math.prod(shape)):
        (size,) = struct.unpack_from("<I", data, place)
        text = data[place + 4 : place + 4 + size]
        if len(text) != size:
            raise ValueError("a text ends before its length")
        texts.append(text.decode())
        place += 4 + size
    return np.array(texts, np.str_).reshape(shape)


def _from_json(datatype: str, data: Any, shape: list[int]) -> Array:
    dtype = np.dtype(_TYPES[datatype])
    with np.errstate(over="ignore"):
        return np.asarray(data, dtype).reshape(shape)
