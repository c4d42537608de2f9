"""A pinned model's files on this machine, proved against the pin before anything opens them.

Invariants: a folder of the cache is named by the digest of what it holds and appears whole or not at all, however many
processes fill it; every file is hashed at each fetch; mlflow is imported only when files must be downloaded.

Layout: ``<cache_dir>/<digest's hex digits>/<the artifact files as MLflow lists them>``; ``.aside-*`` is being filled.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from airflow_ai_provider.core.batch import Pin, digest_of
from airflow_ai_provider.errors import MissingExtraError, ModelPinError

log = logging.getLogger(__name__)


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


def hash_files(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file under a folder, by its path relative to it, sorted."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): _sha256(path) for path in paths}


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
    folder = Path(tempfile.mkdtemp(prefix=".aside-", dir=cache_dir))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def place(fresh: Path, folder: Path, files: Mapping[str, str]) -> None:
    """Move a filled folder to its name; when another process was first, its folder stays if it is right."""
    while True:
        try:
            # Renaming onto a folder that is not empty fails: two processes cannot mix their files.
            os.rename(fresh, folder)
            return
        except OSError:
            if not folder.is_dir():
                raise
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
