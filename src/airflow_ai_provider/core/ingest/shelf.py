"""The files of one shard until its batch is landed: parts aside, what whole-batch rules need, and the mark at the end.

Invariants: files of different cuts of a span have different names; a shard's mark is written after its files, and is
believed only for the same rows under the same rules, while its files still have the bytes that it names; the same rows
give the same bytes.

Layout, under the batch's folder: ``accepted/`` and ``quarantine/`` hold parts; ``shards/`` holds, for each block,
``<number>.payload`` and ``<number>.evidence`` where whole-batch rules need them, ``done.json`` (the mark) and ``head``
(the batch's first rows). It is removed when the batch has landed, and with it the parts that were rewritten.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from airflow_ai_provider.core.batch import ACCEPTED, QUARANTINE, Part, canonical_json
from airflow_ai_provider.core.ingest.contract import PAYLOAD
from airflow_ai_provider.core.ingest.shard import Shard
from airflow_ai_provider.core.store import Store, sha256
from airflow_ai_provider.errors import CorruptBatchError

KIND, FOLDER = "batch", "shards"
_REWRITTEN = re.compile(r"([^/]+)\.judged\.parquet$")


@dataclass(frozen=True)
class Block:
    """The files of one block of rows.

    :param accepted: part of the accepted rows; None when there is none.
    :param quarantine: part of the rejected ones.
    :param payload: digest of the accepted rows' payloads, kept while a whole-batch rule may reject some.
    :param evidence: digest of the columns that whole-batch rules read, of every decoded row.
    """

    accepted: Part | None = None
    quarantine: Part | None = None
    payload: str = ""
    evidence: str = ""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Block:
        """Read what a mark holds."""
        parts = {name: Part(**data[name]) if data[name] else None for name in (ACCEPTED, QUARANTINE)}
        return cls(**parts, payload=data["payload"], evidence=data["evidence"])


@dataclass(frozen=True)
class Done:
    """What one shard has made.

    :param blocks: its files, in row order.
    :param counts: rows read, accepted and quarantined.
    :param reasons: code → rows quarantined under it.
    :param columns: column → type.
    :param failures: row rules broken for which the whole batch is refused.
    :param warnings: rule → rows that broke it and stay accepted.
    :param facts: what the source tells about the rows (schemas of a registry).
    """

    blocks: tuple[Block, ...]
    counts: Mapping[str, int]
    reasons: Mapping[str, int]
    columns: Mapping[str, str]
    failures: tuple[str, ...] = ()
    warnings: Mapping[str, int] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Done:
        """Read what a mark holds."""
        names = ("counts", "reasons", "columns", "warnings", "facts")
        blocks = tuple(Block.from_dict(block) for block in data["blocks"])
        return cls(blocks, failures=tuple(data["failures"]), **{name: data[name] for name in names})


class Shelf:
    """The files of one shard in its batch's folder.

    :param made_from: what they depend on (rows and rules), as plain JSON.

    ``folder`` is this shard's own, relative to the store's root: the batch's when it is not cut.
    """

    def __init__(self, store: Store, pipeline: str, batch_id: str, shard: Shard, made_from: Mapping[str, Any]) -> None:
        self._store, self._shard, self._made_from = store, shard, dict(made_from)
        self._writer = store.open_batch(pipeline, KIND, batch_id)
        self._uri = f"{store.root}/{self._writer.folder}"
        self._aside = f"{self._writer.folder}/{FOLDER}/{shard.prefix or 'whole-'}"
        self.folder = (
            f"{self._writer.folder}/{FOLDER}/{shard.prefix.rstrip('-')}" if shard.prefix else self._writer.folder
        )

    def write(self, number: int, accepted: pa.Table, rejected: pa.Table, evidence: pa.Table | None) -> Block:
        """Store one block; accepted rows go without their payload, which lies beside them."""
        payload = accepted.select([PAYLOAD]) if PAYLOAD in accepted.column_names and accepted.num_rows else None
        return Block(
            *self._parts(f"{number:05d}", accepted, rejected),
            payload=self._put(number, "payload", payload),
            evidence=self._put(number, "evidence", evidence),
        )

    def rewrite(self, number: int, accepted: pa.Table, rejected: pa.Table) -> Block:
        """Store a block from which whole-batch rules have moved rows, beside what it was before: a try that is killed
        now leaves that as the mark names it."""
        return Block(*self._parts(f"{number:05d}.judged", accepted, rejected))

    def load(self, number: int, block: Block) -> tuple[pa.Table | None, pa.Table | None]:
        """Read a block's accepted rows, with their payload where it was kept, and its quarantine rows."""
        accepted, rejected = (self._read(part) if part else None for part in (block.accepted, block.quarantine))
        if accepted is not None and block.payload:
            accepted = accepted.append_column(PAYLOAD, self._get(number, "payload", block.payload)[PAYLOAD])
        return accepted, rejected

    def evidence(self, done: Done) -> Iterator[tuple[int, pa.Table]]:
        """Yield, block by block, the columns that whole-batch rules read."""
        for number, block in enumerate(done.blocks):
            if block.evidence:
                yield number, self._get(number, "evidence", block.evidence)

    def mark(self, done: Done) -> str:
        """Say that the shard is done; returns the mark's digest."""
        data = canonical_json({**asdict(done), "made_from": self._made_from})
        self._store.write_bytes(f"{self._aside}done.json", data)
        return sha256(data)

    def find(self) -> tuple[Done, str] | None:
        """Return what an earlier try has made and its mark's digest; None when it must be made (again)."""
        data = self._store.read_bytes(f"{self._aside}done.json")
        try:
            found = json.loads(data or b"null")
            if not found or found.pop("made_from") != self._made_from:
                return None
            return Done.from_dict(found), sha256(data or b"")
        except (ValueError, KeyError, TypeError):
            return None  # a mark that cannot be read proves nothing

    def is_whole(self, done: Done) -> bool:
        """True when every file still has the bytes that the mark names."""
        return all(
            self._has(path, digest) for n, block in enumerate(done.blocks) for path, digest in self._files(n, block)
        )

    def _files(self, number: int, block: Block) -> Iterator[tuple[str, str]]:
        for part in (block.accepted, block.quarantine):
            if part:
                yield f"{self._writer.folder}/{part.path}", part.digest
        for kind, digest in (("payload", block.payload), ("evidence", block.evidence)):
            if digest:
                yield self._path(number, kind), digest

    def _has(self, path: str, digest: str) -> bool:
        data = self._store.read_bytes(path)
        return data is not None and sha256(data) == digest

    def _parts(self, name: str, accepted: pa.Table, rejected: pa.Table) -> tuple[Part | None, Part | None]:
        kept = accepted.drop_columns([PAYLOAD]) if PAYLOAD in accepted.column_names else accepted
        parts = [
            self._writer.write(table, rows, name=f"{self._shard.prefix}{name}") if rows.num_rows else None
            for table, rows in ((ACCEPTED, kept), (QUARANTINE, rejected))
        ]
        return parts[0], parts[1]

    def _put(self, number: int, kind: str, rows: pa.Table | None) -> str:
        if rows is None:
            return ""
        data = pack(rows)
        self._store.write_bytes(self._path(number, kind), data)
        return sha256(data)

    def _get(self, number: int, kind: str, digest: str) -> pa.Table:
        return unpack(self._bytes(self._path(number, kind), digest))

    def _read(self, part: Part) -> pa.Table:
        data = self._bytes(f"{self._writer.folder}/{part.path}", part.digest)
        return pq.ParquetFile(pa.BufferReader(data)).read()

    def _bytes(self, path: str, digest: str) -> bytes:
        data = self._store.read_bytes(path)
        if data is None or sha256(data) != digest:
            raise CorruptBatchError(
                f"{path} at {self._store.root} {'is gone' if data is None else 'has other bytes than its mark says'}. "
                "Clear the task that wrote it (the shard's) to write it again.",
                uri=self._uri,
                path=path,
            )
        return data

    def _path(self, number: int, kind: str) -> str:
        return f"{self._aside}{number:05d}.{kind}"


def superseded(parts: Iterable[Part]) -> set[str]:
    """Name the files that :meth:`Shelf.rewrite` has replaced in a landed batch, of which no manifest tells.

    :param parts: all parts of the batch.
    """
    judged = {found[1] for part in parts if (found := _REWRITTEN.search(part.path))}
    return {f"{table}/{name}.parquet" for name in judged for table in (ACCEPTED, QUARANTINE)}


def pack(rows: pa.Table) -> bytes:
    """Write rows as bytes that are soon read again: fast to write, the same for the same rows."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, rows.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer:
        writer.write_table(rows.combine_chunks())
    return bytes(sink.getvalue())


def unpack(data: bytes) -> pa.Table:
    """Read what :func:`pack` wrote."""
    return pa.ipc.open_file(pa.BufferReader(data)).read_all()
