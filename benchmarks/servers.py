"""Real servers that live as long as a case: started by its ``make``, ended when its folder is gone or the bench dies.

Invariants: a process of its own holds the servers, for the one that calls ``make`` ends before the first contender
starts; nothing is left behind when the bench is killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

_FOUND = "servers.json"


def start(folder: Path, *names: str, deadline_s: float = 120) -> dict[str, str]:
    """Start servers (``kafka``, ``registry``) and return name → address.

    :param folder: of the case; the servers end soon after it is removed.
    """
    command = [sys.executable, "-m", "benchmarks.servers", str(folder), str(_bench()), *names]
    with (folder / "servers.log").open("wb") as log:
        # a session of its own: the group of the process that asks may be ended before the servers
        holder = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + deadline_s
    while not (folder / _FOUND).exists():
        assert holder.poll() is None and time.monotonic() < deadline, (folder / "servers.log").read_text()
        time.sleep(0.1)
    return addresses(folder)


def addresses(folder: Path) -> dict[str, str]:
    """Return name → address of the servers of a case."""
    found: dict[str, str] = json.loads((folder / _FOUND).read_text(encoding="utf-8"))
    return found


def _bench() -> int:
    """The process that runs the case: the parent of the one that makes its input."""
    return os.getppid()


def _hold(folder: Path, bench: int, names: list[str]) -> None:
    from tests.servers.kafka import KafkaBroker
    from tests.servers.registry import SchemaRegistryServer

    with contextlib.ExitStack() as stack:
        found = {}
        if "kafka" in names:
            broker = KafkaBroker()
            stack.callback(broker.close)
            found["kafka"] = broker.bootstrap
        if "registry" in names:
            registry = SchemaRegistryServer()
            stack.callback(registry.close)
            found["registry"] = registry.url
        fresh = folder / f"{_FOUND}.new"
        fresh.write_text(json.dumps(found), encoding="utf-8")
        fresh.rename(folder / _FOUND)
        while folder.exists() and Path(f"/proc/{bench}").exists():
            time.sleep(0.5)


if __name__ == "__main__":
    _hold(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
