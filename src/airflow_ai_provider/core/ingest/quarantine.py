"""What waits in quarantine: in which batches, how many rows for which reasons, since when, and what was replayed.

Invariants: writes nothing but the note of a dismissal; how many wait and since when comes from the ledger, why from the
manifests, and no row is opened unless rows are asked for; a row that was replayed from a quarantine, or dismissed by
somebody, does not wait in it any more, and rests there still.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cached_property
from typing import Any

from airflow_ai_provider.core.batch import QUARANTINE, ROW_ID, BatchRef
from airflow_ai_provider.core.ingest.contract import REASONS, STAGE
from airflow_ai_provider.core.ingest.replay import name_of, rows_of
from airflow_ai_provider.core.ledger import Claim, Ledger
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.errors import CorruptBatchError, SpecError

_REASONS_OF = 200
"""Batches whose reasons a summary tells at the most: one manifest each, read at the end of every ingest."""


@dataclass(frozen=True)
class Quarantine:
    """The quarantine of one landed batch.

    :param claim: of the batch, landed.
    :param replays: claims of the replays out of it, landed.
    :param dismissed: row id → who dismissed it, why, when, and the code of its first reason.
    """

    claim: Claim
    replays: tuple[Claim, ...] = ()
    dismissed: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

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
        """Rows that were neither replayed nor dismissed."""
        return self.row_count - len(self.replayed) - len(self.given_up)

    @property
    def given_up(self) -> Mapping[str, Mapping[str, Any]]:
        """Rows that were dismissed, without those that were replayed all the same."""
        return {row: note for row, note in self.dismissed.items() if row not in self.replayed}

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
        found.subtract(Counter(note["reason"] for note in self.given_up.values()))
        return {code: count for code, count in found.most_common() if count > 0}

    def rows(
        self, store: Store, reason: str | None = None, stage: str | None = None, columns: list[str] | None = None
    ) -> Iterator[dict[str, Any]]:
        """Yield quarantined rows, each with ``replayed_into`` (a batch id) and ``dismissed`` (who, why, when), or None.

        :param reason: only rows with a reason of this code.
        :param stage: only rows that failed at this stage, ``decode`` or ``validate``.
        :param columns: only these columns, and those that the other parameters need.
        """
        names = None if columns is None else list(dict.fromkeys([ROW_ID, STAGE, REASONS, *columns]))
        for table in store.read(self.ref, QUARANTINE, names):
            for row in table.to_pylist():
                codes = [told.partition(":")[0] for told in row[REASONS] or []]
                if reason in (None, *codes) and stage in (None, row[STAGE]):
                    yield row | {
                        "replayed_into": self.replayed.get(row[ROW_ID]),
                        "dismissed": self.dismissed.get(row[ROW_ID]),
                    }


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
    notes = _dismissals(ledger, {claim.pipeline for claim in claims})
    return [
        Quarantine(
            claim,
            tuple(replays.get((claim.pipeline, name_of(claim.ref.batch_id)), ())),
            notes.get((claim.pipeline, claim.ref.batch_id), {}),
        )
        for claim in claims
        if claim.ref is not None and claim.ref.counts.get("quarantined") and run_id in (None, claim.run_id)
    ]


def dismiss(
    store: Store,
    ledger: Ledger,
    quarantine: Quarantine,
    *,
    rows: Collection[str] = (),
    reason: str | None = None,
    who: str,
    why: str,
    now: datetime,
) -> int:
    """Note that rows need wait no more; they stay where they are, and can be replayed all the same.

    :param rows: these row ids; none: all that wait.
    :param reason: only rows with a reason of this code.
    :return: how many were dismissed; those that did not wait any more are left out.
    :raises SpecError: when a row is not in the quarantine, or nobody says why; then none is dismissed; a retry does not
        help.
    """
    if not why.strip():
        raise SpecError("a dismissal needs a reason that others can read later: --why.", faults=[("why", "empty")])
    wanted, notes = set(rows), dict[str, dict[str, Any]]()
    for row in quarantine.rows(store, columns=[]):
        asked = not rows or row[ROW_ID] in wanted
        wanted.discard(row[ROW_ID])
        codes = [told.partition(":")[0] for told in row[REASONS] or []]
        if asked and reason in (None, *codes) and not row["replayed_into"] and not row["dismissed"]:
            notes[row[ROW_ID]] = {"reason": codes[0], "who": who, "why": why, "at": now.isoformat()}
    if wanted:
        raise SpecError(
            f"{len(wanted)} row(s) are not in the quarantine of batch {quarantine.ref.batch_id}: "
            f"{', '.join(sorted(wanted)[:5])}. Take the row ids from 'airflow ai quarantine show'.",
            faults=[(row, "not in quarantine") for row in sorted(wanted)],
        )
    ledger.dismiss(quarantine.claim.pipeline, quarantine.ref.batch_id, notes)
    return len(notes)


def _dismissals(ledger: Ledger, pipelines: Iterable[str]) -> dict[tuple[str, str], dict[str, Mapping[str, Any]]]:
    found: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for pipeline in pipelines:
        for (batch_id, row_id), note in ledger.dismissed(pipeline).items():
            found.setdefault((pipeline, batch_id), {})[row_id] = note
    return found


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
