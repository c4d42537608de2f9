"""A pinned model's files on this machine, proved against the pin before anything opens them; few enough for its disk.

Invariants: a folder of the cache is named by the digest of what it holds and appears whole or not at all, however many
processes fill it; every file is hashed at each fetch; a folder in use is never removed, by no process, and a killed
process uses nothing any more; mlflow is imported only when files must be downloaded.

A folder is used by whoever has a shared lock on it, and filled or removed by whoever has it alone (``flock`` on the
folder itself: the kernel frees it with the process). Where the file system knows no such locks, nothing is removed.

Layout: ``<cache_dir>/<digest's hex digits>/<the artifact files as MLflow lists them>``; ``.aside-*`` is being filled;
``.builds/<digest's hex digits>`` is what was compiled of these files, which counts as theirs and goes with them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from airflow_ai_provider.core.batch import Pin, digest_of
from airflow_ai_provider.errors import MissingExtraError, ModelPinError

log = logging.getLogger(__name__)
_ASIDE, _BUILDS = ".aside-", ".builds"


@contextlib.contextmanager
def held(
    pin: Pin, cache_dir: str | Path, registry: str | Callable[[], str] = "", *, byte_limit: int | None = None
) -> Iterator[Path]:
    """Give the folder of a pinned model and keep it there as long as it is needed.

    :param byte_limit: files of other models are removed, least recently used first, until the cache is within it; those
        in use and the one asked for stay, whatever they measure. None sets no limit.

    The other parameters and the errors are those of :func:`fetch`.
    """
    folder, lock = fetch(pin, cache_dir, registry), None
    try:
        while not _is_there(folder, lock := _lock(folder, fcntl.LOCK_SH)):  # removed between fetch and lock
            _unlock(lock)
            folder = fetch(pin, cache_dir, registry)
        with contextlib.suppress(OSError):
            now = time.time_ns()  # the kernel's own clock for files is coarser than two uses are apart
            os.utime(folder, ns=(now, now))
        if byte_limit is not None:
            evict(cache_dir, byte_limit, keep=folder)
        yield folder
    finally:
        _unlock(lock)


def evict(cache_dir: str | Path, byte_limit: int, *, keep: Path | None = None) -> list[str]:
    """Remove folders that nobody uses, the least recently used first, until the rest is within a limit.

    What a killed process was filling is removed too.

    :param keep: stays, used or not.
    :return: the digests (without ``sha256:``) of what was removed.
    """
    folders = [entry for entry in Path(cache_dir).iterdir() if entry.is_dir()]
    for left in (entry for entry in folders if entry.name.startswith(_ASIDE)):
        _remove(left, cache_dir)
    models = [entry for entry in sorted(folders, key=_last_used) if not entry.name.startswith(".")]
    kept = {entry: _size(entry) + _size(builds_of(entry.name, cache_dir)) for entry in models}
    removed = []
    for entry in list(kept):
        if sum(kept.values()) <= byte_limit:
            break
        if entry != keep and _remove(entry, cache_dir):
            log.info("removed %s from the model cache: %d bytes, the least recently used", entry.name, kept[entry])
            del kept[entry]
            removed.append(entry.name)
    return removed


def fetch(pin: Pin, cache_dir: str | Path, registry: str | Callable[[], str] = "") -> Path:
    """Return a local folder that holds exactly the pinned bytes.

    :param pin: what the run resolved once.
    :param cache_dir: folder that this machine's workers share.
    :param registry: tracking URI, or a function that gives it, asked only when the files are not here;
        empty takes the pin's own.
    :return: folder of the model's artifact files.
    :raises ModelPinError: what the registry gives is not what was pinned, or the version is gone; no retry helps.
    :raises RegistryUnavailableError: the files are not here and the registry does not answer; a retry may help.
    """
    _demand_whole(pin)
    folder = folder_of(pin.digest, cache_dir)
    if folder.is_dir():
        wrong = differences(folder, pin.files)
        if not wrong:
            return folder
        log.warning("cached files of %s differ from the pin (%s): downloading them again", pin.name, wrong[0])
    uri = registry() if callable(registry) else registry
    with aside(cache_dir) as fresh:
        _download(pin, uri or pin.registry, fresh)
        wrong = differences(fresh, pin.files)
        if wrong:
            raise ModelPinError(
                f"model {pin.name} version {pin.version} is no longer what this run pinned ({pin.digest[:19]}…): "
                f"{'; '.join(wrong[:3])}{' …' if len(wrong) > 3 else ''}. Nothing was predicted. Somebody changed the "
                "files of a registered version: register them as a new version, then clear the pin task.",
                name=pin.name,
                version=pin.version,
                differences=wrong,
            )
        place(fresh, folder, pin.files)
    return folder


def folder_of(digest: str, cache_dir: str | Path) -> Path:
    """Return where the files with this digest lie once they are here."""
    return Path(cache_dir) / digest.removeprefix("sha256:")


def builds_of(digest: str, cache_dir: str | Path) -> Path:
    """Return where that is kept which is compiled of a model's files, for as long as they are held."""
    return Path(cache_dir) / _BUILDS / digest.removeprefix("sha256:")


