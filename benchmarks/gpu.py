"""What the cases on a GPU share: whether there is one, and how busy it was while a run went on.

Nothing here needs Airflow: such a machine has the core alone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_DRIVER = Path("/proc/driver/nvidia/version")
_EVERY_S = 0.05


def missing() -> str:
    """Why a case on a GPU cannot be run here; empty when it can."""
    return "" if _DRIVER.exists() else "it needs a GPU, and no NVIDIA driver is loaded here. --quick tries its code."


def device() -> str:
    """What ours is asked for: a GPU wherever there is one, so that a worker without its libraries is found out."""
    return "cpu" if missing() else "require_cuda"


@contextmanager
def watched(who: str, on: str, say: Callable[[str], None] = print) -> Iterator[None]:
    """Say how full and how busy the GPU was meanwhile; nothing on a processor.

    :param on: the engine's device.
    """
    from airflow_ai_provider.core.infer.gauge import open_gauge

    read, ended, busy = open_gauge(on), threading.Event(), list[int]()
    if read() is None:
        yield
        return

    def watch() -> None:
        while not ended.wait(_EVERY_S):
            load = read()
            if load is not None:
                busy.append(load.busy_percent)

    watcher, started = threading.Thread(target=watch, daemon=True), time.perf_counter()
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
        mean = sum(busy) / max(1, len(busy))
        say(f"  {who}: {time.perf_counter() - started:.2f} s, GPU {mean:.0f} % busy on average, at its end {read()}")
