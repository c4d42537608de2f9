"""Values that travel between the verbs: spans, manifests, references to them, and the model pin.

Invariants: everything here is frozen, small, plain JSON with a ``schema_version``, and says the same thing for the
same content (no clock, no random id), so that the same rows always get the same names and the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from airflow_ai_provider.errors import CorruptBatchError, RowMismatchError, SpecError

SCHEMA_VERSION = 1
ROW_ID = "_row_id"
"""Column that names a row for ever: topic (with the topic's id), topic partition and offset; or file digest and row."""

ACCEPTED, QUARANTINE, PREDICTIONS, OUTCOMES = "accepted", "quarantine", "predictions", "outcomes"
ROUTES = ("act", "review", "fallback", "hold")


# made once: json.dumps with options makes an encoder per call, which costs more than a row's JSON
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def canonical_json(value: Any) -> bytes:
    """Serialise to the one JSON text that digests are taken over: sorted keys, no spaces, UTF-8.

    :param value: plain JSON value.
    :return: bytes, the same for equal values on every machine.
    :raises ValueError: on NaN or infinity; a retry does not help.
    """
    return _CANONICAL.encode(value).encode()


def digest_of(value: Any) -> str:
    """Return the SHA-256 of a value's canonical JSON, as ``sha256:<64 hex digits>``."""
    return "sha256:" + hashlib.sha256(canonical_json(value)).hexdigest()


def share_or_count(limit: float | str | None) -> float | int | None:
    """Read a limit that is a share of the rows or a count of rows.

    :param limit: ``0.2`` or ``"20%"`` (a share, below 1), ``50`` (a count), None or empty text (no limit).
    :return: a float below 1 for a share, an int for a count, None for no limit.
    :raises SpecError: when it is neither; a retry does not help.
    """
    if limit is None or (isinstance(limit, str) and limit.strip() in ("", "None")):
        return None
    text = str(limit).strip()
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if 0 <= value < 1 or (text.endswith("%") and value == 1):
        return value if value < 1 else None
    if value >= 1 and value.is_integer() and not text.endswith("%"):
        return int(value)
    raise SpecError(
        f"limit {limit!r} is neither a share nor a count: write 0.2 or '20%' for a share, 50 for a count.",
        faults=[("limit", f"{limit!r} is neither a share nor a count")],
    )


def exceeds(row_count: int, of: int, limit: float | int | None) -> bool:
    """Tell whether ``row_count`` rows of ``of`` are more than a limit from :func:`share_or_count` allows."""
    if limit is None:
        return False
    return row_count > (limit if isinstance(limit, int) and limit >= 1 else limit * of)


@dataclass(frozen=True, order=True)
class Slice:
    """One stretch of one topic partition, or one file.

    :param partition: topic partition number as text, or the file's path.
    :param first: first offset taken (0 for a file).
    :param end: one past the last offset taken (the file's size in bytes).
    :param digest: SHA-256 of a file's bytes; empty for a topic partition, whose offsets already name the rows.
    """

    partition: str
    first: int
    end: int
    digest: str = ""


@dataclass(frozen=True)
class Span:
    """What one ingest takes: fixed once, stored with the claim, read again as it is by every retry.

    :param source: kind and name, such as ``kafka:biopsies`` or ``files:digits``.
    :param identity: what tells a source from a later one of the same name (Kafka's topic id); may be empty.
    :param slices: what is taken, sorted by partition.
    :param facts: what is worth knowing later (partition count, records waiting behind an open transaction).
    """

    source: str
    identity: str
    slices: tuple[Slice, ...]
    facts: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def is_empty(self) -> bool:
        """True when there is nothing to read."""
        return all(s.end <= s.first for s in self.slices)

    @property
    def batch_id(self) -> str:
        """Name of the batch, made of what it contains: source name and digest of the slices."""
        name = "".join(c if c.isalnum() or c in "-_" else "-" for c in self.source.partition(":")[2]).strip("-")
        content = {"source": self.source, "identity": self.identity, "slices": [asdict(s) for s in self.slices]}
        return f"{name[:60]}-{digest_of(content)[7:23]}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON."""
        return {
            "source": self.source,
            "identity": self.identity,
            "slices": [asdict(s) for s in self.slices],
            "facts": dict(self.facts),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Span:
        """Read what :meth:`to_dict` wrote."""
        return cls(
            data["source"], data["identity"], tuple(Slice(**s) for s in data["slices"]), dict(data.get("facts") or {})
        )


@dataclass(frozen=True)
class Part:
    """One stored file of a batch.

    :param path: relative to the batch's folder, ``<table>/<number>.parquet``.
    :param table: which table of the batch it belongs to (``accepted``, ``quarantine``, ``predictions``, a route …).
    :param row_count: rows in it.
    :param byte_count: size of the file.
    :param digest: SHA-256 of the file's bytes.
    """

    path: str
    table: str
    row_count: int
    byte_count: int
    digest: str


@dataclass(frozen=True)
class Manifest:
    """Our own record of a stored batch: written last, so a batch without one does not exist.

    :param kind: ``batch``, ``predictions``, ``routes``, ``review``, ``outcomes``.
    :param batch_id: name of the batch; the same content has the same name.
    :param parts: the files, in row order within each table.
    :param counts: row counts by name; :meth:`check` makes them add up.
    :param facts: what the rows came from and under which rules: span, suite digest, pin, policy …
    """

    kind: str
    batch_id: str
    parts: tuple[Part, ...]
    counts: Mapping[str, int]
    facts: Mapping[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def table(self, name: str) -> tuple[Part, ...]:
        """Return the parts of one table, in row order."""
        return tuple(p for p in self.parts if p.table == name)

    def check(self) -> Manifest:
        """Return this manifest if its counts add up.

        :raises RowMismatchError: when rows are lost or doubled; a retry does not help.
        """
        counts = self.counts
        for total, shares in _SUMS.get(self.kind, ()):
            if counts.get(total, 0) != sum(counts.get(s, 0) for s in shares):
                raise RowMismatchError(
                    f"batch {self.batch_id}: {total}={counts.get(total, 0)} but "
                    + " + ".join(f"{s}={counts.get(s, 0)}" for s in shares)
                    + ". Rows were lost or doubled: nothing was landed. Keep the task's log and report it as a bug.",
                    batch_id=self.batch_id,
                    counts=dict(counts),
                )
        for name in {p.table for p in self.parts}:
            stored = sum(p.row_count for p in self.table(name))
            expected = counts.get(_COUNTED_AS.get(name, name), stored)
            if stored != expected:
                raise RowMismatchError(
                    f"batch {self.batch_id}: table {name} holds {stored} rows, its count says {expected}. "
                    "Nothing was landed. Keep the task's log and report it as a bug.",
                    batch_id=self.batch_id,
                    counts=dict(counts),
                )
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON."""
        return {
            "schema_version": self.schema_version,
            "kind": self.kind,
            "batch_id": self.batch_id,
            "counts": dict(self.counts),
            "facts": dict(self.facts),
            "parts": [asdict(p) for p in self.parts],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Manifest:
        """Read what :meth:`to_dict` wrote.

        :raises CorruptBatchError: when it was written by a newer version or is not a manifest; a retry does not help.
        """
        with _reading(data, "manifest"):
            parts = tuple(Part(**p) for p in data["parts"])
            return cls(data["kind"], data["batch_id"], parts, data["counts"], data["facts"])


# kind → (total, what it is the sum of); the promise "every row is accounted for".
_SUMS: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "batch": (("read", ("accepted", "quarantined")),),
    "predictions": (("accepted", ("predicted", "failed")),),
    "routes": (("predicted", ROUTES),),
    "review": (("review", ("answered", "hold")),),
    "outcomes": (("rows", ("done", "refused", "unknown", "muted")),),
}
_TOTALS = {kind: tuple(total for total, _ in sums) for kind, sums in _SUMS.items()}
# table → the count that says how many rows it holds, where their names differ.
_COUNTED_AS = {"quarantine": "quarantined", "predictions": "accepted", "outcomes": "rows", "reviewed": "answered"}


@dataclass(frozen=True)
class BatchRef:
    """What XCom carries instead of rows: where a batch lies and which bytes it must have.

    :param kind: the manifest's kind.
    :param batch_id: the batch's name.
    :param uri: folder of the batch, under the store.
    :param digest: SHA-256 of the manifest's bytes: whoever opens it can tell if it was changed.
    :param counts: the manifest's counts, for a look without opening it.
    :param tables: the tables of the batch that the receiver shall read; empty means all.
    """

    kind: str
    batch_id: str
    uri: str
    digest: str
    counts: Mapping[str, int]
    tables: tuple[str, ...] = ()
    schema_version: int = SCHEMA_VERSION

    @property
    def row_count(self) -> int:
        """Rows of the tables that this reference names (of all tables when it names none)."""
        names = self.tables or tuple(n for n in self.counts if n not in _TOTALS.get(self.kind, ()))
        return sum(self.counts.get(_COUNTED_AS.get(name, name), 0) for name in names)

    def only(self, *tables: str) -> BatchRef:
        """Return a reference to some tables of the same batch."""
        return BatchRef(self.kind, self.batch_id, self.uri, self.digest, self.counts, tables)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON, as XCom carries it."""
        return {**asdict(self), "tables": list(self.tables)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> BatchRef:
        """Read what :meth:`to_dict` wrote.

        :raises CorruptBatchError: when it was written by a newer version, or is not a batch reference; a retry does not
            help.
        """
        with _reading(data, "batch reference"):
            tables = tuple(data.get("tables") or ())
            return cls(data["kind"], data["batch_id"], data["uri"], data["digest"], data["counts"], tables)


@dataclass(frozen=True)
class Pin:
    """One model, fixed for one DAG run: which version, and which bytes.

    :param name: registered model.
    :param version: model version.
    :param alias: the alias that was resolved; empty when a version was asked for.
    :param digest: SHA-256 over the sorted (path, SHA-256) of every artifact file.
    :param files: path → SHA-256 of each artifact file.
    :param flavor: which engine opens it: ``onnx``, ``torch``, ``pyfunc``; ``served``: none here.
    :param signature: inputs and outputs as MLflow records them, each ``{"name", "type", …}``.
    :param metadata: what the trainer put beside the model: ``classes``, ``calibration``.
    :param registry: tracking URI it came from, without credentials.
    """

    name: str
    version: str
    alias: str
    digest: str
    files: Mapping[str, str]
    flavor: str
    signature: Mapping[str, Any]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    registry: str = ""
    schema_version: int = SCHEMA_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON, as XCom and the ledger carry it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Pin:
        """Read what :meth:`to_dict` wrote.

        :raises CorruptBatchError: when it was written by a newer version, or is not a pin; a retry does not help.
        """
        with _reading(data, "pin"):
            return cls(**dict(data))


@contextmanager
def _reading(data: Mapping[str, Any], what: str) -> Iterator[None]:
    """Demand the version that this release reads, and say what a malformed value is meant to be."""
    found = data.get("schema_version") if isinstance(data, Mapping) else None
    if found != SCHEMA_VERSION:
        raise CorruptBatchError(
            f"this {what} has schema_version {found!r}, this release reads {SCHEMA_VERSION}. "
            "Run the task with the provider version that wrote it, or clear the upstream task to write it again.",
            found=found,
        )
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        raise CorruptBatchError(
            f"this is no {what}: {type(error).__name__} {error} in one with the fields {sorted(map(str, data))}. "
            "Clear the upstream task to write it again."
        ) from error
