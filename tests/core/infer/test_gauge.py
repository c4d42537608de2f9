"""The GPU in the progress line: shown when it can be read, never in the way when it cannot."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

from airflow_ai_provider.core.infer.gauge import GpuLoad, open_gauge
from airflow_ai_provider.core.infer.progress import Progress


class NVMLError(Exception):
    """As NVIDIA's library has it."""


def library(*, is_lost: bool = False, has_driver: bool = True) -> tuple[ModuleType, list[object]]:
    """NVIDIA's library over a GPU that this machine has not; with it the devices that were asked for."""
    asked: list[object] = []

    def init() -> None:
        if not has_driver:
            raise NVMLError("driver not loaded")

    def memory(handle: object) -> SimpleNamespace:
        if is_lost:
            raise NVMLError("GPU is lost")
        return SimpleNamespace(used=12_300_000_000, total=141_000_000_000)

    made = ModuleType("pynvml")
    made.__dict__.update(
        NVMLError=NVMLError,
        nvmlInit=init,
        nvmlDeviceGetHandleByUUID=lambda name: asked.append(name) or name,
        nvmlDeviceGetMemoryInfo=memory,
        nvmlDeviceGetUtilizationRates=lambda handle: SimpleNamespace(gpu=97),
    )
    made.__dict__["nvmlDeviceGetHandleByIndex"] = lambda index: asked.append(index) or "handle"
    return made, asked


@pytest.mark.parametrize(("visible", "expected"), [("3,1", 3), ("GPU-1a2b", "GPU-1a2b")])
def test_the_gpu_that_this_process_uses_is_read(
    monkeypatch: pytest.MonkeyPatch, visible: str, expected: object
) -> None:
    made, asked = library()
    monkeypatch.setitem(sys.modules, "pynvml", made)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert open_gauge("cuda")() == GpuLoad(12_300_000_000, 141_000_000_000, 97)
    assert str(open_gauge("cuda")()) == "GPU 12.3 of 141.0 GB, 97 % busy"
    assert asked == [expected] * 2
    assert open_gauge("cpu")() is None and len(asked) == 2


def test_what_cannot_be_read_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    for made in (library(is_lost=True)[0], library(has_driver=False)[0], None):
        monkeypatch.setitem(sys.modules, "pynvml", made)
        assert open_gauge("cuda")() is None


def test_the_real_library_without_a_gpu_says_nothing_or_a_gpus_figures() -> None:
    load = open_gauge("cuda")()
    assert load is None or 0 < load.used_bytes <= load.total_bytes


def test_the_line_ends_with_it() -> None:
    lines: list[str] = []
    clock = iter([0.0, 6.0, 10.0])
    numbers: list[tuple[str, float]] = []
    told = Progress(
        lines.append,
        100,
        now=lambda: next(clock),
        gauge=lambda: GpuLoad(1_000_000_000, 2_000_000_000, 5),
        measured=lambda name, value: numbers.append((name, value)),
    )
    told.advance(50)
    told.finish(0, "torch, cuda")
    assert [line.rpartition("; ")[2] for line in lines] == ["GPU 1.0 of 2.0 GB, 5 % busy"] * 2
    load = [("gpu_used_bytes", 1_000_000_000), ("gpu_busy_percent", 5)]
    assert numbers == [("rows_per_s", pytest.approx(50 / 6)), *load, ("rows_per_s", 5.0), *load]
