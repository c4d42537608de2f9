"""What every protocol of a model server needs: a question, an answer, and how an answer becomes arrays.

Invariants: pure; an answer with other rows than were asked for is a RowMismatchError, never cut or filled up; a reason
shown to a person is one short line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from airflow_ai_provider.core.batch import Pin
from airflow_ai_provider.core.infer.column import Column, separate_columns
from airflow_ai_provider.core.infer.features import features_of
from airflow_ai_provider.core.infer.inputs import Features, InputSpec
from airflow_ai_provider.errors import ConnectionConfigError, EngineUnavailableError, RowMismatchError, SignatureError

Array = npt.NDArray[Any]
JSON_TYPE = {"Content-Type": "application/json"}
_REASON_LIMIT = 300
_RAISED = re.compile(r"[\w.]*(Error|Exception)\b")
# MLflow's types of a signature's columns.
COLUMN_TYPES = {
    "double": np.float64,
    "float": np.float32,
    "long": np.int64,
    "integer": np.int32,
    "boolean": np.bool_,
}


@dataclass(frozen=True)
class Ask:
    """One request.

    :param refuses: tells whether an answer that else means "later" (503) is about the rows.
    """

    path: str
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    id: str = ""
    refuses: Callable[[Reply], bool] = lambda reply: False


@dataclass(frozen=True)
class Reply:
    """One whole answer."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def reason(self) -> str:
        """The server's own words, in one line."""
        return f"{self.status}: {_words(self.body)}"


Asking = Callable[[Ask], Awaitable[Reply]]


class Wire(Protocol):
    """One protocol, for one model of one server."""

    specs: list[InputSpec]
    proof: str
    """How the server showed that it serves the pinned version; empty when it did not."""

    async def meet(self, ask: Asking) -> None:
        """Look the model up: its version, its inputs.

        :raises ModelPinError: the server serves another version, or has no such model; a retry does not help.
        """

    def features(self) -> Features:
        """Say how rows become arrays."""

    def encode(self, arrays: Sequence[Array]) -> Ask:
        """Write rows as a request."""

    def decode(self, reply: Reply, asked: Ask, row_count: int) -> dict[str, Array]:
        """Read outputs by name, first axis the rows.

        :raises RowMismatchError: when they are not so many rows; a retry does not help.
        """


def read_json(body: bytes | memoryview) -> Any:
    """Read an answer; NaN and Infinity, which JSON does not have, are read as what they mean.

    :raises RowMismatchError: when it is no JSON; a retry does not help.
    """
    try:
        return msgspec.json.decode(body)
    except msgspec.MsgspecError:
        pass
    try:
        return json.loads(bytes(body))
    except (ValueError, RecursionError):
        # Its text is not shown: a page that repeats our request would repeat the credentials in it.
        what = "a page of HTML" if bytes(body[:100]).lstrip().startswith(b"<") else f"{len(body)} bytes"
        raise RowMismatchError(
            f"the model server says 200 and its answer is no JSON but {what}. Check that the connection names a model "
            "server and its protocol."
        ) from None


def read_mapping(body: bytes | memoryview) -> dict[str, Any]:
    """Read an answer that must be a JSON object."""
    found = read_json(body)
    if not isinstance(found, dict):
        raise RowMismatchError(
            f"the model server answered with a JSON {type(found).__name__} where the protocol has an object. Check "
            "that the connection names the right protocol."
        )
    return found


def found(reply: Reply, what: str) -> dict[str, Any] | None:
    """Read the answer to a question about the model; None when the server has no such thing."""
    demand_settled(reply, what)
    if reply.status in (400, 404):
        return None
    if reply.status != 200:
        raise EngineUnavailableError(
            f"the model server does not say what {what} is: {reply.reason}. Look at the server's log; the retry asks "
            "again.",
            status=reply.status,
        )
    try:
        return read_mapping(reply.body)
    except RowMismatchError as error:
        raise ConnectionConfigError(str(error)) from None


def demand_settled(reply: Reply, what: str) -> None:
    """Refuse what is about neither the rows nor the model: a wrong login, a wrong address.

    :raises ConnectionConfigError: no retry helps.
    """
    if reply.status in (401, 403, 407):
        raise ConnectionConfigError(
            f"the model server refuses this login for {what}: {reply.reason}. Correct the connection's password or "
            "headers.",
            status=reply.status,
        )
    if 300 <= reply.status < 400 or reply.status in (405, 415):
        target = reply.headers.get("Location", "")
        raise ConnectionConfigError(
            f"the model server does not take questions about {what} at this address: {reply.reason} {target}. Set the "
            "connection to where the server really is, and to its protocol.",
            status=reply.status,
        )


