"""One server process: started in a session of its own, ended with its children, never left behind.

Invariants: stop() leaves no member of the group and no child alive, children that made a session of their own included
(each of PostgreSQL's does); if this process dies without calling it, the kernel sends the server its stop signal. A
server that does not come up fails with the end of its log.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from demo.services import free_port

__all__ = ["Server", "ServerFailedError", "ServerProcess", "free_port"]
_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1
_KILLED_S = 60
"""How long the end of a killed process may take: it waits for a busy disk."""


class ServerFailedError(AssertionError):
    """A server did not start or did not end in time; the message holds the end of its log."""


class ServerProcess:
    """Run one command as a server that can be stopped, killed, paused and started again.

    :param command: the program and its arguments.
    :param log: file that takes its output; each start begins it anew.
    :param ready: asked until it answers true; gets the log's text so far.
    :param deadline_s: how long a start may take.
    :param stop_signal: what asks the server to end by itself.
    :param user: run as this user (only root may).
    :param env: added to this process's environment.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        log: Path,
        ready: Callable[[str], bool],
        deadline_s: float = 180,
        stop_signal: signal.Signals = signal.SIGTERM,
        user: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.command = list(command)
        self.log = log
        self.ready = ready
        self.deadline_s = deadline_s
        self.stop_signal = stop_signal
        self.user = user
        self.env = dict(env or {})
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the server and return when it is ready."""
        if self.running:
            return
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | self.env,
                cwd=self.log.parent,
                user=self.user,
                group=self.user,
                extra_groups=[] if self.user else None,
                start_new_session=True,
                preexec_fn=self._end_with_parent,  # noqa: PLW1509 - two system calls, no lock taken
            )
        deadline = time.monotonic() + self.deadline_s
        while not self.ready(self.log.read_text(errors="replace")):
            if not self.running or time.monotonic() > deadline:
                state = "did not get ready" if self.running else "ended at once"
                self.stop()
                raise ServerFailedError(f"{self.command[0]} {state}; its log ends:\n{self.log_tail()}")
            time.sleep(0.05)

    def stop(self, deadline_s: float = 20) -> None:
        """Ask the server to end; after the deadline, kill whatever is left of it."""
        if self._process is None:
            return
        family = _family(self._process.pid)
        self._signal(signal.SIGCONT, family)
        self._signal(self.stop_signal)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(deadline_s)
        self._kill(family)

    def kill(self) -> None:
        """End the server and its children as a power cut would: no hook runs, nothing is flushed."""
        if self._process is not None:
            self._kill(_family(self._process.pid))

    def pause(self) -> None:
        """Freeze the server and its children: connections stay open and nobody answers."""
        assert self._process is not None, f"{self.command[0]} is not started"
        self._signal(signal.SIGSTOP, _family(self._process.pid))

    def resume(self) -> None:
        assert self._process is not None, f"{self.command[0]} is not started"
        self._signal(signal.SIGCONT, _family(self._process.pid))

    def log_tail(self, line_count: int = 40) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-line_count:])

    def _signal(self, number: signal.Signals, family: Iterable[int] = ()) -> None:
        assert self._process is not None, f"{self.command[0]} is not started"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _kill(self, family: set[int]) -> None:
        assert self._process is not None
        self._signal(signal.SIGKILL, family)
        self._process.wait(_KILLED_S)
        deadline = time.monotonic() + _KILLED_S
        while left := family & _parents().keys():  # a child that lives holds what the next start needs
            if time.monotonic() > deadline:
                raise ServerFailedError(f"{self.command[0]}: processes {sorted(left)} do not end, though killed")
            time.sleep(0.01)
        self._process = None

    def _end_with_parent(self) -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, int(self.stop_signal))


def _family(pid: int) -> set[int]:
    """A process and its children, with theirs."""
    parents, found = _parents(), {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def _parents() -> dict[int, int]:
    """Each living process's parent; a dead one that nobody has taken note of holds nothing any more."""
    found: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # ended while we looked
            state, parent, *_ = stat.read_text().rpartition(")")[2].split()
            if state not in "ZX":
                found[int(stat.parent.name)] = int(parent)
    return found


class Server:
    """A server and the temporary folder it lives in; ports and data stay the same over kill() and restart()."""

    def __init__(self, folder: Path, process: ServerProcess) -> None:
        self._folder = folder
        self._process = process
        process.start()

    def kill(self) -> None:
        self._process.kill()

    def pause(self) -> None:
        self._process.pause()

    def resume(self) -> None:
        self._process.resume()

    def restart(self) -> None:
        """Start again on the same port and data, whether the server runs, is paused or was killed."""
        self._process.stop()
        self._process.start()

    def ensure_running(self) -> None:
        """Undo what a test did to the server and did not undo itself."""
        if self._process.running:
            self._process.resume()
        else:
            self._process.start()

    def log_tail(self) -> str:
        return self._process.log_tail()

    def close(self) -> None:
        self._process.stop()
        shutil.rmtree(self._folder, ignore_errors=True)
