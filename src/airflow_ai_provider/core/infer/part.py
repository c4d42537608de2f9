"""One part of a prediction batch: stored whole, then marked done, and found again by a retry.

Invariants: the mark is written after the part's bytes; a mark is believed only for the same input part, the same model
bytes and options, and when the stored bytes still are those it names; the same rows give the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from airflow_ai_provider.core.batch import PREDICTIONS, Part, canonical_json
from airflow_ai_provider.core.store import Store

_SCORES = ["score", "probabilities.list.element"]


@dataclass(frozen=True)
class DonePart:
    """A stored part and how many of its rows failed."""

    part: Part
    failed: int


class PartShelf:
    """Store the parts of one prediction batch under its folder.

    :param store: where batches lie.
    :param folder: the batch's folder, relative to the store's root.
    :param made_from: what all its bytes depend on besides the rows (pin and options), as plain JSON.
    """

    def __init__(self, store: Store, folder: str, made_from: Mapping[str, Any]) -> None:
        self._store, self._folder, self._made_from = store, folder, dict(made_from)

    def done(self, number: int, source: Part) -> DonePart | None:
        """Return the part that an earlier try finished, or None when it must be predicted (again)."""
        data = self._store.read_bytes(f"{self._path(number)}.done")
        if data is None:
            return None
        try:
            mark = json.loads(data)
            part = Part(**mark["part"])
            failed = int(mark["failed"])
        except (ValueError, KeyError, TypeError):
            return None  # a mark that cannot be read proves nothing
        if mark.get("made_from") != self._identity(source):
            return None
        stored = self._store.read_bytes(self._path(number))
        return DonePart(part, failed) if stored is not None and _sha256(stored) == part.digest else None

    def write(self, number: int, source: Part, rows: pa.Table) -> DonePart:
        """Store the predictions of one input part, then mark them done."""
        data = _encode(rows)
        part = Part(f"{PREDICTIONS}/{number:05d}.parquet", PREDICTIONS, rows.num_rows, len(data), _sha256(data))
        failed = rows.num_rows - rows["error"].null_count
        self._store.write_bytes(self._path(number), data)
        mark = {"part": asdict(part), "failed": failed, "made_from": self._identity(source)}
        self._store.write_bytes(f"{self._path(number)}.done", canonical_json(mark))
        return DonePart(part, failed)

    def _path(self, number: int) -> str:
        return f"{self._folder}/{PREDICTIONS}/{number:05d}.parquet"

    def _identity(self, source: Part) -> dict[str, Any]:
        return {**self._made_from, "rows": source.digest}


def _encode(rows: pa.Table) -> bytes:
    """Write as Parquet, fast: Arrow's default tries a dictionary on every column, which on row ids and scores costs
    four times the processor time of all the rest and makes the file larger. Split into byte streams, scores are as
    small under lz4 as they would be under zstd, in less time."""
    sink = io.BytesIO()
    pq.write_table(
        rows.combine_chunks(),
        sink,
        compression={name: "zstd" for name in rows.column_names} | {name: "lz4" for name in _SCORES},
        use_byte_stream_split=_SCORES,
        version="2.6",
        use_dictionary=["prediction"],
        write_statistics=False,
        # without Arrow's own schema a dictionary of classes is read back as plain text
        store_schema=False,
    )
    return sink.getvalue()


def _sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()
