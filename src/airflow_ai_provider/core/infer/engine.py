"""A loaded model on a device: what every engine does, and how a pinned model is opened.

Invariants: an engine gives back the rows it got, same order, each with a prediction or a reason; what device it runs on
is asked of the session itself, before the first row; onnxruntime and torch are imported only when one is opened.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from airflow_ai_provider.core.batch import Pin
from airflow_ai_provider.core.infer.tuning import AS_IT_IS, Tuning, demand
from airflow_ai_provider.errors import DeviceError, MissingExtraError, ModelPinError, ModelTrustError, SpecError

if TYPE_CHECKING:
    import pyarrow as pa

    from airflow_ai_provider.core.infer.inputs import Each

DEVICES = ("auto", "cpu", "cuda", "require_cuda")
_EXTRAS = {"pyfunc": "mlflow"}
log = logging.getLogger(__name__)


class Engine(Protocol):
    """Predict rows with one loaded model.

    Attributes: ``name`` of the engine; ``device`` it really runs on (``cpu`` or ``cuda``); ``batch_size``, the rows
    (of sequences the tokens) per call of the model when nobody knows better; ``tunable``, whether another number may be
    tried; ``workers``, how many calls of :meth:`predict` may run at once; ``row_bytes``, memory that one row needs as
    the model's input; ``steady``, true when a row's prediction has the same bits whatever the batch size; ``traits``,
    what else its bits depend on, as plain JSON (``padding`` of rows of different lengths, ``precision`` …).
    """

    name: str
    device: str
    batch_size: int
    workers: int
    row_bytes: int
    steady: bool
    tunable: bool
    traits: Mapping[str, Any]

    def needs(self, schema: pa.Schema) -> Sequence[str]:
        """Return the columns that :meth:`predict` reads, or raise SignatureError when the rows do not fit."""

    def warm_up(self, batch_size: int) -> None:
        """Make one call of the size that calls will have, where the first one takes longer than the others.

        :raises MemoryError: it did not fit into memory; the caller tries again with a smaller ``batch_size``.
        """

    def predict(self, rows: pa.Table, batch_size: int, each: Each = map) -> pa.Table:
        """Return one line per row, in the rows' order.

        :param rows: any number of rows with ``_row_id`` and the columns of :meth:`needs`.
        :param batch_size: rows per call of the model; an engine that is not steady fills the last call up to it.
        :param each: makes the model's calls, several at once where it can; an engine whose ``traits`` have ``padding``
            leaves them to it.
        :return: ``_row_id`` as given; ``prediction``; ``score`` (float64: probability of the predicted class,
            uncalibrated; null for a number); ``probabilities`` (list of float32, or null); ``error`` (text, null when
            the row was predicted: then the three others are null).
        :raises MemoryError: a call did not fit into memory; the caller tries again with a smaller ``batch_size``.
        """

    def close(self) -> None:
        """Free the model."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *failure: object) -> None: ...


