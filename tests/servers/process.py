"""One server process: started in a session of its own, ended by process group, never left behind.

Invariants: stop() leaves no member of the group alive; if this process dies without calling it, the kernel sends the
server its stop signal. A server that does not come up fails with the end of its log.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


class ServerFailedError(AssertionError):
    """A server did not start or did not end in time; the message holds the end of its log."""


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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
        """Ask the server to end; after the deadline, kill whatever is left of its group."""
        if self._process is None:
            return
        self._signal(signal.SIGCONT)
        self._signal(self.stop_signal)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(deadline_s)
        self.kill()

    def kill(self) -> None:
        """End the whole group as a power cut would: no hook runs, nothing is flushed."""
        if self._process is None:
            return
        self._signal(signal.SIGKILL)
        self._process.wait(10)
        self._process = None

    def pause(self) -> None:
        """Freeze the group: connections stay open and nobody answers."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def log_tail(self, line_count: int = 40) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-line_count:])

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None, f"{self.command[0]} is not started"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _end_with_parent(self) -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, int(self.stop_signal))


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
