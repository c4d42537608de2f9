"""Files as a source: each file once per pipeline and content, wherever fsspec finds it.

Invariants: a file is taken whole and named by its path and SHA-256; what is read has the digest that was planned, or
nothing lands; files are read in the order of their paths, so the same span gives the same rows in the same order.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from airflow_ai_provider.core.batch import Slice, Span
from airflow_ai_provider.core.file_system import OpenFile, asking, is_local, open_file_system
from airflow_ai_provider.core.ingest.compressed import suffix_of, unpacked
from airflow_ai_provider.core.ingest.file_mark import mark_in_store, mark_on_disk
from airflow_ai_provider.core.ingest.file_rows import (
    CHUNK,
    RowNames,
    Seen,
    read_csv,
    read_image,
    read_jsonl,
    read_parquet,
    with_partitions,
)
from airflow_ai_provider.core.ledger import SeenFile
from airflow_ai_provider.errors import SourceError, SpecError

_SUFFIXES = {
    **dict.fromkeys(("jsonl", "ndjson"), "jsonl"),
    "csv": "csv",
    **dict.fromkeys(("parquet", "pq"), "parquet"),
    **dict.fromkeys(("png", "jpg", "jpeg", "gif", "webp", "bmp", "tif", "tiff"), "image"),
}
_READERS: dict[str, Callable[[BinaryIO, RowNames, Seen], Iterator[pa.Table]]] = {
    "jsonl": read_jsonl,
    "csv": read_csv,
    "parquet": read_parquet,
    "image": read_image,
}
_HOLDS = {"jsonl": "json", "csv": "csv"}
_MAGIC = "*?["


class FileReader:
    """Read rows from files under a folder, or that match a pattern.

    A time window is not asked for: a file is what it holds, and its time of change moves with every copy. A file whose
    path was taken with other bytes is an error, never a second helping.

    :param path: file, folder or pattern; local or any URI that fsspec opens.
    :param format: ``jsonl``, ``csv``, ``parquet``, ``image`` or ``auto``: by the suffix, which all files must share.
    :param name: of the source; None takes the folder's or file's name.
    :param key: the author's key column.
    :param storage_options: keyword arguments of the file system; never written anywhere.
    :param folder: that files are named relative to; None: the pattern's or file's own.
    :param verify: ``changed`` reads a listed file only when its file system says that it is new or has changed;
        ``always`` reads them all.
    :param now_ns: the clock that files' times of change are held against.
    """

    def __init__(
        self,
        path: str,
        format: str = "auto",
        name: str | None = None,
        *,
        key: str | None = None,
        storage_options: Mapping[str, Any] | None = None,
        folder: str | None = None,
        verify: str = "changed",
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._trusts_marks, self._now_ns = verify == "changed", now_ns
        self.seen: dict[str, SeenFile] = {}
        self._uri, self._format, self.key = path, format, key
        self._fs, self._path = open_file_system(path, storage_options)
        magic = min((self._path.find(c) for c in _MAGIC if c in self._path), default=-1)
        self._pattern = magic >= 0
        self._base = self._path[:magic].rpartition("/")[0] if self._pattern else self._path
        if folder is not None:
            self._base = str(self._fs._strip_protocol(folder)).rstrip("/")
        self.name = f"files:{name or self._base.rpartition('/')[2].partition('.')[0] or 'files'}"

    @property
    def format(self) -> str:
        """What the tables hold: ``json``, ``csv`` or ``columns``."""
        return _HOLDS.get(self._format_of(list(self._list())), "columns")

    def identity(self) -> str:
        """Return nothing: a file's digest tells it from a later one of the same name."""
        return ""

    def plan(
        self,
        position: Mapping[str, int],
        taken: Mapping[str, str],
        window: tuple[datetime, datetime] | None,
        row_limit: int | None,
    ) -> Span:
        """Take the files that were not taken yet, whole, in the order of their paths.

        :param row_limit: stop before the file that would go beyond it; the first one is always taken.
        :raises SourceError: when the folder is not there, or a file that was taken has other bytes now; a retry does
            not help.
        """
        files = self._list()
        format = self._format_of(list(files))
        slices: list[Slice] = []
        rows = 0
        for path, detail in files.items():
            file = self._look_at(path, detail, format)
            if self._is_taken(path, file.digest, taken):
                continue
            if slices and row_limit is not None and rows + file.rows > row_limit:
                break
            slices.append(Slice(path, 0, file.size, file.digest))
            rows += file.rows
        return Span(self.name, "", tuple(slices), {"rows": rows})

    def read(self, span: Span, taste: Callable[[Path, str], str | None] | None = None) -> Iterator[pa.Table]:
        """Yield the rows of the span's files.

        :param taste: says why a copy of a file, of a format, must not be read here; None: all are read.
        :raises SourceError: when a file is gone or has changed since it was planned; a retry does not help.
        """
        format = self._format_of([s.partition for s in span.slices])
        for part in span.slices:
            digest = hashlib.sha256()
            with self._open(part.partition) as file:
                fault = _tasted(file, part.partition, format, taste) if taste else None
                if fault:
                    while chunk := file.read(CHUNK):
                        digest.update(chunk)
                    yield RowNames(part.partition, part.digest).fault(0, fault, None)
                else:
                    yield from read_rows(file, part, format, digest.update)
            if f"sha256:{digest.hexdigest()}" != part.digest:
                raise SourceError(
                    f"{part.partition} in {self._uri} has changed since it was planned: SHA-256 was "
                    f"{part.digest[7:19]}…, is {digest.hexdigest()[:12]}…. Nothing was landed. Put the file back as it "
                    "was, or release the claim and give the new content a new name.",
                    path=part.partition,
                    expected=part.digest,
                )

    def commit(self, span: Span) -> None:
        """Do nothing: the ledger says which files are taken."""

    def close(self) -> None:
        """Do nothing: each file is closed after reading."""

    def _list(self) -> dict[str, Mapping[str, Any]]:
        """Path → what the file system says of that file, in the order of the paths."""
        with asking(self._fs, f"the files of {self._uri} could not be listed", path=self._uri):
            found = self._found()
        named = {name[len(self._folder) :].lstrip("/"): detail for name, detail in found.items()}
        return {p: named[p] for p in sorted(named) if not any(step.startswith((".", "_")) for step in p.split("/"))}

    def _found(self) -> dict[str, Mapping[str, Any]]:
        if self._pattern:
            details = self._fs.glob(self._path, detail=True)
            if not details:
                self._demand_bucket()
            return {name: detail for name, detail in details.items() if detail["type"] != "directory"}
        if self._is_file:
            return {self._path: self._fs.info(self._path)}
        return dict(self._fs.find(self._path, detail=True))

    def _demand_bucket(self) -> None:
        """An object store has no folders, so a pattern may match nothing; in a bucket that is not there it cannot."""
        bucket = self._path.partition("/")[0]
        if not bucket or is_local(self._fs):
            return
        try:
            self._fs.ls(bucket)
        except FileNotFoundError as error:
            raise SourceError(
                f"there is no bucket {bucket!r} for {self._uri}: {error}. Correct the path, or make the bucket.",
                path=self._uri,
            ) from error

    @cached_property
    def _is_file(self) -> bool:
        if self._pattern:
            return False
        with asking(self._fs, f"{self._uri} could not be looked up", path=self._uri):
            try:  # not isfile, which takes every failure for a no
                return bool(self._fs.info(self._path)["type"] == "file")
            except FileNotFoundError as error:
                raise SourceError(
                    f"there is no file or folder at {self._uri} ({error}). Check the path, or make the folder first.",
                    path=self._uri,
                ) from error

    @cached_property
    def _folder(self) -> str:
        """What paths are relative to."""
        return self._path.rpartition("/")[0] if self._is_file and self._base == self._path else self._base

    def _open(self, path: str) -> BinaryIO:
        what = f"{path} could not be read from {self._uri}"
        try:
            with asking(self._fs, what, path=path):
                file = self._fs.open(f"{self._folder}/{path}", "rb")
        except FileNotFoundError as error:
            raise SourceError(
                f"{path} was planned and is not in {self._uri} any more. Put it back; nothing was landed.", path=path
            ) from error
        return cast(BinaryIO, OpenFile(self._fs, file, what, path=path))

    def _format_of(self, files: list[str]) -> str:
        if self._format != "auto":
            return self._format
        found = {_SUFFIXES.get(suffix, suffix) for suffix in map(suffix_of, files)}
        if not files:
            return _SUFFIXES.get(suffix_of(self._path), "jsonl")
        if len(found) > 1 or not found <= set(_READERS):
            raise SpecError(
                f"{self._uri} holds files of {sorted(found)}; format='auto' wants one of {sorted(_READERS)} for all, "
                "by their suffix. Narrow the path with a pattern such as *.jsonl, or name the format.",
                faults=[("format", "not one format by suffix")],
            )
        return found.pop()

    def _look_at(self, path: str, detail: Mapping[str, Any], format: str) -> SeenFile:
        """What a file is: known from an earlier plan, when nothing says that it has changed since."""
        mark = ""
        if self._trusts_marks and is_local(self._fs):
            mark = mark_on_disk(f"{self._folder}/{path}", self._now_ns())
        elif self._trusts_marks:
            mark = mark_in_store(detail)
        mark = mark and f"{format} {mark}"  # what its rows are depends on that
        known = self.seen.get(path)
        if mark and known is not None and known.mark == mark:
            return known
        file = self._measure(path, format, mark)
        if mark:
            self.seen[path] = file
        return file

    def _measure(self, path: str, format: str, mark: str) -> SeenFile:
        """Read a file, for its size, digest and about how many rows it has."""
        digest, size, lines, last = hashlib.sha256(), 0, 0, b"\n"

        def note(chunk: bytes) -> None:
            nonlocal size
            digest.update(chunk)
            size += len(chunk)

        with self._open(path) as file:
            with unpacked(file, path, note) as (plain, seen):
                while chunk := plain.read(CHUNK):
                    seen(chunk)
                    lines, last = lines + chunk.count(b"\n"), chunk[-1:]
            rows = lines + (last != b"\n")
            if format == "parquet":
                rows = _parquet_rows(file)
        rows = {"image": 1, "csv": max(rows - 1, 0)}.get(format, rows)
        return SeenFile(mark, f"sha256:{digest.hexdigest()}", size, rows)

    def _is_taken(self, path: str, digest: str, taken: Mapping[str, str]) -> bool:
        if path not in taken:
            return False
        if taken[path] == digest:
            return True
        raise SourceError(
            f"{path} in {self._uri} was taken before with other bytes: SHA-256 was {taken[path][7:19]}…, is "
            f"{digest[7:19]}…. A path stands for one content: put the old file back, or give the new one a new name.",
            path=path,
            taken=taken[path],
            found=digest,
        )


def read_rows(file: BinaryIO, part: Slice, format: str, seen: Seen) -> Iterator[pa.Table]:
    """Yield the rows of one file.

    :param part: its path, by which it is unpacked, and its digest, by which its rows are named.
    :param seen: is fed the file's own bytes.
    """
    with unpacked(file, part.partition, seen) as (plain, see):
        for table in _READERS[format](plain, RowNames(part.partition, part.digest), see):
            yield with_partitions(table, part.partition)


def _tasted(file: BinaryIO, path: str, format: str, taste: Callable[[Path, str], str | None]) -> str | None:
    with tempfile.NamedTemporaryFile(suffix=f"-{PurePosixPath(path).name[-100:]}") as copy:
        shutil.copyfileobj(file, copy, CHUNK)
        copy.flush()
        file.seek(0)
        return taste(Path(copy.name), format)


def _parquet_rows(file: BinaryIO) -> int:
    file.seek(0)
    try:
        return max(int(pq.ParquetFile(file).metadata.num_rows), 1)
    except (pa.ArrowException, OSError, ValueError):
        return 1  # reading it gives one row at fault
