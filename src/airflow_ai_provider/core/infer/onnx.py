"""The door to ONNX Runtime.

Invariants: the device is what the session itself says; on a processor (CPU) a row's prediction has the same bits
whatever the batch size (held by tests for linear, dense, convolutional and tree models); calls may run at once, each on
one thread, which for small models gives more rows per second than one call on all cores.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import onnxruntime as ort
import pyarrow as pa

from airflow_ai_provider.core.batch import ROW_ID, Pin, digest_of
from airflow_ai_provider.core.infer.batching import (
    Calls,
    run_inputs,
    suggest_batch_size,
    suggest_token_budget,
    warm_up,
)
from airflow_ai_provider.core.infer.engine import settle_device, usable_cores
from airflow_ai_provider.core.infer.features import features_of
from airflow_ai_provider.core.infer.inputs import Array, Each, InputSpec
from airflow_ai_provider.core.infer.outcome import narrow, predictions, settle_reading
from airflow_ai_provider.core.infer.tuning import AS_IT_IS, Tuning, demand
from airflow_ai_provider.errors import DeviceError, EngineMemoryError, SignatureError

_CUDA, _TENSORRT = "CUDAExecutionProvider", "TensorrtExecutionProvider"
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
    :param tuning: ``compile`` has TensorRT build the graph for this GPU, in the graph's own precision or ``float16``.
    :param builds: folder where TensorRT's builds are kept; None builds anew.
    :param bound: rows reach the device through buffers that are bound once; None does so on a GPU. The bytes are those
        of a plain call.
    :raises DeviceError: the session does not run on the required device, or not by TensorRT; no retry helps.
    :raises SignatureError: the model does not take what its signature says; no retry helps.
    """

    name = "onnx"

    def __init__(
        self,
        pin: Pin,
        path: Path,
        device: str,
        tuning: Tuning = AS_IT_IS,
        builds: Path | None = None,
        *,
        bound: bool | None = None,
    ) -> None:
        _demand_possible(tuning, device)
        self._session = _open(path, device, _tensorrt(pin, tuning, builds) if tuning.compile else None)
        self.device = _device_of(self._session, device, tuning)
        specs = [_spec(declared) for declared in self._session.get_inputs()]
        self._names = [spec.name for spec in specs]
        self.steady = self.device == "cpu"
        # Where a call is filled up for the same bits, few widths make full calls.
        self._features = features_of(pin, specs, steps=16 if self.steady else 4)
        fixed_width = self._features.padding is None
        demand(fixed_width or not tuning.compile, "compile", "lists of any length would be a build each. Leave it out.")
        first = specs[0].shape[0] if specs[0].shape else -1
        self._calls = Calls(max(0, first), self.steady)
        self.row_bytes = self._features.row_bytes
        padding = self._features.padding
        self.traits: Mapping[str, Any] = ({"padding": padding} if padding else {}) | tuning.traits("tensorrt")
        # To try a size would be to build for it.
        self.tunable = not self._calls.fixed and not tuning.compile
        suggested = suggest_token_budget(self.device) if padding else suggest_batch_size(self.row_bytes, self.device)
        self.batch_size = self._calls.fixed or suggested
        self.workers = usable_cores() if self.device == "cpu" else 2
        self._outputs = [declared.name for declared in self._session.get_outputs()]
        self._bound = False  # before it is known which outputs are read, they may be of any kind
        self._buffers = threading.local()
        # TensorRT builds for each shape that it sees: the sample is not one of them.
        self._plain = _open(path, "cpu") if tuning.compile else self._session
        kept, self._reading = narrow(settle_reading(self._try, pin.metadata))
        self._outputs = [self._outputs[position] for position in kept]
        self._bound = (self.device == "cuda" if bound is None else bound) and not _has_texts(self._session)

    def needs(self, schema: pa.Schema) -> Sequence[str]:
        """Return the columns that predict reads, or raise SignatureError."""
        return self._features.needs(schema)

    def warm_up(self, batch_size: int) -> None:
        """Make one call of the size that calls will have: a GPU's libraries choose, and TensorRT builds, by it."""
        if self.device == "cuda":
            warm_up(self._run, self._features, batch_size, self._calls)

    def predict(self, rows: pa.Table, batch_size: int, each: Each = map) -> pa.Table:
        """Return one line per row, in the rows' order."""
        inputs = self._features.read(rows)
        outputs = run_inputs(self._run, inputs, batch_size, self._calls, lambda: self._try(0.0), each=each)
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
        self._session = self._plain = None
        self._buffers = threading.local()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    def _run(self, arrays: list[Array]) -> list[Any]:
        return self._run_bound(arrays) if self._bound else self._run_plain(arrays, self._session)

    def _run_plain(self, arrays: list[Array], session: Any) -> list[Any]:
        with _faults():
            return list(session.run(self._outputs, dict(zip(self._names, arrays, strict=True)), _QUIET))

    def _run_bound(self, arrays: list[Array]) -> list[Any]:
        shapes = [(array.shape, array.dtype) for array in arrays]
        with _faults():
            if getattr(self._buffers, "shapes", None) != shapes:  # one set per thread, for the shape it has now
                self._buffers.shapes = None
                # Copies: on a processor a value is the array's own memory, and the next call would write over its rows.
                own = [np.array(array, order="C") for array in arrays]
                self._buffers.values = [ort.OrtValue.ortvalue_from_numpy(array, self.device, 0) for array in own]
                self._buffers.binding = self._session.io_binding()
                for name, value in zip(self._names, self._buffers.values, strict=True):
                    self._buffers.binding.bind_ortvalue_input(name, value)
                self._buffers.shapes = shapes
            for value, array in zip(self._buffers.values, arrays, strict=True):
                value.update_inplace(np.ascontiguousarray(array))
            # Bound anew: what the call before has left there would have to have the same shape.
            self._buffers.binding.clear_binding_outputs()
            for name in self._outputs:
                self._buffers.binding.bind_output(name, self.device, 0)
            self._session.run_with_iobinding(self._buffers.binding, _QUIET)
            return list(self._buffers.binding.copy_outputs_to_cpu())

    def _try(self, fill: float) -> list[Any]:
        sample = self._features.sample(fill, self._calls.fixed or 2)
        try:
            return self._run(sample) if self._plain is self._session else self._run_plain(sample, self._plain)
        except MemoryError as error:
            raise EngineMemoryError(f"the model does not fit into memory: {error}. Free the device.") from error
        except Exception as error:  # ONNX Runtime has a class per status code, none of them public
            raise SignatureError(
                f"the model does not take what its signature says ({[list(a.shape) for a in sample]} of "
                f"{[str(a.dtype) for a in sample]}): {str(error).splitlines()[0][:300]}. Log it again with the "
                "signature of the rows that it was exported for.",
            ) from error


