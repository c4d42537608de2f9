"""What waits in quarantine: in which batches, how many rows for which reasons, since when, and what was replayed.

Invariants: reads only; how many wait and since when comes from the ledger, why from the manifests, and no row is opened
unless rows are asked for; a row that was replayed from a quarantine does not wait in it any more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property
from typing import Any

from airflow_ai_provider.core.batch import QUARANTINE, ROW_ID, BatchRef
from airflow_ai_provider.core.ingest.contract import REASONS, STAGE
from airflow_ai_provider.core.ingest.replay import name_of, rows_of
from airflow_ai_provider.core.ledger import Claim, Ledger
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.errors import CorruptBatchError

_REASONS_OF = 200
"""Batches whose reasons a summary tells at the most: one manifest each, read at the end of every ingest."""


@dataclass(frozen=True)
class Quarantine:
    """The quarantine of one landed batch.

    :param claim: of the batch, landed.
    :param replays: claims of the replays out of it, landed.
    """

    claim: Claim
    replays: tuple[Claim, ...] = ()

    @property
    def ref(self) -> BatchRef:
        """The batch."""
        assert self.claim.ref is not None
        return self.claim.ref

    @property
    def row_count(self) -> int:
        """Rows that were quarantined, replayed since or not."""
        return int(self.ref.counts.get("quarantined", 0))

    @property
    def waiting(self) -> int:
        """Rows that were not replayed."""
        return self.row_count - sum(len(rows_of(claim.span)) for claim in self.replays)

    @cached_property
    def replayed(self) -> Mapping[str, str]:
        """Row id → the batch that it was replayed into."""
        return {row: claim.ref.batch_id for claim in self.replays if claim.ref for row in rows_of(claim.span)}

    def may_hold(self, row_id: str) -> bool:
        """False when the row is surely not of this batch: told by the span, no row is opened."""
        span, (place, _, number) = self.claim.span, row_id.rpartition("/")
        if span.source.startswith("replay:"):
            return row_id in rows_of(span)
        return any(
            place.startswith(s.partition)
            if s.digest
            else place.endswith(f"/{s.partition}") and number.isdecimal() and s.first <= int(number) < s.end
            for s in span.slices
        )

    def age(self, now: datetime) -> timedelta:
        """How long its rows have been there."""
        return now - (self.claim.updated_at or now)

    def reasons(self, store: Store) -> dict[str, int] | None:
        """Count the waiting rows by the code of their first reason, most frequent first, from the manifest alone.

        :return: None when the batch has been removed from the store.
        """
        try:
            found = Counter(store.manifest(self.ref).facts["reasons"])
        except CorruptBatchError:
            if store.find(self.claim.pipeline, self.ref.kind, self.ref.batch_id) is None:
                return None
            raise
        for claim in self.replays:
            found.subtract(claim.span.facts.get("reasons", {}))
        return {code: count for code, count in found.most_common() if count > 0}

    def rows(
        self, store: Store, reason: str | None = None, stage: str | None = None, columns: list[str] | None = None
    ) -> Iterator[dict[str, Any]]:
        """Yield quarantined rows, each with ``replayed_into``: a batch id, or None while it waits.

        :param reason: only rows with a reason of this code.
        :param stage: only rows that failed at this stage, ``decode`` or ``validate``.
        :param columns: only these columns, and those that the other parameters need.
        """
        names = None if columns is None else list(dict.fromkeys([ROW_ID, STAGE, REASONS, *columns]))
        for table in store.read(self.ref, QUARANTINE, names):
            for row in table.to_pylist():
                codes = [told.partition(":")[0] for told in row[REASONS] or []]
                if reason in (None, *codes) and stage in (None, row[STAGE]):
                    yield row | {"replayed_into": self.replayed.get(row[ROW_ID])}


@dataclass(frozen=True)
class Waiting:
    """What waits in all quarantines of a pipeline.

    :param rows: rows that were not replayed.
    :param batches: in how many batches.
    :param oldest: age of the oldest of these batches; None when nothing waits.
    :param reasons: waiting rows by the code of their first reason, most frequent first.
    """

    rows: int
    batches: int
    oldest: timedelta | None
    reasons: Mapping[str, int]

    def __str__(self) -> str:
        if self.oldest is None:
            return "in quarantine waits no row"
        reasons = ", ".join(f"{code} {count:,}" for code, count in self.reasons.items())
        since = timedelta(seconds=int(self.oldest.total_seconds()))
        return f"in quarantine wait {self.rows:,} rows of {self.batches:,} batches, the oldest for {since}: {reasons}"


def find_quarantines(ledger: Ledger, pipeline: str | None = None, run_id: str | None = None) -> list[Quarantine]:
    """Find the batches with quarantined rows, oldest first.

    :param pipeline: of this pipeline only.
    :param run_id: landed by this run only.
    """
    claims = ledger.claims(pipeline, "landed")
    replays: dict[tuple[str, str], list[Claim]] = {}
    for claim in claims:
        replays.setdefault((claim.pipeline, claim.span.source), []).append(claim)
    return [
        Quarantine(claim, tuple(replays.get((claim.pipeline, name_of(claim.ref.batch_id)), ())))
        for claim in claims
        if claim.ref is not None and claim.ref.counts.get("quarantined") and run_id in (None, claim.run_id)
    ]


def summarise(quarantines: Sequence[Quarantine], store: Store, now: datetime) -> Waiting:
    """Say what waits.

    :param now: the clock.
    """
    waiting = [q for q in quarantines if q.waiting]
    reasons: Counter[str] = Counter()
    for quarantine in waiting[-_REASONS_OF:]:
        with suppress(CorruptBatchError):  # whoever reads that batch is told; it is no fault of the one just landed
            reasons.update(quarantine.reasons(store) or {})
    oldest = max((q.age(now) for q in waiting), default=None)
    return Waiting(sum(q.waiting for q in waiting), len(waiting), oldest, dict(reasons.most_common()))
