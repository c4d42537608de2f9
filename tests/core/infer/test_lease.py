"""Leases of GPUs between real processes; the devices are names, no GPU is needed for a lock."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from airflow_ai_provider.core.infer import lease
from airflow_ai_provider.core.infer.lease import VISIBLE, leased, visible_devices
from airflow_ai_provider.errors import DeviceBusyError

HOLD = """
import os, sys, time
from airflow_ai_provider.core.infer.lease import leased
with leased(sys.argv[2].split(","), sys.argv[1], owner="holder", patience_s=200, progress=lambda line: None) as device:
    print(device, os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
    if sys.argv[3] == "wait":
        sys.stdin.read()
    log = open(sys.argv[1] + "/log", "a")
    print("+" + device, file=log, flush=True)
    time.sleep(float(sys.argv[3]))
    print("-" + device, file=log, flush=True)
"""
Hold = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(autouse=True)
def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_used", {})


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Hold]:
    started: list[subprocess.Popen[str]] = []

    def start(devices: str, how: str = "wait") -> subprocess.Popen[str]:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", HOLD, str(tmp_path), devices, how]
        process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def told(process: subprocess.Popen[str]) -> list[str]:
    assert process.stdout is not None
    return process.stdout.readline().split()


def test_the_first_free_device_is_taken_and_the_only_one_seen(tmp_path: Path, hold: Hold) -> None:
    assert told(hold("0,GPU-7f")) == ["0", "0"]
    assert told(hold("0,GPU-7f")) == ["GPU-7f", "GPU-7f"]
    began, lines = time.monotonic(), []
    waiting = leased(["0", "GPU-7f"], tmp_path, owner="me", patience_s=0.7, progress=lines.append)
    busy = r"within 0.7 s: 0 by process \d+, holder; GPU-7f by process \d+, holder"
    with pytest.raises(DeviceBusyError, match=busy), waiting:
        raise AssertionError("both are taken")
    assert 0.7 <= time.monotonic() - began < 45
    assert lines and lines[0].startswith("waiting for a GPU, 0 s of 0.7 s: 0 by process")


def test_a_killed_holder_holds_nothing(tmp_path: Path, hold: Hold) -> None:
    holder = hold("0")
    assert told(holder) == ["0", "0"]
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with leased(["0"], tmp_path, owner="me", patience_s=5) as device:
        assert device == "0"


def test_who_waits_gets_it_when_it_is_free(tmp_path: Path, hold: Hold) -> None:
    holder = hold("0")
    told(holder)
    waiter = hold("0", "0")
    time.sleep(0.3)
    holder.communicate("")
    assert told(waiter) == ["0", "0"]
    assert waiter.wait(120) == 0


def test_many_tasks_on_two_devices_never_meet(tmp_path: Path, hold: Hold) -> None:
    tasks = [hold("a,b", "0.05") for _ in range(8)]
    assert [task.wait(200) for task in tasks] == [0] * 8
    holders, met = {"a": 0, "b": 0}, 0
    for line in (tmp_path / "log").read_text().split():
        holders[line[1]] += 1 if line[0] == "+" else -1
        met = max(met, *holders.values())
    assert holders == {"a": 0, "b": 0}
    assert met == 1


def test_the_environment_is_as_before_and_a_process_stays_with_its_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hold: Hold
) -> None:
    monkeypatch.setenv(VISIBLE, "2,3")
    with leased(visible_devices(), tmp_path, owner="me") as device:
        assert (device, os.environ[VISIBLE]) == ("2", "2")
    assert os.environ[VISIBLE] == "2,3"
    assert told(hold("2")) == ["2", "2"]
    with pytest.raises(DeviceBusyError, match="2 by process"), leased(["2", "3"], tmp_path, owner="me", patience_s=0.1):
        raise AssertionError("CUDA would still be on device 2")
    monkeypatch.delenv(VISIBLE)
    with pytest.raises(ZeroDivisionError), leased(["4"], tmp_path, owner="me"):
        _ = 1 / 0
    assert VISIBLE not in os.environ


@pytest.mark.parametrize(
    ("given", "devices"),
    [
        ("0,1", ["0", "1"]),
        (" GPU-1a , MIG-2b/3/0", ["GPU-1a", "MIG-2b/3/0"]),
        ("", []),
        ("-1", []),
        ("1,-1,0", ["1"]),
        ("NoDevFiles", ["NoDevFiles"]),
    ],
)
def test_which_devices_cuda_may_see(monkeypatch: pytest.MonkeyPatch, given: str, devices: list[str]) -> None:
    monkeypatch.setenv(VISIBLE, given)
    assert visible_devices() == devices