def _open(path: Path, device: str, tensorrt: dict[str, Any] | None = None) -> Any:
    options = ort.SessionOptions()
    # One thread per call: the calls themselves run at once (workers), and no idle thread spins while rows are
    # being read and written.
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.use_deterministic_compute = True
    providers: list[Any] = ["CPUExecutionProvider"]
    if device != "cpu" and _CUDA in ort.get_available_providers():
        providers.insert(0, (_CUDA, _CUDA_OPTIONS))
    if tensorrt is not None:
        providers.insert(0, (_TENSORRT, tensorrt))
    return ort.InferenceSession(str(path), options, providers=providers)


def _demand_possible(tuning: Tuning, device: str) -> None:
    demand(
        tuning.precision is None or (tuning.compile and tuning.precision == "float16"),
        "precision",
        "ONNX has the precision of its graph, and TensorRT (compile) can make it float16. Leave it out, or register a "
        "smaller model with QuantizeModelOperator.",
    )
    if tuning.compile and (device == "cpu" or _TENSORRT not in ort.get_available_providers()):
        raise _not_by_tensorrt(
            f"device is {device}, and ONNX Runtime offers {', '.join(ort.get_available_providers())}"
        )


def _device_of(session: Any, asked: str, tuning: Tuning) -> str:
    """Return where a session runs, as it says itself."""
    providers = session.get_providers()
    found = "cuda" if providers[0] in (_CUDA, _TENSORRT) else "cpu"
    settle_device(asked, found, f"the session runs on {providers[0]}, {usable_cores()} usable cores")
    if tuning.compile and providers[0] != _TENSORRT:
        raise _not_by_tensorrt(f"the session runs on {', '.join(providers)}")
    return found


def _not_by_tensorrt(found: str) -> DeviceError:
    return DeviceError(
        f"the model was to be compiled, which for ONNX means TensorRT, and {found}. No row was predicted. Run the task "
        "on a worker with a GPU, onnxruntime-gpu and TensorRT's libraries, or leave compile out.",
        asked="tensorrt",
    )


def _tensorrt(pin: Pin, tuning: Tuning, builds: Path | None) -> dict[str, Any]:
    """Return TensorRT's options; it chooses kernels by timing them, so only a build that is kept has the same bits."""
    # Else it computes in ten bits what the graph has in 23.
    os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
    options: dict[str, Any] = {"trt_fp16_enable": tuning.precision == "float16"}
    if builds is not None:
        folder = builds / "tensorrt" / digest_of([pin.digest, tuning.precision, ort.__version__])[7:39]
        folder.mkdir(parents=True, exist_ok=True)
        options |= {"trt_engine_cache_enable": True, "trt_engine_cache_path": str(folder)}
        options |= {"trt_timing_cache_enable": True, "trt_timing_cache_path": str(folder)}
    return options


@contextmanager
def _faults() -> Iterator[None]:
    """Tell a full memory: ONNX Runtime has a class per status code, and none for it."""
    try:
        yield
    except Exception as error:
        if _FULL.search(str(error)):
            raise MemoryError(str(error).splitlines()[0][:300]) from error
        raise


def _has_texts(session: Any) -> bool:
    return any("string" in value.type for value in [*session.get_inputs(), *session.get_outputs()])


def _spec(declared: Any) -> InputSpec:
    if declared.type not in _TYPES:
        raise SignatureError(
            f"the model's input {declared.name} is of type {declared.type}; {', '.join(_TYPES)} are supported.",
            input=declared.name,
        )
    shape = tuple(size if isinstance(size, int) else -1 for size in declared.shape)
    return InputSpec(declared.name, np.dtype(_TYPES[declared.type]), shape)
