"""File systems as fsspec opens them, made fit for tasks: an answer comes in time, a listing is never old.

Invariants: what a file system raises becomes one of our errors, by whether another try may pass; no message carries an
option (a key, a token).
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import fsspec

from airflow_ai_provider.errors import (
    AiProviderError,
    ConnectionConfigError,
    MissingExtraError,
    SourceUnavailableError,
    SpecError,
)

TIMEOUT_S = 15.0
_LOCAL = ("file", "local")
_S3 = ("s3", "s3a")
_TRIES = 2  # of ours, each of two of the client's: a store that hangs is given up after four times the timeout
_SLOWEST = 64 * 1024  # bytes a second: an upload below it counts as one that hangs
_WHOLE = frozenset({*_S3, "gs", "gcs", "abfs", "abfss", "az", "memory"})
_NO_KEYS = ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError")  # botocore's, google.auth's


def open_file_system(uri: str, options: Mapping[str, Any] | None = None) -> tuple[Any, str]:
    """Open the file system of a URI; nothing is contacted yet.

    :param uri: a local path or any URI that fsspec opens.
    :param options: its keyword arguments, and ``timeout_s``: how long one request may stay without an answer (S3).
    :return: the file system, and the URI's path in it.
    :raises MissingExtraError: when the library behind the URI is not installed; a retry does not help.
    :raises SpecError: when nothing opens such a URI; a retry does not help.
    """
    protocol = fsspec.core.split_protocol(uri)[0] or "file"
    given = dict(options or {})
    timeout_s = given.pop("timeout_s", None) or TIMEOUT_S
    if protocol not in _LOCAL:
        # a listing that an earlier task of this process made would hide the files that came since
        given.setdefault("use_listings_cache", False)
    if protocol in _S3:
        times = {"connect_timeout": min(5.0, timeout_s), "read_timeout": timeout_s}
        retries = {"mode": "standard", "max_attempts": 2}
        given["config_kwargs"] = {**times, "retries": retries, **given.get("config_kwargs", {})}
    try:
        files, path = fsspec.core.url_to_fs(uri, **given)
    except ImportError as error:
        extra = "pip install 'airflow-ai-provider[s3]'" if protocol in _S3 else f"install its library ({error})"
        raise MissingExtraError(f"{uri}: nothing here opens {protocol}:// yet. Next: {extra}.") from error
    except ValueError as error:
        raise SpecError(
            f"{uri} cannot be opened: {error}. Use a local path, s3://bucket/folder, or another URI that fsspec opens.",
            faults=[("uri", str(error))],
        ) from error
    if protocol in _S3:
        files.retries = _TRIES
    return files, str(path).rstrip("/")


def is_local(files: Any) -> bool:
    """True when the file system is this machine's own."""
    return bool(_names(files) & set(_LOCAL))


def writes_whole(files: Any) -> bool:
    """True when a file appears under its name only when all its bytes are there, so that none need be written aside."""
    return bool(_names(files) & _WHOLE)


def put(files: Any, path: str, data: bytes) -> None:
    """Write a file in one go, within a deadline of its own.

    S3's client sends a body after "Expect: 100-continue", and waits for that answer without any limit.
    """
    timeout_s = getattr(files, "config_kwargs", {}).get("read_timeout", TIMEOUT_S)
    limit = {"timeout": 4 * timeout_s + len(data) / _SLOWEST} if files.async_impl else {}
    files.pipe_file(path, data, **limit)


@contextmanager
def asking(files: Any, what: str, **facts: Any) -> Iterator[None]:
    """Turn what a file system raises into our errors; ``FileNotFoundError`` stays as it is.

    :param what: what was asked and did not happen: "the store at s3://… did not give …".
    :param facts: of the error.
    :raises ConnectionConfigError: when the file system refuses: wrong key, no right; a retry does not help.
    :raises SourceUnavailableError: when it does not answer, breaks off, is full; a retry may help.
    """
    try:
        yield
    except (FileNotFoundError, AiProviderError):
        raise
    except Exception as error:  # each library behind fsspec has errors of its own; all come from the one call inside
        refused = isinstance(error, PermissionError) or type(error).__name__ in _NO_KEYS
        if refused and not is_local(files):
            raise ConnectionConfigError(
                f"{what}: access is refused ({_brief(error)}). Check the access key, its secret and its rights in the "
                "Airflow connection that opens it (a source's fs_conn_id, a store's ai_store); where there is none, "
                "those that this worker has from its environment.",
                **facts,
            ) from error
        raise SourceUnavailableError(
            f"{what}: {_brief(error)}. Check that it is reachable, may be used and has room; the retry does it again.",
            **facts,
        ) from error


class OpenFile(io.RawIOBase):
    """A file of a file system, read from front to back or anywhere, that fails with our errors.

    :param files: the file system.
    :param file: what it opened.
    :param what: as for :func:`asking`.
    """

    def __init__(self, files: Any, file: Any, what: str, **facts: Any) -> None:
        self._files, self._file, self._what, self._facts = files, file, what, facts

    def read(self, size: int = -1) -> bytes:
        with asking(self._files, self._what, **self._facts):
            return bytes(self._file.read(size))

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with asking(self._files, self._what, **self._facts):
            return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _names(files: Any) -> set[str]:
    protocol = files.protocol
    return {protocol} if isinstance(protocol, str) else set(protocol)


def _brief(error: Exception) -> str:
    text = str(error).partition("\n")[0][:300]
    return text or type(error).__name__
