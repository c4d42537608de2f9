"""The door to torch: graphs of ``torch.export`` (.pt2) and TorchScript, never a pickle.

Invariants: a file is checked before torch opens it; parameters and inputs are on one device, and that is the one
reported; every call has the same number of rows, because torch's results differ in their last bits with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import torch
from torch.export.passes import move_to_device_pass

from airflow_ai_provider.core.batch import ROW_ID, Pin
from airflow_ai_provider.core.infer import archive
from airflow_ai_provider.core.infer.batching import Calls, run_inputs, suggest_batch_size, suggest_token_budget
from airflow_ai_provider.core.infer.engine import settle_device, usable_cores
from airflow_ai_provider.core.infer.features import features_of
from airflow_ai_provider.core.infer.inputs import Array
from airflow_ai_provider.core.infer.outcome import narrow, predictions, settle_reading
from airflow_ai_provider.errors import EngineMemoryError, SignatureError


class TorchEngine:
    """Predict rows with a torch graph.

    Its bytes depend on the batch size, so the batch size is part of a prediction batch's name, and the last call is
    filled up to it. (A graph exported for any number of rows takes two or more: one row is called as two.)

    :param pin: signature and metadata of the model.
    :param path: the model file, its bytes already proved.
    :param device: as :func:`~airflow_ai_provider.core.infer.engine.open_engine` takes it.
    :raises DeviceError: torch has no such device; no retry helps.
    :raises ModelPinError: the file could run code when loaded; no retry helps.
    :raises SignatureError: the model does not take what its signature says; no retry helps.
    """

    name = "torch"
    steady = False

    def __init__(self, pin: Pin, path: Path, device: str) -> None:
        archive.demand_safe(path, f"model {pin.name} version {pin.version}")
        has_cuda = torch.cuda.is_available()
        found = "cuda" if device != "cpu" and has_cuda else "cpu"
        why = torch.cuda.get_device_name() if found == "cuda" else f"CUDA is{'' if has_cuda else ' not'} available"
        self.device = settle_device(device, found, why)
        torch.set_num_threads(usable_cores())
        self._model, fixed = _open(path, self.device)
        self._calls = Calls(fixed, self.steady)
        self._features = features_of(pin, [], steps=4)
        self.row_bytes = self._features.row_bytes
        padding = self._features.padding
        self.traits: Mapping[str, Any] = {"padding": padding} if padding else {}
        self.tunable = not self._calls.fixed
        suggested = suggest_token_budget(self.device) if padding else suggest_batch_size(self.row_bytes, self.device)
        self.batch_size = self._calls.fixed or suggested
        # One call uses all cores; on a GPU a second one prepares its rows meanwhile.
        self.workers = 1 if self.device == "cpu" else 2
        self._kept: list[int] | None = None
        self._kept, self._reading = narrow(settle_reading(self._try, pin.metadata))

    def needs(self, schema: pa.Schema) -> Sequence[str]:
        """Return the columns that predict reads, or raise SignatureError."""
        return self._features.needs(schema)

    def predict(self, rows: pa.Table, batch_size: int) -> pa.Table:
        """Return one line per row, in the rows' order."""
        inputs = self._features.read(rows)
        outputs = run_inputs(self._run, inputs, batch_size, self._calls, lambda: self._try(0.0))
        return predictions(rows[ROW_ID], outputs, inputs.errors, self._reading)

    def close(self) -> None:
        """Free the model, and the device's memory that it held."""
        del self._model
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    def _run(self, arrays: list[Array]) -> list[Array]:
        try:
            return self._forward(arrays)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
                if self.device == "cuda":
                    torch.cuda.empty_cache()
                raise MemoryError(str(error).splitlines()[0][:300]) from error
            raise

    def _forward(self, arrays: list[Array]) -> list[Array]:
        # Inside, not around the workers: the mode belongs to the thread.
        with torch.inference_mode():
            outputs = self._model(*(_to_tensor(array, self.device) for array in arrays))
            outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
            tensors = [output for output in outputs if isinstance(output, torch.Tensor)]
            return [_to_numpy(tensors[i]) for i in (range(len(tensors)) if self._kept is None else self._kept)]

    def _try(self, fill: float) -> list[Array]:
        sample = self._features.sample(fill, self._calls.fixed or 2)
        try:
            return self._run(sample)
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


def _to_tensor(array: Array, device: str) -> torch.Tensor:
    """Copy to memory of torch's own: an array's alignment, and its strides over axes of size one, choose other kernels
    that round otherwise."""
    given = torch.from_numpy(np.ascontiguousarray(array))
    # On pinned pages the copy to a GPU goes on while the next call is prepared; the answer's copy back waits for it.
    on_gpu = device == "cuda"
    own = torch.empty(given.shape, dtype=given.dtype, pin_memory=on_gpu).copy_(given)
    return own.to(device, non_blocking=on_gpu)


def _to_numpy(output: torch.Tensor) -> Array:
    output = output.detach().cpu()
    array: Array = (output.float() if output.dtype in (torch.bfloat16, torch.float16) else output).numpy()
    return array
