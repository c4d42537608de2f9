"""A fake model server in a thread: the shapes of four protocols over one arithmetic model, and every fault on demand.

The shapes of Open Inference Protocol and of ``mlflow models serve`` are held against the real servers in
``tests/integration/test_remote_servers.py``. Those of TorchServe and TensorFlow Serving are written after their
documentation only: no real server has been asked.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from airflow_ai_provider.core.batch import ROW_ID, Pin, digest_of
from airflow_ai_provider.core.infer.remote.endpoint import RemoteEndpoint
from tests.core.infer.dense import columns_signature

Rows = npt.NDArray[Any]
FILES = {"model.onnx": "sha256:" + "1" * 64}
PIN = Pin("sums", "3", "", digest_of(FILES), FILES, "onnx", columns_signature(["x", "y"]))
TOO_LARGE = 1000.0
_DTYPES = {"FP32": np.float32, "FP64": np.float64, "INT64": np.int64}


class Refused(Exception):
    """The model takes none of these rows."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status, self.text = status, text


def high_or_low(rows: Rows) -> dict[str, Rows]:
    """Class 1 where the columns add up to more than zero; a number that is too large is refused."""
    if (rows > TOO_LARGE).any():
        raise Refused(400, f"a number is larger than {TOO_LARGE:g}")
    high = 1 / (1 + np.exp(-rows.astype(np.float64).sum(axis=1)))
    return {"label": (high > 0.5).astype(np.int64), "probabilities": np.stack([1 - high, high], axis=1)}


@dataclass
class FakeServer:
    """What the server is, what it saw, and what it does wrong.

    :param protocol: whose shapes it speaks.
    :param version: the one that it serves; empty for a server that knows no versions.
    :param binary: takes binary tensors (Open Inference Protocol).
    :param model: rows → outputs; raises :class:`Refused`.
    :param spoil: changes an answer before it is sent.
    :param script: each is called with the handler in place of one prediction, and then forgotten.
    """

    protocol: str = "oip"
    version: str = "3"
    binary: bool = False
    model: Callable[[Rows], dict[str, Rows]] = high_or_low
    spoil: Callable[[dict[str, Any]], Any] = lambda answer: answer
    script: deque[Callable[[Handler], None]] = field(default_factory=deque)
    seen: list[int] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    most_at_once: int = 0
    at_once: int = 0
    port: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def endpoint(self, **more: Any) -> RemoteEndpoint:
        given = {"timeout_s": 30, "patience_s": 60, "batch_size": 50} | more
        return RemoteEndpoint(self.protocol, f"http://127.0.0.1:{self.port}", **given)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    fake: FakeServer

    def log_message(self, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        status, answer = _describe(self.fake, self.path)
        self.answer(status, answer)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        fake = self.fake
        with fake.lock:
            fake.headers.append(dict(self.headers))
            fake.at_once += 1
            fake.most_at_once = max(fake.most_at_once, fake.at_once)
            fault = fake.script.popleft() if fake.script else None
        try:
            fault(self) if fault else self._predict(body)
        finally:
            with fake.lock:
                fake.at_once -= 1

    def answer(self, status: int, answer: Any, headers: dict[str, str] | None = None) -> None:
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def cut(self, sent: bytes = b"") -> None:
        """Reset the connection, after some bytes or none."""
        self.wfile.write(sent)
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def _predict(self, body: bytes) -> None:
        if not self.path.endswith(_path(self.fake)):
            self.answer(404, {"error": f"no such model: {self.path}"})
            return
        asked, rows = _read(self.fake, body, int(self.headers.get("Inference-Header-Content-Length") or 0))
        with self.fake.lock:
            self.fake.seen.append(len(rows))
        try:
            outputs = self.fake.model(rows)
        except Refused as refused:
            self.answer(refused.status, {"error": refused.text})
            return
        self.answer(200, *_write(self.fake, asked, outputs))


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *args: Any) -> None:
        """A client that lost its patience is what the tests are about."""


@contextmanager
def serving(at: int = 0, **facts: Any) -> Iterator[FakeServer]:
    """Serve for the length of the block, at a port if one is given."""
    fake = FakeServer(**facts)
    server = _Quiet(("127.0.0.1", at), type("Bound", (Handler,), {"fake": fake}))
    fake.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def rows_of(count: int, seed: int = 0) -> pa.Table:
    random = np.random.default_rng(seed)
    return pa.table(
        {ROW_ID: [f"r/{i}" for i in range(count)], "x": random.normal(size=count), "y": random.normal(size=count)}
    )


