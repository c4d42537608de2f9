"""How full and how busy a GPU is, for the line that tells how far a job is and for metrics.

Invariants: nothing of a job depends on it; without NVIDIA's library, a driver or a GPU it says nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from airflow_ai_provider.core.infer.lease import visible_devices

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GpuLoad:
    """What a GPU does at one moment, for all of its users together."""

    used_bytes: int
    total_bytes: int
    busy_percent: int

    def __str__(self) -> str:
        return f"GPU {self.used_bytes / 1e9:.1f} of {self.total_bytes / 1e9:.1f} GB, {self.busy_percent} % busy"


def open_gauge(device: str) -> Callable[[], GpuLoad | None]:
    """Return what reads the GPU that this process uses.

    NVML counts devices as the driver lists them (CUDA too, with ``CUDA_DEVICE_ORDER=PCI_BUS_ID``).

    :param device: the engine's; on any but ``cuda`` nothing is read.
    :return: a function that gives the load, None when nothing can be read.
    """
    handle, nvml = _open() if device == "cuda" else (None, None)
    if handle is None or nvml is None:
        return lambda: None

    def read() -> GpuLoad | None:
        try:
            memory, rates = nvml.nvmlDeviceGetMemoryInfo(handle), nvml.nvmlDeviceGetUtilizationRates(handle)
        except nvml.NVMLError:  # a device that is lost, or of a kind that does not tell
            return None
        return GpuLoad(memory.used, memory.total, rates.gpu)

    return read


def _open() -> tuple[Any, Any]:
    try:
        import pynvml
    except ImportError:
        log.debug("the GPU's memory is not shown: pip install 'airflow-ai-provider[gpu]'")
        return None, None
    try:
        pynvml.nvmlInit()
        name = next(iter(visible_devices()), "0")
        by_index = name.isdigit()
        return (
            pynvml.nvmlDeviceGetHandleByIndex(int(name)) if by_index else pynvml.nvmlDeviceGetHandleByUUID(name),
            pynvml,
        )
    except pynvml.NVMLError as error:
        log.debug("the GPU's memory is not shown: %s", error)
        return None, None
