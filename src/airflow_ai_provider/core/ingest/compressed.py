"""Files that are compressed as a whole (``.gz``, ``.zst``, ``.bz2``), read as what they hold.

Invariants: the digest of a file is that of its own bytes, compressed as they are, to the last one; a file that is cut
is an error, never a shorter one, and so is one that its checksum shows to be damaged (zstd files need not have one).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

import pyarrow as pa

from airflow_ai_provider.errors import SourceError

_CODECS = {"gz": "gzip", "zst": "zstd", "bz2": "bz2"}
_CHUNK = 1024 * 1024
Seen = Callable[[bytes], Any]


def suffix_of(path: str) -> str:
    """Return what a file's name ends in, the compression left out: ``csv`` of ``a.csv.gz``."""
    stem, _, suffix = path.lower().rpartition(".")
    return stem.rpartition(".")[2] if suffix in _CODECS else suffix


@contextmanager
def unpacked(file: BinaryIO, path: str, seen: Seen) -> Iterator[tuple[BinaryIO, Seen]]:
    """Open what a file holds.

    :param seen: is fed the file's own bytes.
    :return: the file to read, and what to feed with the bytes that are read from it.
    :raises SourceError: when a compressed file is cut or damaged; a retry does not help.
    """
    codec = _CODECS.get(path.lower().rpartition(".")[2])
    if codec is None:
        yield file, seen
        return
    packed = _Watched(file, seen)
    inner = pa.CompressedInputStream(pa.PythonFile(packed, mode="r"), codec)
    yield cast(BinaryIO, _Unpacked(inner, path, codec)), lambda chunk: None
    while packed.read(_CHUNK):  # nothing may stand behind what was unpacked, unseen
        pass


class _Watched(io.RawIOBase):
    """A file whose bytes are shown to somebody as they are read."""

    def __init__(self, file: BinaryIO, seen: Seen) -> None:
        self._file, self._seen = file, seen

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._seen(data)
        return data

    def readable(self) -> bool:
        return True


class _Unpacked:
    """What a compressed file holds, front to back."""

    def __init__(self, stream: Any, path: str, codec: str) -> None:
        self._stream, self._path, self._codec = stream, path, codec

    def read(self, size: int = -1) -> bytes:
        try:
            return bytes(self._stream.read(size if size >= 0 else None))
        except (OSError, pa.ArrowException) as error:
            raise SourceError(
                f"{self._path} is no whole {self._codec} file: {error}. Nothing was landed. Put a whole file in its "
                "place under a new name, and take this one away.",
                path=self._path,
            ) from error
