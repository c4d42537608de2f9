"""The device that was asked for, and the one that the session says."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from airflow_ai_provider.core.infer.engine import open_engine, settle_device, usable_cores
from airflow_ai_provider.core.infer.flow import infer
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.errors import DeviceError, SpecError
from tests.core.infer import models
from tests.core.infer.batches import land

MODELS = [models.cancer_onnx, models.digit_torch]


def has_cuda(make: object) -> bool:
    if make is models.digit_torch:
        import torch

        return torch.cuda.is_available()
    import onnxruntime

    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


@pytest.mark.parametrize("make", MODELS)
def test_a_job_that_requires_a_gpu_refuses_to_run_without_before_the_first_row(make: object, tmp_path: Path) -> None:
    pin, folder = make()  # type: ignore[operator]
    if has_cuda(make):
        with open_engine(pin, folder, "require_cuda") as engine:
            assert engine.device == "cuda"
        return
    store = Store(str(tmp_path))
    batch = land(store, [models.cancer_rows()])
    with pytest.raises(DeviceError, match="'require_cuda' was asked for and the model would run on the cpu") as caught:
        infer(batch, pin, store, open_engine(pin, folder, "require_cuda"), pipeline="p")
    assert (caught.value.asked, caught.value.found) == ("require_cuda", "cpu")
    assert not (tmp_path / "p" / "predictions").exists()


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("device", ["auto", "cuda", "cpu"])
def test_the_log_says_which_device_was_taken_and_why(
    make: object, device: str, caplog: pytest.LogCaptureFixture
) -> None:
    pin, folder = make()  # type: ignore[operator]
    with caplog.at_level(logging.INFO), open_engine(pin, folder, device) as engine:
        assert engine.device == ("cuda" if device != "cpu" and has_cuda(make) else "cpu")
    said = [record for record in caplog.records if "taken (asked for" in record.getMessage()]
    assert f"device {engine.device} taken (asked for {device}): " in said[0].getMessage()
    assert (said[0].levelno == logging.WARNING) == (device == "cuda" and engine.device == "cpu")


@pytest.mark.parametrize(
    ("asked", "found", "passes"),
    [
        ("auto", "cpu", True),
        ("auto", "cuda", True),
        ("cpu", "cpu", True),
        ("cuda", "cpu", True),
        ("require_cuda", "cuda", True),
        ("require_cuda", "cpu", False),
    ],
)
def test_only_a_requirement_refuses(asked: str, found: str, passes: bool) -> None:
    if passes:
        assert settle_device(asked, found, "because") == found
    else:
        with pytest.raises(DeviceError, match="because"):
            settle_device(asked, found, "because")


def test_a_device_that_is_none_is_refused() -> None:
    with pytest.raises(SpecError, match="'gpu' is none of auto, cpu, cuda, require_cuda"):
        open_engine(*models.cancer_onnx(), device="gpu")


def test_at_least_one_core_is_usable() -> None:
    assert usable_cores() >= 1
