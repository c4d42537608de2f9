"""Cut a span into shards.

Invariants: pure; the shards of a span hold each of its rows once, in the order in which a source reads them; how a span
is cut depends on the span and the number alone, so every task that asks gets the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate, pairwise
from typing import Any

from airflow_ai_provider.core.batch import SCHEMA_VERSION, Slice, Span
from airflow_ai_provider.errors import CorruptBatchError, SpecError

MOST = 256
"""Shards of a batch at the most: a task each, of which a scheduler should not have thousands."""
SMALLEST_ROWS, SMALLEST_BYTES = 10_000, 8 << 20
"""What is worth a task of its own: rows of a topic, bytes of files."""


@dataclass(frozen=True)
class Shard:
    """One piece of a span.

    :param number: from 0.
    :param of: how many pieces were asked of :func:`cut_span`, which may have made fewer.
    """

    number: int
    of: int

    @property
    def prefix(self) -> str:
        """What the names of its files begin with; nothing when the span is not cut."""
        return "" if self.of == 1 else f"{self.number:04d}-of-{self.of:04d}-"


WHOLE = Shard(0, 1)


@dataclass(frozen=True)
class ShardRef:
    """What XCom carries from task to task: which piece of which claim, and, once it is done, the digest of its mark.

    :param run_key: whose claim it is.
    :param batch_id: the batch that all its shards become.
    :param shard: which piece.
    :param count: how many pieces there are.
    :param size: offsets, or bytes of files; for people.
    :param span: the span itself when it is empty, for then nothing is claimed.
    :param mark: SHA-256 of the mark; empty before, and when the batch had landed already.
    :param counts: rows read, accepted and quarantined.
    """

    run_key: str
    batch_id: str
    shard: Shard
    count: int
    size: int = 0
    span: Span | None = None
    mark: str = ""
    counts: Mapping[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON, as XCom carries it."""
        span = self.span.to_dict() if self.span else None
        return {**asdict(self), "counts": dict(self.counts), "span": span, "schema_version": SCHEMA_VERSION}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ShardRef:
        """Read what :meth:`to_dict` wrote; other keys beside it are left alone.

        :raises CorruptBatchError: when it is none, or of a newer version; a retry does not help.
        """
        try:
            if data["schema_version"] != SCHEMA_VERSION:
                raise KeyError(f"schema_version {data['schema_version']}")
            known = {name: data[name] for name in ("run_key", "batch_id", "count", "size", "mark", "counts")}
            span = Span.from_dict(data["span"]) if data["span"] else None
            return cls(**known, shard=Shard(**data["shard"]), span=span)
        except (KeyError, TypeError) as error:
            raise CorruptBatchError(
                f"this is no shard of this release ({type(error).__name__}: {error}). Clear the task that plans the "
                "batch, and those after it."
            ) from error


def cut_span(span: Span, of: int) -> tuple[Span, ...]:
    """Cut a span into contiguous pieces of nearly the same size: offsets of a topic, bytes of files, which stay whole.

    :param of: how many; there are fewer when there is less to cut (a large file is one piece), and always one.
    """
    if of == 1 or not span.slices:
        return (span,)
    slices = _in_reading_order(span)
    pieces = _cut_files(slices, of) if slices[0].digest else _cut_offsets(slices, of)
    return tuple(Span(span.source, span.identity, piece) for piece in pieces if piece)


def shard_count(span: Span, asked: int) -> int:
    """Return into how many pieces a span is cut: as many as were asked, but none too small to be worth a task.

    :raises SpecError: when the number cannot be had; a retry does not help.
    """
    if not 1 <= asked <= MOST:
        raise SpecError(f"shards={asked}; give 1 to {MOST}.", faults=[("shards", f"not in 1 to {MOST}")])
    files = any(s.digest for s in span.slices)
    return max(1, min(asked, size_of(span) // (SMALLEST_BYTES if files else SMALLEST_ROWS)))


def size_of(span: Span) -> int:
    """Offsets of topic partitions, or bytes of files."""
    return sum(s.end - s.first for s in span.slices)


def _in_reading_order(span: Span) -> list[Slice]:
    """Topic partitions by number, files by path: as sources read them."""
    return sorted(span.slices, key=lambda s: (0 if s.digest else int(s.partition), s.partition, s.first))


def _cut_offsets(slices: Sequence[Slice], of: int) -> list[tuple[Slice, ...]]:
    ends = list(accumulate(s.end - s.first for s in slices))
    bounds = [ends[-1] * number // of for number in range(of + 1)]
    pieces = []
    for low, high in pairwise(bounds):
        piece = []
        for part, end in zip(slices, ends, strict=True):
            first = part.first + max(low - (end - part.end + part.first), 0)
            last = part.end - max(end - high, 0)
            if first < last:
                piece.append(Slice(part.partition, first, last))
        pieces.append(tuple(piece))
    return pieces


def _cut_files(slices: Sequence[Slice], of: int) -> list[tuple[Slice, ...]]:
    sizes = [max(s.end - s.first, 1) for s in slices]  # an empty file is a file too
    pieces: list[list[Slice]] = [[] for _ in range(of)]
    for part, size, end in zip(slices, sizes, accumulate(sizes), strict=True):
        pieces[(2 * end - size) * of // (2 * sum(sizes))].append(part)  # by where its middle lies
    return [tuple(piece) for piece in pieces]
