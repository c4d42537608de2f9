"""The door to ONNX Runtime.

Invariants: the device is what the session itself says; on a processor (CPU) a row's prediction has the same bits
whatever the batch size (held by tests for linear, dense, convolutional and tree models); calls may run at once, each on
one thread, which for small models gives more rows per second than one call on all cores.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import onnxruntime as ort
import pyarrow as pa

from airflow_ai_provider.core.batch import ROW_ID, Pin
from airflow_ai_provider.core.infer.batching import Calls, run_inputs, suggest_batch_size, suggest_token_budget
from airflow_ai_provider.core.infer.engine import settle_device, usable_cores
from airflow_ai_provider.core.infer.features import features_of
from airflow_ai_provider.core.infer.inputs import Array, InputSpec
from airflow_ai_provider.core.infer.outcome import narrow, predictions, settle_reading
from airflow_ai_provider.errors import EngineMemoryError, SignatureError

_CUDA = "CUDAExecutionProvider"
_TYPES = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
    "tensor(string)": np.object_,
}
_FULL = re.compile("allocate memory|bad.?alloc|out of memory|ALLOC_FAILED", re.IGNORECASE)
# Same bits at each run: without these the fastest algorithm of the moment is taken, and 10-bit mantissas.
_CUDA_OPTIONS = {"cudnn_conv_algo_search": "DEFAULT", "use_tf32": "0"}
# What fails is raised here; ONNX Runtime would also print a line per call, thousands where rows are searched for.
_QUIET = ort.RunOptions()
_QUIET.log_severity_level = 4


class OnnxEngine:
    """Predict rows with an ONNX model.

    A model that was exported with a fixed number of rows per call is always called with that number; the last call is
    filled up.

    :param pin: signature and metadata of the model.
    :param path: the model file, its bytes already proved.
    :param device: as :func:`~airflow_ai_provider.core.infer.engine.open_engine` takes it.
    :raises DeviceError: the session does not run on the required device; no retry helps.
    :raises SignatureError: the model does not take what its signature says; no retry helps.
    """

    name = "onnx"

    def __init__(self, pin: Pin, path: Path, device: str) -> None:
        self._session = _open(path, device)
        cores = usable_cores()
        found = "cuda" if self._session.get_providers()[0] == _CUDA else "cpu"
        self.device = settle_device(
            device, found, f"the session runs on {self._session.get_providers()[0]}, {cores} usable cores"
        )
        specs = [_spec(declared) for declared in self._session.get_inputs()]
        self._names = [spec.name for spec in specs]
        self.steady = self.device == "cpu"
        # Where a call is filled up for the same bits, few widths make full calls.
        self._features = features_of(pin, specs, steps=16 if self.steady else 4)
        first = specs[0].shape[0] if specs[0].shape else -1
        self._calls = Calls(max(0, first), self.steady)
        self.row_bytes = self._features.row_bytes
        padding = self._features.padding
        self.traits: Mapping[str, Any] = {"padding": padding} if padding else {}
        self.tunable = not self._calls.fixed
        suggested = suggest_token_budget(self.device) if padding else suggest_batch_size(self.row_bytes, self.device)
        self.batch_size = self._calls.fixed or suggested
        self.workers = cores if self.device == "cpu" else 2
        self._outputs = [declared.name for declared in self._session.get_outputs()]
        kept, self._reading = narrow(settle_reading(self._try, pin.metadata))
        self._outputs = [self._outputs[position] for position in kept]

    def needs(self, schema: pa.Schema) -> Sequence[str]:
        """Return the columns that predict reads, or raise SignatureError."""
        return self._features.needs(schema)

    def predict(self, rows: pa.Table, batch_size: int) -> pa.Table:
        """Return one line per row, in the rows' order."""
        inputs = self._features.read(rows)
        outputs = run_inputs(self._run, inputs, batch_size, self._calls, lambda: self._try(0.0))
        return predictions(rows[ROW_ID], outputs, inputs.errors, self._reading)

    def calls(self, rows: pa.Table, batch_size: int) -> list[dict[str, Array]]:
        """Return what the model is given for these rows, call by call, by input; to calibrate a smaller one by."""
        given: list[dict[str, Array]] = []

        def noted(arrays: list[Array]) -> list[Any]:
            given.append(dict(zip(self._names, arrays, strict=True)))
            return self._run(arrays)

        inputs = self._features.read(rows.select(self._features.needs(rows.schema)))
        run_inputs(noted, inputs, batch_size, self._calls, lambda: self._try(0.0))
        return given

    def close(self) -> None:
        """Free the model."""
        self._session = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    def _run(self, arrays: list[Array]) -> list[Any]:
        try:
            return list(self._session.run(self._outputs, dict(zip(self._names, arrays, strict=True)), _QUIET))
        except Exception as error:  # ONNX Runtime has a class per status code, and none for a full memory
            if _FULL.search(str(error)):
                raise MemoryError(str(error).splitlines()[0][:300]) from error
            raise

    def _try(self, fill: float) -> list[Any]:
        sample = self._features.sample(fill, self._calls.fixed or 2)
        try:
            return self._run(sample)
        except MemoryError as error:
            raise EngineMemoryError(f"the model does not fit into memory: {error}. Free the device.") from error
        except Exception as error:  # ONNX Runtime has a class per status code, none of them public
            raise SignatureError(
                f"the model does not take what its signature says ({[list(a.shape) for a in sample]} of "
                f"{[str(a.dtype) for a in sample]}): {str(error).splitlines()[0][:300]}. Log it again with the "
                "signature of the rows that it was exported for.",
            ) from error


def _open(path: Path, device: str) -> Any:
    options = ort.SessionOptions()
    # One thread per call: the calls themselves run at once (workers), and no idle thread spins while rows are
    # being read and written.
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.use_deterministic_compute = True
    providers: list[Any] = ["CPUExecutionProvider"]
    if device != "cpu" and _CUDA in ort.get_available_providers():
        providers.insert(0, (_CUDA, _CUDA_OPTIONS))
    return ort.InferenceSession(str(path), options, providers=providers)


def _spec(declared: Any) -> InputSpec:
    if declared.type not in _TYPES:
        raise SignatureError(
            f"the model's input {declared.name} is of type {declared.type}; {', '.join(_TYPES)} are supported.",
            input=declared.name,
        )
    shape = tuple(size if isinstance(size, int) else -1 for size in declared.shape)
    return InputSpec(declared.name, np.dtype(_TYPES[declared.type]), shape)
