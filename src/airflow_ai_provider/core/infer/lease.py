"""One GPU, one task: which of a machine's GPUs this process may use, held by a lock that dies with the process.

Invariants: two processes that name the same folder never hold the same device; a killed holder holds nothing (the
kernel frees its ``flock``); CUDA sees the leased device only; without a GPU nothing is locked and nothing waits.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from airflow_ai_provider.errors import DeviceBusyError

VISIBLE = "CUDA_VISIBLE_DEVICES"
log = logging.getLogger(__name__)
_EVERY_S, _TELL_EVERY_S = 0.5, 30.0
_used: dict[int, str] = {}  # process → the device that it leased first


def visible_devices() -> list[str]:
    """Name the GPUs that this process may use: those of ``CUDA_VISIBLE_DEVICES``, else all that the driver shows.

    :return: names as CUDA takes them: an index, ``GPU-…`` or ``MIG-…``; empty when there is none.
    """
    given = os.environ.get(VISIBLE)
    if given is None:
        return [str(index) for index in range(len(list(Path("/proc/driver/nvidia/gpus").glob("*"))))]
    names: list[str] = []
    for name in (part.strip() for part in given.split(",")):
        if not name or name.startswith("-"):  # CUDA's own rule: what follows an invalid one is not visible
            break
        names.append(name)
    return names


@contextmanager
def leased(
    devices: Sequence[str],
    folder: str | Path,
    *,
    owner: str,
    patience_s: float = 3600.0,
    progress: Callable[[str], None] = log.info,
) -> Iterator[str]:
    """Hold the first free device of a machine for this process, and let CUDA see no other.

    :param devices: the devices to choose from, at least one; the first free one is taken.
    :param folder: of the locks; the same for everybody who may use these devices.
    :param owner: who holds it, for those who wait: a task and its run.
    :param patience_s: how long to wait when all are taken.
    :param progress: takes a line about every half minute of waiting.
    :return: the device's name. ``CUDA_VISIBLE_DEVICES`` is set to it meanwhile, which counts for a process that has not
        used CUDA yet.
    :raises DeviceBusyError: all of them stayed taken; a retry may help.
    """
    # CUDA looks at its variable once in a process: whoever has used one device cannot change to another.
    chosen = [device for device in devices if device == _used.get(os.getpid())] or devices
    device, lock = _wait(chosen, _made(folder), owner, patience_s, progress)
    _used[os.getpid()] = device
    before = os.environ.get(VISIBLE)
    os.environ[VISIBLE] = device
    try:
        yield device
    finally:
        if before is None:
            os.environ.pop(VISIBLE, None)
        else:
            os.environ[VISIBLE] = before
        os.close(lock)


def _wait(
    devices: Sequence[str], folder: Path, owner: str, patience_s: float, progress: Callable[[str], None]
) -> tuple[str, int]:
    began = told = time.monotonic()
    while True:
        for device in devices:
            lock = _try(folder / _file_name(device), owner)
            if lock is not None:
                if time.monotonic() - began > 1:
                    progress(f"GPU {device} is free after {time.monotonic() - began:.0f} s")
                return device, lock
        waited = time.monotonic() - began
        holders = "; ".join(f"{device} by {_holder(folder / _file_name(device))}" for device in devices)
        if waited >= patience_s:
            raise DeviceBusyError(
                f"no GPU of this worker was free within {patience_s:g} s: {holders}. Give the worker fewer tasks at a "
                "time (a pool with one slot per GPU) or more patience; the retry waits again.",
                devices=list(devices),
                waited_s=waited,
            )
        if told == began or time.monotonic() - told >= _TELL_EVERY_S:
            progress(f"waiting for a GPU, {waited:.0f} s of {patience_s:g} s: {holders}")
            told = time.monotonic()
        time.sleep(min(_EVERY_S, max(0.0, patience_s - waited)))


def _try(path: Path, owner: str) -> int | None:
    """Take a device's lock, or return None when another process has it."""
    try:
        lock = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:  # only then: Linux refuses to "create" another user's file in a folder like /tmp
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        os.fchmod(lock, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    os.ftruncate(lock, 0)
    os.write(lock, f"process {os.getpid()}, {owner}"[:500].encode())
    return lock


def _holder(path: Path) -> str:
    with suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace") or "another process"
    return "another process"


def _made(folder: str | Path) -> Path:
    """Make the folder, for workers of every user: who may use a device may lock it."""
    made = Path(folder)
    with suppress(FileExistsError):
        made.mkdir(parents=True)
        with suppress(PermissionError):
            made.chmod(0o1777)
    return made


def _file_name(device: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in device) + ".lock"
