"""Start, watch and stop the processes of the demo.

Invariants: every process is started in a session of its own, noted on disk with the time of its start; stopping ends
all members of these sessions, children of children included, so that none is left and no other process is touched (a
process group would not do: Airflow's tasks make groups of their own). A service that does not come up, or ends by
itself, is reported with the end of its log.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from airflow_ai_provider.errors import AiProviderError

_NOTES = "processes.json"
_given: set[int] = set()


class DemoFailedError(AiProviderError):
    """The demo cannot go on; ``log`` names the file to read, if there is one."""


@dataclass
class Service:
    """One running server.

    :param name: as the user sees it.
    :param process: the leader of its session.
    :param log: takes all its output.
    """

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def tail(self, line_count: int = 15) -> str:
        """Return the last lines of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-line_count:])


class Services:
    """Start the demo's servers and keep an eye on them.

    :param folder: the demo's state; logs go to its subfolder ``logs``, process ids to ``processes.json``.
    :param env: environment of every process, on top of this one's.
    """

    def __init__(self, folder: Path, env: Mapping[str, str]) -> None:
        self.folder = folder
        self.env = dict(env)
        self._services: dict[str, Service] = {}
        self._notes: list[dict[str, Any]] = []

    def run(self, name: str, command: Sequence[str], deadline_s: float = 180) -> str:
        """Run a command to its end and return its output.

        :raises DemoFailedError: when it fails or takes longer; its log says why.
        """
        service = self.start(name, command)
        try:
            status = service.process.wait(deadline_s)
        except subprocess.TimeoutExpired as error:
            raise self._failure(service, f"did not end within {deadline_s:.0f} s") from error
        del self._services[name]
        if status != 0:
            raise self._failure(service, f"ended with status {status}")
        return service.log.read_text(errors="replace")

    def start(self, name: str, command: Sequence[str]) -> Service:
        """Start a server; :meth:`wait` tells when it answers."""
        log = self.folder / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | self.env | {"PYTHONUNBUFFERED": "1"},
                cwd=self.folder,
                start_new_session=True,
            )
        self._services[name] = service = Service(name, process, log)
        self._notes.append({"name": name, "pid": process.pid, "started": _started(process.pid), "log": str(log)})
        notes = self.folder / (_NOTES + ".new")
        notes.write_text(json.dumps(self._notes, indent=1) + "\n")
        notes.replace(self.folder / _NOTES)
        return service

    def wait(self, name: str, ready: Callable[[Service], bool], deadline_s: float = 180) -> Service:
        """Return when the server is ready.

        :raises DemoFailedError: when it ended, or is not ready in time.
        """
        service = self._services[name]
        deadline = time.monotonic() + deadline_s
        while not ready(service):
            self.check()
            if time.monotonic() > deadline:
                raise self._failure(service, f"is not ready after {deadline_s:.0f} s")
            time.sleep(0.1)
        return service

    def check(self) -> None:
        """Return if all servers run.

        :raises DemoFailedError: naming the one that ended, with the end of its log.
        """
        for service in self._services.values():
            status = service.process.poll()
            if status is not None:
                raise self._failure(service, f"ended by itself with status {status}")

    def log_of(self, name: str) -> Path:
        """Return the file that takes a server's output."""
        return self._services[name].log

    def _failure(self, service: Service, what: str) -> DemoFailedError:
        return DemoFailedError(
            f"{service.name} {what}. Read {service.log}; it ends:\n{service.tail()}", log=str(service.log)
        )


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on now, and that was not given before.

    It is none of those that outgoing connections get, where there are others: such a connection could take it before
    its server does, or while that is restarted.
    """
    lowest, highest = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    ports = [*range(20_000, lowest), *range(highest + 1, 65_536)] or range(20_000, 65_536)
    for port in random.SystemRandom().sample(ports, len(ports)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            if port not in _given:
                _given.add(port)
                return port
    raise DemoFailedError("all ports of 127.0.0.1 are taken. Look who listens with  ss -ltn")


def stop_all(folder: Path, deadline_s: float = 8) -> int:
    """End every process of the demo that lives in this folder, politely first.

    :return: how many processes there were.
    :raises DemoFailedError: when one does not end, even when killed.
    """
    sessions = _sessions(folder)
    # First the leaders alone: they end their children and wait for them, so that none becomes an orphan.
    found = _end(signal.SIGTERM, sessions, sessions, deadline_s)
    found |= _end(signal.SIGTERM, sessions, None, deadline_s / 3)
    found |= _end(signal.SIGKILL, sessions, None, 30)  # one that waits for a busy disk ends when that answers
    left = set(_members(sessions))
    if left:
        raise DemoFailedError(
            f"processes {sorted(left)} do not end. Look at them with  ps -fp {','.join(map(str, left))}"
        )
    (folder / _NOTES).unlink(missing_ok=True)
    return len(found)


def _end(number: signal.Signals, sessions: set[int], chosen: set[int] | None, deadline_s: float) -> set[int]:
    """Signal members of these sessions, or some of them, and wait until they are gone; return all that were seen."""
    seen: set[int] = set()

    def living() -> set[int]:
        members = set(_members(sessions))
        seen.update(members)
        return members if chosen is None else members & chosen

    for pid in living():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    deadline = time.monotonic() + deadline_s
    while living() and time.monotonic() < deadline:
        time.sleep(0.05)
    return seen


def _sessions(folder: Path) -> set[int]:
    """Return the sessions that were started for this folder and may still have members."""
    notes = folder / _NOTES
    noted = json.loads(notes.read_text()) if notes.exists() else []
    # A session's number is that of its first process. The number is free again when the whole session has ended;
    # whoever has it then started later than we noted.
    return {note["pid"] for note in noted if _started(note["pid"]) in (note["started"], None)}


def _members(sessions: set[int]) -> Iterator[int]:
    """Give each living process of these sessions."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # ended while we looked
            state, *fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[2]) in sessions and state not in "ZX":
                yield int(stat.parent.name)


def _started(pid: int) -> str | None:
    """Return when a process was started, in the kernel's count since boot, with the boot's own id; None without one."""
    try:
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}/{ticks}"
