"""The GPU in the progress line: shown when it can be read, never in the way when it cannot."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

from airflow_ai_provider.core.infer.gauge import open_gauge
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
    assert open_gauge("cuda")() == "GPU 12.3 of 141.0 GB, 97 % busy"
    assert asked == [expected]
    assert open_gauge("cpu")() == "" and len(asked) == 1


def test_what_cannot_be_read_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    for made in (library(is_lost=True)[0], library(has_driver=False)[0], None):
        monkeypatch.setitem(sys.modules, "pynvml", made)
        assert open_gauge("cuda")() == ""


def test_the_real_library_without_a_gpu_says_nothing_or_a_gpus_figures() -> None:
    assert open_gauge("cuda")() == "" or "GB" in open_gauge("cuda")()


def test_the_line_ends_with_it() -> None:
    lines: list[str] = []
    clock = iter([0.0, 6.0, 10.0])
    told = Progress(lines.append, 100, now=lambda: next(clock), gauge=lambda: "GPU 1.0 of 2.0 GB, 5 % busy")
    told.advance(50)
    told.finish(0, "torch, cuda")
    assert [line.rpartition("; ")[2] for line in lines] == ["GPU 1.0 of 2.0 GB, 5 % busy"] * 2
