"""How full and how busy a GPU is, for the line that tells how far a job is.

Invariants: nothing of a job depends on it; without NVIDIA's library, a driver or a GPU it says nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from airflow_ai_provider.core.infer.lease import visible_devices

log = logging.getLogger(__name__)


def open_gauge(device: str) -> Callable[[], str]:
    """Return what reads the GPU that this process uses: ``GPU 12.3 of 141.0 GB, 97 % busy``.

    NVML counts devices as the driver lists them (CUDA too, with ``CUDA_DEVICE_ORDER=PCI_BUS_ID``).

    :param device: the engine's; on any but ``cuda`` the gauge is empty.
    :return: a function that gives the text, empty when nothing can be read.
    """
    handle, nvml = _open() if device == "cuda" else (None, None)
    if handle is None or nvml is None:
        return lambda: ""

    def read() -> str:
        try:
            memory, rates = nvml.nvmlDeviceGetMemoryInfo(handle), nvml.nvmlDeviceGetUtilizationRates(handle)
        except nvml.NVMLError:  # a device that is lost, or of a kind that does not tell
            return ""
        return f"GPU {memory.used / 1e9:.1f} of {memory.total / 1e9:.1f} GB, {rates.gpu} % busy"

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
