"""Batches at a URI: files are written aside, the manifest last, and everything is read back against its digest.

Invariants: a batch exists when its ``manifest.json`` exists, and then all its bytes are there, after a power cut too
(on a local disk each file and its folder are synced before the next is written); writing the same batch again writes
the same bytes; a reader gets the bytes that the manifest names or an error.

Layout: ``<root>/<pipeline>/<kind>/<batch_id>/{manifest.json, <table>/<number>.parquet}``; a part being written lies
at ``<part>.<any>.aside`` and moves to its name when it is whole (object stores show no file before it is).
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from airflow_ai_provider.core.batch import BatchRef, Manifest, Part, canonical_json
from airflow_ai_provider.core.file_system import asking, is_local, open_file_system, put, writes_whole
from airflow_ai_provider.errors import ConnectionConfigError, CorruptBatchError, SourceUnavailableError

MANIFEST = "manifest.json"


class Store:
    """Keep batches under one URI, each whole or not there at all.

    :param root: where batches lie: a local path or any URI that fsspec opens (``file:///data/ai``, ``s3://bucket/ai``).
    :param options: keyword arguments of the file system (``endpoint_url``, ``key`` …); never written anywhere.
    """

    def __init__(self, root: str, options: Mapping[str, Any] | None = None) -> None:
        self.root = root.rstrip("/")
        self._fs, self._path = open_file_system(self.root, options)
        self._is_local = is_local(self._fs)

    def open_batch(self, pipeline: str, kind: str, batch_id: str) -> BatchWriter:
        """Start writing a batch; nothing of it exists until :meth:`BatchWriter.land`."""
        return BatchWriter(self, pipeline, kind, batch_id)

    def find(self, pipeline: str, kind: str, batch_id: str) -> BatchRef | None:
        """Return the reference of a landed batch, or None when its manifest is not there."""
        folder = f"{pipeline}/{kind}/{batch_id}"
        data = self.read_bytes(f"{folder}/{MANIFEST}")
        if data is None:
            return None
        return _ref(_manifest(data, f"{self.root}/{folder}"), f"{self.root}/{folder}", data)

    def is_whole(self, ref: BatchRef) -> bool:
        """True when every part of a batch lies there in its size: one listing, no part is opened.

        :raises SourceUnavailableError: when the store does not answer; a retry may help.
        """
        folder = f"{self._path}/{self._relative(ref.uri)}"
        with asking(self._fs, f"the store at {self.root} did not list {ref.uri}", path=ref.uri):
            found = self._fs.find(folder, detail=True)
        sizes = {name: info["size"] for name, info in found.items()}
        return all(sizes.get(f"{folder}/{part.path}") == part.byte_count for part in self.manifest(ref).parts)

    def manifest(self, ref: BatchRef) -> Manifest:
        """Open a batch's manifest.

        :raises CorruptBatchError: when it is gone or differs from the reference; a retry does not help.
        """
        data = self.read_bytes(f"{self._relative(ref.uri)}/{MANIFEST}")
        if data is None or sha256(data) != ref.digest:
            what = "is gone" if data is None else "is not the one this run wrote"
            raise CorruptBatchError(
                f"the manifest of batch {ref.batch_id} at {ref.uri} {what}. "
                "Clear the task that wrote it to write it again.",
                uri=ref.uri,
                expected=ref.digest,
            )
        return _manifest(data, ref.uri)

    def read_part(self, ref: BatchRef, part: Part, columns: list[str] | None = None) -> pa.Table:
        """Read one part, checked against its digest.

        :param columns: only these columns; None reads all.
        :return: the rows, in stored order.
        :raises CorruptBatchError: when bytes are missing or changed; a retry does not help.
        """
        data = self.read_bytes(f"{self._relative(ref.uri)}/{part.path}")
        if data is None or sha256(data) != part.digest:
            gone = "is gone. Clear", "has other bytes than its manifest says. Remove it, then clear"
            raise CorruptBatchError(
                f"{part.path} of batch {ref.batch_id} at {ref.uri} {gone[data is not None]} the task that wrote it to "
                "write it again.",
                uri=ref.uri,
                path=part.path,
            )
        # not read_table, which imports pandas: half a second and more for each task
        return pq.ParquetFile(pa.BufferReader(data)).read(columns=columns)

    def read(self, ref: BatchRef, table: str | None = None, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """Yield the parts of a batch as tables, one part in memory at a time.

        :param table: one table of the batch; None reads those the reference names (all when it names none).
        """
        names = (table,) if table else ref.tables
        for part in self.manifest(ref).parts:
            if not names or part.table in names:
                yield self.read_part(ref, part, columns)

    def read_bytes(self, path: str) -> bytes | None:
        """Return a file under the root, or None when it is not there.

        :raises SourceUnavailableError: when the store does not answer; a retry may help.
        """
        try:
            with asking(self._fs, f"the store at {self.root} did not give {path}", path=path):
                return cast(bytes, self._fs.cat_file(f"{self._path}/{path}"))
        except FileNotFoundError:
            return None

    def write_bytes(self, path: str, data: bytes) -> None:
        """Write a file under the root, so that it is whole or not there.

        :raises SourceUnavailableError: when the store does not take it (down, full); a retry may help.
        :raises ConnectionConfigError: when it refuses, or its bucket is not there; a retry does not help.
        """
        what = f"the store at {self.root} did not take {path} ({len(data)} bytes)"
        target, whole = f"{self._path}/{path}", writes_whole(self._fs)
        try:
            with asking(self._fs, what, path=path):
                if whole:  # no folder is made: there is none, and making one would make the bucket of a mistyped name
                    put(self._fs, target, data)
                else:
                    self._write_aside(target, data)
        except FileNotFoundError as error:
            if whole:
                mend = "Make the bucket, or correct the uri of the store's connection."
                raise ConnectionConfigError(f"{what}: {error}. {mend}", path=path) from error
            raise SourceUnavailableError(f"{what}: {error}. The retry writes it again.", path=path) from error

    def _write_aside(self, target: str, data: bytes) -> None:
        folder = target.rpartition("/")[0]
        made = self._missing(folder)
        self._fs.makedirs(folder, exist_ok=True)
        # A name of its own: a killed task's zombie and its successor write the same part, and one of them
        # would move the other's half-written bytes into place.
        aside = f"{target}.{uuid.uuid4().hex[:12]}.aside"
        try:
            put(self._fs, aside, data)
            self._sync(aside)
            self._fs.mv(aside, target)
        except BaseException:
            with suppress(Exception):  # each try on a full disk would leave another piece there
                self._fs.rm_file(aside)
            raise
        self._sync(folder, *made)

    def _missing(self, folder: str) -> list[str]:
        """The folders whose entries a new folder on the local disk adds to."""
        if not self._is_local or Path(folder).is_dir():
            return []
        parents = Path(folder).parents
        known = next((n for n, parent in enumerate(parents) if parent.is_dir()), 0)
        return [str(parent) for parent in parents[: known + 1]]

    def _sync(self, *paths: str) -> None:
        """Put files and folder entries on the local disk for good; an object store keeps what it has confirmed."""
        for path in paths if self._is_local else ():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)

    def remove(self, path: str) -> None:
        """Remove a file, or a folder with all that is in it, under the root; what is not there is removed already.

        :raises SourceUnavailableError: when the store does not answer; a retry may help.
        """
        try:
            with asking(self._fs, f"the store at {self.root} did not remove {path}", path=path):
                self._fs.rm(f"{self._path}/{path}", recursive=True)
        except FileNotFoundError:
            return

    def create_bytes(self, path: str, data: bytes) -> bytes:
        """Write a file under the root unless one is there: of several writers the first wins.

        :return: what is there now.
        :raises SourceUnavailableError: when the store does not take it (down, full); a retry may help.
        """
        with asking(self._fs, f"the store at {self.root} did not take {path} ({len(data)} bytes)", path=path):
            try:
                self._create(f"{self._path}/{path}", data)
                return data
            except FileExistsError:
                pass
        held = self.read_bytes(path)
        return data if held is None else held

    def _create(self, target: str, data: bytes) -> None:
        if not is_local(self._fs):
            self._fs.pipe_file(target, data, mode="create")
            return
        # A link to a whole file: on a disk fsspec looks first and writes then, and others come between.
        self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)
        aside = f"{target}.{uuid.uuid4().hex[:12]}.aside"
        put(self._fs, aside, data)
        try:
            self._fs.link(aside, target)
        finally:
            self._fs.rm_file(aside)

    def _relative(self, uri: str) -> str:
        if not uri.startswith(self.root + "/"):
            raise CorruptBatchError(
                f"batch {uri} does not lie in the store at {self.root}. "
                "Use the same ai_store connection for every task of the pipeline.",
                uri=uri,
            )
        return uri[len(self.root) + 1 :]


class BatchWriter:
    """Write one batch: parts aside, the manifest last; a killed writer leaves no batch.

    Obtained from :meth:`Store.open_batch`. Parts of one table get numbers in the order of writing.
    """

    def __init__(self, store: Store, pipeline: str, kind: str, batch_id: str) -> None:
        self._store, self.kind, self.batch_id = store, kind, batch_id
        self.folder = f"{pipeline}/{kind}/{batch_id}"
        self.parts: list[Part] = []

    def write(self, table: str, rows: pa.Table, number: int | None = None, name: str = "") -> Part:
        """Store rows as one part of a table.

        :param table: which table of the batch.
        :param rows: any number of rows, zero too; written as Parquet (zstd) with fixed settings, so that the same rows
            give the same bytes.
        :param number: position of the part within its table; None takes the next one.
        :param name: the part's name instead of its number; parts of a table are in the order of their names.
        :return: the stored part, with its digest.
        """
        name = name or f"{sum(p.table == table for p in self.parts) if number is None else number:05d}"
        sink = pa.BufferOutputStream()  # a file of Python's would ask for the interpreter lock with each page
        plain = rows.combine_chunks().replace_schema_metadata(None)
        pq.write_table(plain, sink, compression="zstd", version="2.6", use_dictionary=_repeating(plain))
        data = sink.getvalue().to_pybytes()
        part = Part(f"{table}/{name}.parquet", table, rows.num_rows, len(data), sha256(data))
        self._store.write_bytes(f"{self.folder}/{part.path}", data)
        self.parts.append(part)
        return part

    def keep(self, part: Part) -> None:
        """Take over a part that an earlier, killed try has already written whole."""
        self.parts.append(part)

    def land(self, counts: Mapping[str, int], facts: Mapping[str, Any]) -> BatchRef:
        """Write the manifest: from here on the batch exists.

        :param counts: row counts; they must add up (:meth:`Manifest.check`).
        :param facts: plain JSON; no clock, nothing secret.
        :raises RowMismatchError: when the counts do not add up; nothing is landed; a retry does not help.
        """
        parts = tuple(sorted(self.parts, key=lambda p: (p.table, p.path)))
        manifest = Manifest(self.kind, self.batch_id, parts, dict(counts), dict(facts)).check()
        data = canonical_json(manifest.to_dict())
        self._store.write_bytes(f"{self.folder}/{MANIFEST}", data)
        return _ref(manifest, f"{self._store.root}/{self.folder}", data)


def _repeating(rows: pa.Table) -> list[str]:
    """Find the columns of few different texts. For others a dictionary costs a third of the writing, and space too.

    Decided by the first rows alone, and so the same for the same rows.
    """
    head = rows.slice(0, 4096)
    texts = [f.name for f in rows.schema if pa.types.is_string(f.type) or pa.types.is_binary(f.type)]
    return [name for name in texts if pc.count_distinct(head[name], mode="all").as_py() * 4 <= head.num_rows]


def _manifest(data: bytes, uri: str) -> Manifest:
    try:
        return Manifest.from_dict(json.loads(data))
    except ValueError as error:
        raise CorruptBatchError(
            f"the manifest at {uri} is no JSON: {error}. Clear the task that wrote it to write it again.", uri=uri
        ) from error


def _ref(manifest: Manifest, uri: str, data: bytes) -> BatchRef:
    return BatchRef(manifest.kind, manifest.batch_id, uri, sha256(data), dict(manifest.counts))


def sha256(data: bytes) -> str:
    """Return the SHA-256 of bytes, as manifests write it."""
    return "sha256:" + hashlib.sha256(data).hexdigest()