def with_x(rows: pa.Table, changed: dict[int, float | None]) -> pa.Table:
    values = rows["x"].to_pylist()
    for row, value in changed.items():
        values[row] = value
    return rows.set_column(1, "x", pa.array(values, pa.float64()))


def _path(fake: FakeServer) -> str:
    return {
        "oip": f"/v2/models/sums/versions/{fake.version}/infer" if fake.version else "/v2/models/sums/infer",
        "mlflow": "/invocations",
        "torchserve": f"/predictions/sums/{fake.version}",
        "tensorflow": f"/v1/models/sums/versions/{fake.version}:predict",
    }[fake.protocol]


def _describe(fake: FakeServer, path: str) -> tuple[int, Any]:
    if fake.protocol in ("mlflow", "torchserve"):
        return (200, {"status": "Healthy"}) if path == "/ping" else (404, {})
    if fake.protocol == "tensorflow":
        return _describe_tensorflow(fake, path)
    inputs = [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}]
    model = {"name": "sums", "versions": [fake.version] if fake.version else [], "platform": "", "inputs": inputs}
    known = {
        "/v2": {"name": "fake", "version": "1", "extensions": ["binary_tensor_data"] if fake.binary else []},
        "/v2/health/ready": {},
        "/v2/models/sums": model,
    }
    if fake.version:
        known[f"/v2/models/sums/versions/{fake.version}"] = model
    return (200, known[path]) if path in known else (404, {"error": f"Model not found: {path}"})


def _describe_tensorflow(fake: FakeServer, path: str) -> tuple[int, Any]:
    root = f"/v1/models/sums/versions/{fake.version}"
    dims = [{"size": "-1", "name": ""}, {"size": "2", "name": ""}]
    inputs = {"x": {"dtype": "DT_FLOAT", "tensor_shape": {"dim": dims, "unknown_rank": False}, "name": "x:0"}}
    known: dict[str, Any] = {
        root: {"model_version_status": [{"version": fake.version, "state": "AVAILABLE", "status": {}}]},
        f"{root}/metadata": {"metadata": {"signature_def": {"signature_def": {"serving_default": {"inputs": inputs}}}}},
    }
    return (200, known[path]) if path in known else (404, {"error": "Servable not found"})


def _read(fake: FakeServer, body: bytes, head_size: int) -> tuple[dict[str, Any], Rows]:
    asked = json.loads(body[:head_size] if head_size else body)
    if fake.protocol != "oip":
        values = asked["dataframe_split"]["data"] if "dataframe_split" in asked else asked["instances"]
        return asked, np.array(values, np.float64).reshape(len(values), -1)
    (line,) = asked["inputs"]
    dtype = _DTYPES[line["datatype"]]
    flat = np.frombuffer(body[head_size:], dtype) if head_size else np.array(line["data"], dtype)
    return asked, flat.reshape(line["shape"])


def _write(fake: FakeServer, asked: dict[str, Any], outputs: dict[str, Any]) -> tuple[bytes, dict[str, str]]:
    if fake.protocol != "oip":
        columns = {name: values.tolist() for name, values in outputs.items()}
        lines: Any = [dict(zip(columns, line, strict=True)) for line in zip(*columns.values(), strict=True)]
        if fake.protocol == "mlflow":
            lines = columns
        return json.dumps(fake.spoil({"predictions": lines})).encode(), {}
    tensors, tail = [], b""
    for name, given in outputs.items():
        datatype = {"i": "INT64", "f": "FP64"}[given.dtype.kind]
        array = given.astype(_DTYPES[datatype])
        tensor: dict[str, Any] = {"name": name, "datatype": datatype, "shape": list(array.shape)}
        if fake.binary:
            tensor["parameters"] = {"binary_data_size": array.nbytes}
            tail += array.tobytes()
        else:
            tensor["data"] = array.reshape(-1).tolist()
        tensors.append(tensor)
    answer = {"model_name": "sums", "model_version": fake.version or None, "id": asked.get("id"), "outputs": tensors}
    head = json.dumps(fake.spoil(answer)).encode()
    return head + tail, {"Inference-Header-Content-Length": str(len(head))} if fake.binary else {}
