"""The door to torch: graphs of ``torch.export`` (.pt2) and TorchScript, never a pickle.

Invariants: a file is checked before torch opens it; parameters and inputs are on one device, and that is the one
reported; every call has the same number of rows, because torch's results differ in their last bits with it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import torch
from torch.export.passes import move_to_device_pass

from airflow_ai_provider.core.batch import ROW_ID, Pin
from airflow_ai_provider.core.infer import archive
from airflow_ai_provider.core.infer.apart import first_line
from airflow_ai_provider.core.infer.batching import (
    Calls,
    run_inputs,
    suggest_batch_size,
    suggest_token_budget,
    warm_up,
)
from airflow_ai_provider.core.infer.engine import settle_device, usable_cores
from airflow_ai_provider.core.infer.features import features_of
from airflow_ai_provider.core.infer.inputs import Array, Each
from airflow_ai_provider.core.infer.outcome import narrow, predictions, settle_reading
from airflow_ai_provider.core.infer.tuning import AS_IT_IS, Tuning, demand
from airflow_ai_provider.errors import DeviceError, EngineMemoryError, SignatureError

_MOST_SHAPES = 64
_PROGRAMS = "TORCHINDUCTOR_CACHE_DIR"
_kept_in: set[str] = set()
"""Folders of programs that this process, and not its environment, has named."""


class TorchEngine:
    """Predict rows with a torch graph.

    Its bytes depend on the batch size, so the batch size is part of a prediction batch's name, and the last call is
    filled up to it. (A graph exported for any number of rows takes two or more: one row is called as two.)

    :param pin: signature and metadata of the model.
    :param path: the model file, its bytes already proved.
    :param device: as :func:`~airflow_ai_provider.core.infer.engine.open_engine` takes it.
    :param tuning: ``precision`` is torch's autocast; ``compile`` its own compiler, a program per shape of the calls.
    :param builds: folder where compiled programs are kept; None: where torch puts them.
    :raises DeviceError: torch has no such device, or cannot compile for it; no retry helps.
    :raises ModelPinError: the file could run code when loaded; no retry helps.
    :raises SignatureError: the model does not take what its signature says; no retry helps.
    """

    name = "torch"
    steady = False

    def __init__(
        self, pin: Pin, path: Path, device: str, tuning: Tuning = AS_IT_IS, builds: Path | None = None
    ) -> None:
        archive.demand_safe(path, f"model {pin.name} version {pin.version}")
        has_cuda = torch.cuda.is_available()
        found = "cuda" if device != "cpu" and has_cuda else "cpu"
        why = torch.cuda.get_device_name() if found == "cuda" else f"CUDA is{'' if has_cuda else ' not'} available"
        self.device = settle_device(device, found, why)
        torch.set_num_threads(usable_cores())
        self._model, fixed = _open(path, self.device)
        self._calls = Calls(fixed, self.steady)
        # A program is compiled per width, so few of them.
        self._features = features_of(pin, [], steps=1 if tuning.compile else 4)
        self.row_bytes = self._features.row_bytes
        padding = self._features.padding
        self.traits: Mapping[str, Any] = ({"padding": padding} if padding else {}) | tuning.traits("inductor")
        # To try a size would be to compile for it.
        self.tunable = not self._calls.fixed and not tuning.compile
        suggested = suggest_token_budget(self.device) if padding else suggest_batch_size(self.row_bytes, self.device)
        self.batch_size = self._calls.fixed or suggested
        # One call uses all cores; on a GPU a second one prepares its rows meanwhile.
        self.workers = 1 if self.device == "cpu" else 2
        self._kept: list[int] | None = None
        # Settled with the model as it is: in half the digits probabilities do not add up to one.
        self._kept, self._reading = narrow(settle_reading(self._try, pin.metadata))
        self._autocast = None if tuning.precision is None else getattr(torch, tuning.precision)
        self._tuned = _compiled(self._model, path, builds) if tuning.compile else self._model
        self._lanes = threading.local()

    def needs(self, schema: pa.Schema) -> Sequence[str]:
        """Return the columns that predict reads, or raise SignatureError."""
        return self._features.needs(schema)

    def warm_up(self, batch_size: int) -> None:
        """Make one call of the size that calls will have: it compiles, and fills the caches of a GPU's libraries."""
        if self.device == "cuda" or self._tuned is not self._model:
            warm_up(self._run, self._features, batch_size, self._calls)

    def predict(self, rows: pa.Table, batch_size: int, each: Each = map) -> pa.Table:
        """Return one line per row, in the rows' order."""
        inputs = self._features.read(rows)
        outputs = run_inputs(self._run, inputs, batch_size, self._calls, lambda: self._try(0.0), each=each)
        return predictions(rows[ROW_ID], outputs, inputs.errors, self._reading)

    def close(self) -> None:
        """Free the model, and the device's memory that it held."""
        del self._model, self._tuned
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    def _run(self, arrays: list[Array]) -> list[Array]:
        with _faults(self.device), torch.autocast(self.device, self._autocast, enabled=self._autocast is not None):
            return self._forward(self._tuned, arrays)

    def _forward(self, model: Callable[..., Any], arrays: list[Array]) -> list[Array]:
        # Inside, not around the workers: the mode belongs to the thread.
        with torch.inference_mode():
            if self.device == "cpu":
                return [_to_numpy(output) for output in self._outputs(model(*map(_to_tensor, arrays)))]
            return self._forward_on_gpu(model, arrays)

    def _forward_on_gpu(self, model: Callable[..., Any], arrays: list[Array]) -> list[Array]:
        """Copy on a stream of this thread's own and compute on the one that all threads share: while a call is computed
        the next one's rows go up, and nothing is computed otherwise than without."""
        copies, computing = self._copies(), torch.cuda.current_stream()
        with torch.cuda.stream(copies):
            given = [_to_tensor(array, pinned=True).to("cuda", non_blocking=True) for array in arrays]
        computing.wait_stream(copies)
        for tensor in given:
            tensor.record_stream(computing)
        outputs = [_widened(output) for output in self._outputs(model(*given))]
        copies.wait_stream(computing)
        with torch.cuda.stream(copies):
            found = [output.to("cpu", non_blocking=True) for output in outputs]
        for output in outputs:
            output.record_stream(copies)
        copies.synchronize()
        return [output.numpy() for output in found]

    def _copies(self) -> torch.cuda.Stream:
        if not hasattr(self._lanes, "copies"):
            self._lanes.copies = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream: torch.cuda.Stream = self._lanes.copies
        return stream

    def _outputs(self, returned: Any) -> list[torch.Tensor]:
        outputs = [returned] if isinstance(returned, torch.Tensor) else list(returned)
        tensors = [output.detach() for output in outputs if isinstance(output, torch.Tensor)]
        return tensors if self._kept is None else [tensors[i] for i in self._kept]

    def _try(self, fill: float) -> list[Array]:
        sample = self._features.sample(fill, self._calls.fixed or 2)
        try:
            with _faults(self.device):
                return self._forward(self._model, sample)
        except MemoryError as error:
            raise EngineMemoryError(f"the model does not fit into memory: {error}. Free the device.") from error
        except (RuntimeError, ValueError, TypeError, AssertionError, IndexError) as error:
            raise SignatureError(
                f"the model does not take what its signature says ({[list(a.shape) for a in sample]} of "
                f"{[str(a.dtype) for a in sample]}): {str(error).splitlines()[0][:300]}. Log it again with an "
                "input_example of two rows or more and the signature of the rows that it was exported for.",
            ) from error