def to_array(value: Any, row_count: int, name: str) -> Array:
    """Make an array of what JSON holds, first axis the rows; a null among numbers is NaN.

    :raises RowMismatchError: when it is not so many rows, or rows of different shapes; a retry does not help.
    """
    if not isinstance(value, list) or len(value) != row_count:
        got = f"{len(value)} rows" if isinstance(value, list) else f"a {type(value).__name__}"
        raise mismatch(name, row_count, got)
    try:
        array = np.asarray(value)
        if array.dtype.kind == "O" and not any(isinstance(item, str | dict) for item in value):
            array = np.asarray(value, np.float64)
    except (TypeError, ValueError, OverflowError):
        raise mismatch(name, row_count, "rows of different shapes or types") from None
    return squeeze(array)


def squeeze(array: Array) -> Array:
    """Take a label per row out of its column of one; scores keep their shape."""
    return array.reshape(-1) if array.dtype.kind not in "f" and array.shape[1:] == (1,) else array


def mismatch(name: str, row_count: int, got: str) -> RowMismatchError:
    """Say that an output is not what was asked for."""
    return RowMismatchError(
        f"the model server got {row_count} rows and answered with {got} in output {name!r}. It must return one line "
        "per row, in the rows' order: nothing was landed. Correct the model's code on the server.",
        given=row_count,
        output=name,
    )


def column_output(value: Any, row_count: int) -> dict[str, Array]:
    """Read predictions of the JSON protocols: a value per row, a mapping per row, or a mapping of columns.

    Columns named 0, 1, 2 … are one output of scores (a frame without names).
    """
    if isinstance(value, list) and value and all(isinstance(line, dict) for line in value):
        if len(value) != row_count:
            raise mismatch("predictions", row_count, f"{len(value)} rows")
        names = list(value[0])
        if any(line.keys() != value[0].keys() for line in value):
            raise mismatch("predictions", row_count, "rows with different fields")
        if len(names) > 1 and names == [str(position) for position in range(len(names))]:
            return {"predictions": to_array([list(line.values()) for line in value], row_count, "predictions")}
        value = {name: [line[name] for line in value] for name in names}
    if isinstance(value, dict):
        return {str(name): to_array(items, row_count, str(name)) for name, items in value.items()}
    return {"predictions": to_array(value, row_count, "predictions")}


def declared_specs(pin: Pin, name: str) -> list[InputSpec]:
    """Say what the server takes where it does not say so itself: as the signature declares, numbers as one matrix."""
    inputs = list(pin.signature["inputs"])
    if inputs[0].get("type") == "tensor":
        names = [name] if len(inputs) == 1 else [str(tensor["name"]) for tensor in inputs]
        tensors = [tensor["tensor-spec"] for tensor in inputs]
        shapes = [tuple(int(size) for size in tensor["shape"]) for tensor in tensors]
        return [InputSpec(n, np.dtype(t["dtype"]), s) for n, t, s in zip(names, tensors, shapes, strict=True)]
    kinds = {str(column.get("type")) for column in inputs}
    if kinds <= set(COLUMN_TYPES):
        dtype = np.float32 if kinds == {"float"} else np.float64
        return [InputSpec(name, np.dtype(dtype), (-1, len(inputs)))]
    types = [np.dtype(COLUMN_TYPES.get(str(column.get("type")), np.object_)) for column in inputs]
    return [InputSpec(str(column["name"]), kind, (-1, 1)) for column, kind in zip(inputs, types, strict=True)]


def features_for(pin: Pin, specs: Sequence[InputSpec]) -> Features:
    """Say how rows become a server's inputs: as an engine's, and one column of texts by its place."""
    inputs = pin.signature["inputs"]
    if len(specs) == len(inputs) == 1 and specs[0].dtype.kind == "O" and inputs[0].get("type") != "tensor":
        column = Column(str(inputs[0]["name"]), str(inputs[0].get("type")), False)
        return separate_columns([column], [InputSpec(column.name, specs[0].dtype, (-1, 1))])
    features = features_of(pin, specs)
    if features.padding:
        raise SignatureError(
            f"model {pin.name} takes lists of any length, which are not sent to a server. Fill them up to one length "
            "at ingest and log the model with that length in its signature, or predict on the worker.",
            name=pin.name,
        )
    return features


def fit(arrays: Sequence[Array], specs: Sequence[InputSpec]) -> list[Array]:
    """Give each array the number of axes that the server declares for it: a column of one is a vector to some."""
    return [
        array.reshape(-1) if len(spec.shape) == 1 and array.shape[1:] == (1,) else array
        for array, spec in zip(arrays, specs, strict=True)
    ]


def _words(body: bytes) -> str:
    """Take what the server says out of its answer; of a traceback the line that says what was raised."""
    text = body[:200_000].decode("utf-8", "replace")
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        said = None
    if isinstance(said, dict):
        chosen = [said[name] for name in ("error", "message", "detail", "stack_trace") if said.get(name)]
        text = " ".join(part if isinstance(part, str) else json.dumps(part) for part in chosen) or text
    head, trace, tail = text.partition("Traceback (most recent call last)")
    if trace:
        lines = [line.strip() for line in tail.splitlines() if line.strip()]
        raised = [line for line in lines if _RAISED.match(line)] or lines
        text = f"{head[:150]} {raised[-1] if raised else ''}"
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= _REASON_LIMIT else text[: _REASON_LIMIT - 1] + "…"