def open_engine(
    pin: Pin, folder: str | Path, device: str = "auto", tuning: Tuning = AS_IT_IS, builds: Path | None = None
) -> Engine:
    """Load a pinned model on a device.

    :param pin: what the run resolved.
    :param folder: the pin's files, already proved (:func:`~airflow_ai_provider.core.infer.cache.fetch`).
    :param device: ``auto`` and ``cuda`` take a GPU when there is one (``cuda`` warns when not), ``cpu`` does not,
        ``require_cuda`` refuses to run without.
    :param tuning: how the model is made faster.
    :param builds: folder where compiled models are kept for the next time; None compiles anew each time.
    :raises DeviceError: the session does not run on the required device, or cannot be compiled for it; no retry helps.
    :raises SpecError: no such device, or a tuning that this kind of model cannot have; no retry helps.
    :raises SignatureError: the model does not take what its signature says; no retry helps.
    """
    if device not in DEVICES:
        raise SpecError(
            f"device {device!r} is none of {', '.join(DEVICES)}.", faults=[("device", f"{device!r} is not a device")]
        )
    engine: Engine
    try:
        if pin.flavor == "onnx":
            from airflow_ai_provider.core.infer.onnx import OnnxEngine

            engine = OnnxEngine(pin, model_file(pin, Path(folder)), device, tuning, builds)
        elif pin.flavor == "torch":
            from airflow_ai_provider.core.infer.torch import TorchEngine

            engine = TorchEngine(pin, model_file(pin, Path(folder)), device, tuning, builds)
        elif pin.flavor == "pyfunc":
            from airflow_ai_provider.core.infer.pyfunc import PyfuncEngine

            own_code = "its own Python code runs it. Export it to ONNX or torch, or leave this out."
            demand(tuning.precision is None, "precision", own_code)
            demand(not tuning.compile, "compile", own_code)
            engine = PyfuncEngine(pin, Path(folder), device)
        else:
            raise _unopened(pin)
    except ImportError as error:
        raise MissingExtraError(
            f"model {pin.name} needs what is not installed here ({error}). "
            f"Run: pip install 'airflow-ai-provider[{_EXTRAS.get(pin.flavor, pin.flavor)}]'",
            extra=_EXTRAS.get(pin.flavor, pin.flavor),
        ) from error
    return engine


def settle_device(asked: str, found: str, why: str) -> str:
    """Hold the device that a session runs on against the one asked for.

    :param asked: one of :data:`DEVICES`.
    :param found: ``cpu`` or ``cuda``, as the session itself says.
    :param why: what was found, for the log and the message.
    :raises DeviceError: ``require_cuda`` and it is not; no retry helps.
    """
    if asked == "require_cuda" and found != "cuda":
        raise DeviceError(
            f"device 'require_cuda' was asked for and the model would run on the {found}: {why}. No row was predicted. "
            "Run the task on a worker with a GPU and its libraries, or ask for 'auto'.",
            asked=asked,
            found=found,
        )
    level = logging.WARNING if asked == "cuda" and found != "cuda" else logging.INFO
    log.log(level, "device %s taken (asked for %s): %s", found, asked, why)
    return found


def usable_cores() -> int:
    """Return how many cores this process may use: its affinity, cut by the container's share."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return cores if quota == "max" else max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):
        return cores


def _unopened(pin: Pin) -> ModelPinError:
    if pin.flavor == "served":
        return ModelTrustError(
            f"model {pin.name} version {pin.version} was pinned to be predicted with on a model server, and is not "
            "opened here. Give the infer task its endpoint, or pin without served=True and with allow_pickle="
            f"[{pin.name!r}].",
            flavor=pin.flavor,
        )
    return ModelPinError(f"no engine opens flavor {pin.flavor!r}; there are onnx, torch and pyfunc.", flavor=pin.flavor)


def model_file(pin: Pin, folder: Path) -> Path:
    """Return the one file of a pinned model that an engine opens.

    :raises ModelPinError: when there is none; no retry helps.
    """
    suffixes = {"onnx": (".onnx",), "torch": (".pt2", "model.pth", ".torchscript")}.get(pin.flavor, ())
    found = [path for path in sorted(pin.files) if suffixes and path.endswith(suffixes)]
    if len(found) > 1 and pin.flavor == "onnx":
        import yaml  # only here: reading it costs a cold start more than finding the one file by its name

        described = yaml.safe_load((folder / "MLmodel").read_text(encoding="utf-8"))
        data = described["flavors"]["onnx"]["data"]
        found = [path for path in found if path == data or path.startswith(f"{data}/")] or found
    if not found:
        raise ModelPinError(
            f"model {pin.name} version {pin.version} of flavor {pin.flavor!r} holds no model file; it holds "
            f"{', '.join(sorted(pin.files))}. Register it again through mlflow's log_model.",
            files=sorted(pin.files),
        )
    return folder / found[0]