def _open(path: Path, device: str) -> tuple[Callable[..., Any], int]:
    """Load the graph; with it the number of rows it was exported for, 0 when any."""
    if path.suffix != ".pt2":
        load: Any = torch.jit.load
        return load(str(path), map_location=device).eval(), 0
    program = torch.export.load(str(path))
    if device != "cpu":
        program = move_to_device_pass(program, device)
    first = program.graph_signature.user_inputs[0]
    shape = next(node.meta["val"].shape for node in program.graph.nodes if node.name == first)
    # Guards are Python texts of the file that torch would execute; the sizes are checked without them too.
    return program.module(check_guards=False), shape[0] if isinstance(shape[0], int) else 0


def _keep_programs(folder: str) -> None:
    """Have torch keep what it compiles from here on in a folder, unless the environment says where."""
    if os.environ.get(_PROGRAMS, folder) in {folder, *_kept_in}:
        os.environ[_PROGRAMS] = folder
        _kept_in.add(folder)


def _compiled(model: Callable[..., Any], path: Path, builds: Path | None) -> Callable[..., Any]:
    """Return the model compiled, one program per shape of its inputs.

    A program for any shape would be made by the first one that comes, and its bits hang on the order of the rows.
    """
    exported = "only a graph of torch.export (.pt2) can be. Export it so, or leave compile out."
    demand(path.suffix == ".pt2", "compile", exported)
    if builds is not None:
        _keep_programs(str(builds / "inductor"))
    # torch loads this module when it is asked for: it doubles the cold start of those who do not compile.
    config: Any = torch._dynamo.config
    # Beyond its limit torch would go on without compiling, which rounds otherwise.
    config.recompile_limit = max(config.recompile_limit, _MOST_SHAPES)
    compiled: Callable[..., Any] = torch.compile(model, dynamic=False, fullgraph=True)
    return compiled


@contextmanager
def _faults(device: str) -> Iterator[None]:
    """Tell a full memory and a compiler that fails from a model that refuses its rows."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            if device == "cuda":
                torch.cuda.empty_cache()
            raise MemoryError(str(error).splitlines()[0][:300]) from error
        if any(kind.__name__ == "TorchDynamoException" for kind in type(error).__mro__):
            raise DeviceError(
                f"the model was to be compiled and torch cannot compile it here: {first_line(error)}. A processor "
                "needs a C++ compiler (g++) on the worker, a GPU needs Triton; or leave compile out."
            ) from error
        raise


def _to_tensor(array: Array, *, pinned: bool = False) -> torch.Tensor:
    """Copy to memory of torch's own: an array's alignment, and its strides over axes of size one, choose other kernels
    that round otherwise. From pinned pages the copy to a GPU goes on by itself."""
    given = torch.from_numpy(np.ascontiguousarray(array))
    return torch.empty(given.shape, dtype=given.dtype, pin_memory=pinned).copy_(given)


def _widened(output: torch.Tensor) -> torch.Tensor:
    """Return numbers of half the digits in a type that numpy has."""
    return output.float() if output.dtype in (torch.bfloat16, torch.float16) else output


def _to_numpy(output: torch.Tensor) -> Array:
    array: Array = _widened(output).numpy()
    return array