def hash_files(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file under a folder, by its path relative to it, sorted; none of one that is removed
    meanwhile."""
    try:
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): _sha256(path) for path in paths}
    except FileNotFoundError:
        return {}


def differences(folder: Path, files: Mapping[str, str]) -> list[str]:
    """Say in which files a folder differs from what it should hold; empty when it is the same."""
    found = hash_files(folder)
    return (
        [f"{path} is missing" for path in sorted(files.keys() - found.keys())]
        + [f"{path} was not pinned" for path in sorted(found.keys() - files.keys())]
        + [f"{path} has other bytes" for path in sorted(files.keys() & found.keys()) if files[path] != found[path]]
    )


@contextlib.contextmanager
def aside(cache_dir: str | Path) -> Iterator[Path]:
    """Give an empty folder on the cache's own file system; what was not placed from it is removed."""
    import shutil  # here, with tempfile: a warm cache needs neither, and a cold start counts milliseconds
    import tempfile

    Path(cache_dir).mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=_ASIDE, dir=cache_dir))
    while not _is_there(folder, lock := _lock(folder, fcntl.LOCK_EX)):  # taken for a killed process's, and removed
        _unlock(lock)
        folder = Path(tempfile.mkdtemp(prefix=_ASIDE, dir=cache_dir))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _unlock(lock)


def place(fresh: Path, folder: Path, files: Mapping[str, str]) -> None:
    """Move a filled folder to its name; when another process was first, its folder stays if it is right."""
    while True:
        try:
            # Renaming onto a folder that is not empty fails: two processes cannot mix their files.
            os.rename(fresh, folder)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        # by now it may have been removed again: then this one is in nobody's way
        if not differences(folder, files):
            return
        with aside(folder.parent) as dropped, contextlib.suppress(FileNotFoundError):
            os.rename(folder, dropped / folder.name)


def _demand_whole(pin: Pin) -> None:
    if digest_of(dict(pin.files)) != pin.digest:
        raise ModelPinError(
            f"the pin of {pin.name} version {pin.version} names digest {pin.digest} but lists files with another. "
            "It was changed on its way: clear the pin task.",
            name=pin.name,
            version=pin.version,
        )


def _download(pin: Pin, registry: str, folder: Path) -> None:
    try:
        from airflow_ai_provider.core.infer.pin import download
    except ImportError as error:
        raise MissingExtraError(
            f"the files of model {pin.name} version {pin.version} are not in this machine's cache and mlflow, which "
            "downloads them, is not installed. Run: pip install 'airflow-ai-provider[mlflow]'",
            extra="mlflow",
        ) from error
    download(pin.name, pin.version, registry, folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def _lock(folder: Path, how: int) -> int | None:
    """Lock a folder; None when it cannot be: it is gone, another has it, or its file system knows no locks."""
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        fcntl.flock(lock, how)
    except OSError:
        os.close(lock)
        return None
    return lock


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def _is_there(folder: Path, lock: int | None) -> bool:
    """Tell whether a folder still is the one that was locked."""
    try:
        found = os.stat(folder)
        return lock is None or os.path.samestat(found, os.fstat(lock))
    except FileNotFoundError:
        return False


def _remove(folder: Path, cache_dir: str | Path) -> bool:
    """Remove a folder that nobody uses, and what was built of it; gone under its name before its files are."""
    import shutil
    import uuid

    lock = _lock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if lock is None:
        return False
    try:
        if not _is_there(folder, lock):
            return False
        for gone in (builds_of(folder.name, cache_dir), folder):
            dropped = Path(cache_dir) / f"{_ASIDE}{uuid.uuid4().hex}"
            with contextlib.suppress(FileNotFoundError):
                os.rename(gone, dropped)
                shutil.rmtree(dropped, ignore_errors=True)
        return True
    except OSError:
        return False
    finally:
        _unlock(lock)


def _size(folder: Path) -> int:
    with contextlib.suppress(OSError):  # removed meanwhile
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return 0


def _last_used(folder: Path) -> float:
    with contextlib.suppress(OSError):
        return folder.stat().st_mtime
    return 0.0
