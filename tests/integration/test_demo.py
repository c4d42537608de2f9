"""The demo, whole: the real scheduler, the real API, a review answered, every count against the truth, nothing left."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from demo.services import free_port, stop_all

PROJECT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(600)]


def _demo(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "demo", *arguments, "--folder", str(folder)]
    env = {name: value for name, value in os.environ.items() if name != "KAFKA"} | {
        "PYTHONPATH": f"{PROJECT / 'src'}:{PROJECT}"
    }
    return subprocess.run(command, cwd=PROJECT, env=env, capture_output=True, text=True, timeout=560, check=False)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """The demo's folder and what it printed, with its servers still up."""
    folder = tmp_path_factory.mktemp("demo") / "state"
    try:
        done = _demo(folder)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
        yield folder, done.stdout
    finally:
        stop_all(folder)


@pytest.fixture(scope="module")
def summary(told: tuple[Path, str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((told[0] / "summary.json").read_text())
    return found


def test_the_summary_adds_up_and_agrees_with_the_truth(told: tuple[Path, str], summary: dict[str, Any]) -> None:
    truth = json.loads((told[0] / "truth.json").read_text())["spoiled"]
    assert set(summary) == {
        *("read", "accepted", "quarantined", "predicted", "failed", "routes", "actions", "model", "run_id", "seconds")
    }
    assert summary["quarantined"] == Counter(spoiled["kind"] for spoiled in truth)
    assert summary["read"] == 285 == summary["accepted"] + sum(summary["quarantined"].values())
    assert summary["accepted"] == summary["predicted"] + summary["failed"]
    assert set(summary["routes"]) == {"act", "review", "fallback", "hold"}
    assert summary["predicted"] == sum(summary["routes"].values())
    actions = summary["actions"]
    assert set(actions) == {"sent", "done", "refused", "unknown", "compensated"}
    assert actions["sent"] == actions["done"] + actions["refused"] + actions["unknown"] + actions["compensated"]
    assert actions["compensated"] > 0
    assert actions["unknown"] == 0
    assert set(summary["model"]) == {"name", "version", "digest"}
    assert all(seconds >= 0 for seconds in summary["seconds"].values())


def test_it_says_where_to_look_and_how_to_log_in(told: tuple[Path, str]) -> None:
    folder, said = told
    assert (folder / "confidence.png").read_bytes().startswith(b"\x89PNG")
    airflow = next(line for line in said.splitlines() if line.startswith("Airflow "))
    words = airflow.split()
    body = json.dumps({"username": words[words.index("as") + 1], "password": words[words.index("password") + 1]})
    request = urllib.request.Request(f"{words[1]}/auth/token", body.encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert answer.status == 201
    mlflow = next(line for line in said.splitlines() if line.startswith("MLflow ")).split()[1]
    with urllib.request.urlopen(mlflow, timeout=30) as answer:
        assert answer.status == 200


def test_stop_leaves_no_process_and_no_port(told: tuple[Path, str]) -> None:
    folder, said = told
    processes = [note["pid"] for note in json.loads((folder / "processes.json").read_text())]
    ports = {int(port) for port in re.findall(r"127\.0\.0\.1:(\d+)", said)}
    assert len(ports) >= 4
    stopped = _demo(folder, "stop")
    assert stopped.returncode == 0, stopped.stderr
    assert int(stopped.stdout.split()[1]) >= 6
    for port in ports:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=30)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # ended while we looked
            state, *fields = stat.read_text().rpartition(")")[2].split()
            # dead ones that init has not yet taken note of hold nothing any more
            assert int(fields[2]) not in processes or state in "ZX", stat.read_text()
    assert "Stopped 0 processes" in _demo(folder, "stop").stdout


def test_a_broker_that_is_not_there_is_told_before_anything_is_waited_for(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    done = _demo(folder, "run", "--kafka", f"127.0.0.1:{free_port()}")
    assert done.returncode == 1
    assert "no Kafka broker answers" in done.stderr
    assert "make demo KAFKA=host:port" in done.stderr
    assert stop_all(folder) == 0


def test_an_interrupted_demo_stops_everything_and_a_second_one_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    command = [sys.executable, "-m", "demo", "--folder", str(folder)]
    env = os.environ | {"PYTHONPATH": f"{PROJECT / 'src'}:{PROJECT}"}
    with (tmp_path / "out").open("w") as output:
        demo = subprocess.Popen(command, cwd=PROJECT, env=env, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 180
        while not (folder / "logs" / "mlflow.log").exists():
            assert time.monotonic() < deadline, (tmp_path / "out").read_text()
            time.sleep(0.1)
        second = _demo(folder)
        assert second.returncode == 1
        assert "A demo is running" in second.stderr
        demo.send_signal(signal.SIGINT)
        assert demo.wait(120) == 130
        assert stop_all(folder) == 0
    finally:
        demo.kill()
        demo.wait()
        stop_all(folder)
