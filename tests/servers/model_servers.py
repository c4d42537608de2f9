"""Real model servers: MLServer, Triton, ``mlflow models serve``.

Invariants: MLServer and Triton run in environments of their own, kept outside the checkout; what they serve is trained
or written here. A start takes 1 to 20 s: start those that a test needs at once (:func:`start_all`).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from tests.servers.process import Server, ServerFailedError, ServerProcess, free_port

_TOOL = Path(__file__).resolve().parents[2] / "tools" / "model_server_env.sh"

# What leads this process's Python to its libraries would mislead a server that runs on another one.
_OWN_PYTHON = {"PYTHONPATH": "", "PYTHONHOME": ""}

# Two models: numbers as one matrix, and a frame with a text among its columns.
_TRAIN = """
import json, sys
from pathlib import Path
import joblib
import pandas as pd
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

def save(name, version, model):
    folder = Path(name)
    folder.mkdir()
    joblib.dump(model, folder / "model.joblib")
    settings = {"uri": "./model.joblib"} | ({"version": version} if version else {})
    described = {"name": name, "implementation": "mlserver_sklearn.SKLearnModel", "parameters": settings}
    (folder / "model-settings.json").write_text(json.dumps(described))

data = load_breast_cancer()
save("triage", "3", make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)).fit(data.data, data.target))
frame = pd.DataFrame({"colour": ["red", "blue"] * 20, "size": [float(i) for i in range(40)]})
columns = make_column_transformer((OneHotEncoder(handle_unknown="ignore"), ["colour"]), ("passthrough", ["size"]))
save("mixed", None, make_pipeline(columns, LogisticRegression()).fit(frame, ["small"] * 20 + ["large"] * 20))
"""

_TRITON = """
import sys
import numpy as np
from pytriton.decorators import batch
from pytriton.model_config import ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

@batch
def sums(x):
    if (x > 1000).any():
        raise ValueError("a number is larger than 1000")
    high = 1 / (1 + np.exp(-x.astype(np.float64).sum(axis=1)))
    return {"probabilities": np.stack([1 - high, high], axis=1).astype(np.float32)}

@batch
def words(text):
    texts = np.char.upper(np.char.decode(text.astype(bytes), "utf-8"))
    return {"label": np.char.encode(texts, "utf-8").astype(object)}

http, grpc, metrics = (int(port) for port in sys.argv[1:])
ports = {"http_port": http, "grpc_port": grpc, "metrics_port": metrics}
config = TritonConfig(http_address="127.0.0.1", grpc_address="127.0.0.1", allow_metrics=False, **ports)
with Triton(config=config) as triton:
    triton.bind("sums", sums, [Tensor(name="x", dtype=np.float32, shape=(2,))],
                [Tensor(name="probabilities", dtype=np.float32, shape=(2,))], model_version=3,
                config=ModelConfig(max_batch_size=64))
    triton.bind("words", words, [Tensor(name="text", dtype=bytes, shape=(1,))],
                [Tensor(name="label", dtype=bytes, shape=(1,))], model_version=3, config=ModelConfig(max_batch_size=64))
    triton.serve()
"""


class MlServer(Server):
    """Serve ``triage`` (version 3) and ``mixed`` (no version), trained in the server's own environment."""

    def __init__(self) -> None:
        folder, env = Path(tempfile.mkdtemp(prefix="mlserver-")), environment("mlserver")
        _answer([str(env / "bin" / "python"), "-c", _TRAIN], folder)
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        settings = _OWN_PYTHON | {
            "MLSERVER_HOST": "127.0.0.1",
            "MLSERVER_HTTP_PORT": str(port),
            "MLSERVER_GRPC_PORT": str(free_port()),
            "MLSERVER_METRICS_PORT": str(free_port()),
            "MLSERVER_PARALLEL_WORKERS": "0",  # one process: what is tested is what it says, not how fast
        }
        command = [str(env / "bin" / "mlserver"), "start", str(folder)]
        ready = _when_ok(f"{self.url}/v2/health/ready")
        super().__init__(folder, ServerProcess(command, log=folder / "out", ready=ready, deadline_s=120, env=settings))


class TritonServer(Server):
    """Serve ``sums`` and ``words`` (version 3, at most 64 rows at a time) by Triton's own binary."""

    def __init__(self) -> None:
        folder, env = Path(tempfile.mkdtemp(prefix="triton-")), environment("triton")
        (folder / "serve.py").write_text(_TRITON)
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [str(env / "bin" / "python"), "serve.py", str(port), str(free_port()), str(free_port())]
        both = [_when_ok(f"{self.url}/v2/models/{name}/ready") for name in ("sums", "words")]
        super().__init__(
            folder,
            ServerProcess(
                command,
                log=folder / "out",
                ready=lambda log: all(ready(log) for ready in both),
                deadline_s=120,
                # Triton's Python backend links to the library of the interpreter that its environment was made with
                env=_OWN_PYTHON | {"LD_LIBRARY_PATH": _library_folder(env), "TMPDIR": str(folder)},
            ),
        )


def _library_folder(env: Path) -> str:
    ask = "import sysconfig; print(sysconfig.get_config_var('LIBDIR'))"
    return subprocess.check_output([str(env / "bin" / "python"), "-c", ask], text=True).strip()


class MlflowModelServer(Server):
    """Serve one model version of a registry by ``mlflow models serve``, in this environment.

    :param uri: the registry.
    :param model: ``name/version``.
    """

    def __init__(self, uri: str, model: str) -> None:
        folder = Path(tempfile.mkdtemp(prefix="mlflow-serve-"))
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", f"models:/{model}"]
        # it starts uvicorn by its bare name
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        super().__init__(
            folder,
            ServerProcess(
                [*command, "--env-manager", "local", "-h", "127.0.0.1", "-p", str(port), "-w", "1"],
                log=folder / "out",
                ready=_when_ok(f"{self.url}/ping"),
                deadline_s=180,
                env={"MLFLOW_TRACKING_URI": uri, "PATH": path},
            ),
        )


@contextmanager
def start_all(starts: Mapping[str, Callable[[], Server]]) -> Iterator[dict[str, Server]]:
    """Start servers at the same time and end them with the block."""
    # The threads live as long as the servers: the kernel ends a server with the thread that started it.
    with ThreadPoolExecutor(len(starts)) as pool:
        starting = {name: pool.submit(start) for name, start in starts.items()}
        try:
            yield {name: started.result() for name, started in starting.items()}
        finally:
            for started in starting.values():
                if started.exception() is None:
                    started.result().close()


def environment(name: str) -> Path:
    """Return the folder of a server's environment; it is made the first time."""
    return Path(_answer(["bash", str(_TOOL), name, sys.executable], Path.cwd()).split()[-1])


def _when_ok(url: str) -> Callable[[str], bool]:
    def ready(log: str) -> bool:
        try:
            with urllib.request.urlopen(url, timeout=2) as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError):
            return False

    return ready


def _answer(command: list[str], folder: Path) -> str:
    if shutil.which(command[0]) is None:
        raise ServerFailedError(f"{command[0]} is not installed")
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, check=False, cwd=folder, env=os.environ | _OWN_PYTHON
    )
    if done.returncode != 0:
        raise ServerFailedError(f"{' '.join(command)[:200]} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout
