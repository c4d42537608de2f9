"""A model opened on a machine: files held, a GPU leased only while it is used, kept warm for the next batch."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

import pytest

from airflow_ai_provider.core.batch import Pin
from airflow_ai_provider.core.infer import cache, lease
from airflow_ai_provider.core.infer.worker import WarmEngines, Worker
from airflow_ai_provider.errors import DeviceBusyError, DeviceError
from tests.core.infer import models


@pytest.fixture
def pin(tmp_path: Path) -> Pin:
    pin, folder = models.cancer_onnx()
    with cache.aside(tmp_path / "models") as fresh:
        shutil.copytree(folder, fresh, dirs_exist_ok=True)
        cache.place(fresh, cache.folder_of(pin.digest, tmp_path / "models"), pin.files)
    return pin


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Worker:
    """A machine that says it has one GPU."""
    monkeypatch.setattr(lease, "_used", {})
    monkeypatch.setenv(lease.VISIBLE, "0")
    return Worker(str(tmp_path / "models"), cache_gb=0.000001, lease_dir=str(tmp_path / "gpus"), patience_s=0.2)


def is_free(path: Path) -> bool:
    lock = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return True


def test_files_are_held_while_the_engine_is_open(worker: Worker, pin: Pin) -> None:
    with worker.engine(pin, "cpu") as engine:
        assert engine.predict(models.cancer_rows(), 100).num_rows == models.cancer_rows().num_rows
        assert cache.evict(worker.cache_dir, 0) == []
        assert not Path(worker.lease_dir).exists(), "device cpu asks for no GPU"
    assert len(cache.evict(worker.cache_dir, 0)) == 1


def test_a_gpu_is_asked_for_first_and_given_back_by_an_engine_on_the_cpu(worker: Worker, pin: Pin) -> None:
    lock = Path(worker.lease_dir) / "0.lock"
    with worker.engine(pin, "auto", owner="p/infer"):
        assert lock.read_text() == f"process {os.getpid()}, p/infer"
        assert is_free(lock), "this machine's engine runs on the CPU"
        with lease.leased(["0"], worker.lease_dir, owner="another"):
            assert not is_free(lock)
            with pytest.raises(DeviceBusyError, match="0 by process .* another"), worker.engine(pin, "auto"):
                raise AssertionError("it is taken")
    with pytest.raises(DeviceError, match="require_cuda"), worker.engine(pin, "require_cuda"):
        raise AssertionError("there is none")
    assert is_free(lock), "an engine that could not be opened gives it back"


def test_one_engine_serves_many_batches_until_another_model_is_asked_for(
    worker: Worker, pin: Pin, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm = WarmEngines()
    first = warm.engine(worker, pin, "cpu")
    assert warm.engine(worker, pin, "cpu") is first
    assert cache.evict(worker.cache_dir, 0) == []
    second = warm.engine(worker, pin, "auto")
    assert second is not first
    rows = models.cancer_rows()
    assert second.predict(rows, 10).num_rows == rows.num_rows
    warm.close()
    assert len(cache.evict(worker.cache_dir, 0)) == 1, "nothing is held any more"
