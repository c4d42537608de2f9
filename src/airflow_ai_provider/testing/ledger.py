"""A ledger in memory, for tests.

Invariants: decides everything with the same pure functions as the SQL ledger; every method holds one lock, so it is
one transaction; what it returns is never changed afterwards.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any

from airflow_ai_provider.core.batch import BatchRef, Pin, Span
from airflow_ai_provider.core.ledger import (
    Claim,
    Entry,
    Intent,
    Outcome,
    check_fingerprints,
    check_landing,
    check_move,
    is_open,
    settle_claim,
)

_MISSING = "absent"


class MemoryLedger:
    """Keep a ledger in memory: for tests and for trying a pipeline out. Gone with the process.

    :param now: the clock.
    """

    def __init__(self, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._now, self._lock = now, threading.RLock()
        self._claims: dict[tuple[str, str], Claim] = {}
        self._entries: dict[str, Entry] = {}
        self._finished: dict[tuple[str, str, str], BatchRef] = {}
        self._pins: dict[tuple[str, str, str], tuple[Pin, datetime]] = {}
        self._decisions: dict[tuple[str, str, str], dict[str, Any]] = {}
        self._reviews: dict[tuple[str, str, str], dict[str, Any]] = {}

    def claim(self, pipeline: str, run_key: str, span: Span, run_id: str) -> Claim:
        with self._lock:
            own = self._claims.get((pipeline, run_key))
            if own is None:
                own = settle_claim(span, self._rivals(pipeline, span.source, span.identity))
            if own is None:
                own = self._claims[pipeline, run_key] = Claim(pipeline, run_key, span, "claimed", None, run_id)
            return own

    def claim_of(self, pipeline: str, run_key: str) -> Claim | None:
        return self._claims.get((pipeline, run_key))

    def landed(self, pipeline: str, run_key: str, ref: BatchRef) -> None:
        with self._lock:
            claim = self._claims.get((pipeline, run_key))
            if check_landing(claim, pipeline, run_key, ref) and claim:
                self._claims[pipeline, run_key] = replace(claim, state="landed", ref=ref)

    def position(self, pipeline: str, source: str, identity: str) -> dict[str, int]:
        ends: dict[str, int] = {}
        with self._lock:
            for claim in self._rivals(pipeline, source, identity):
                for part in claim.span.slices:
                    ends[part.partition] = max(part.end, ends.get(part.partition, 0))
        return ends

    def files_taken(self, pipeline: str, source: str) -> dict[str, str]:
        with self._lock:
            held = [c for c in self._claims.values() if (c.pipeline, c.span.source) == (pipeline, source)]
        return {part.partition: part.digest for claim in held for part in claim.span.slices}

    def release(self, pipeline: str, run_key: str) -> None:
        with self._lock:
            claim = self._claims.get((pipeline, run_key))
            if claim and claim.state != "landed":
                del self._claims[pipeline, run_key]

    def reserve(self, intents: Sequence[Intent]) -> list[Entry]:
        with self._lock:
            check_fingerprints({k: e.fingerprint for k, e in self._entries.items()}, intents)
            for intent in intents:
                if intent.key not in self._entries:
                    fields = {**asdict(intent), "request": dict(intent.request)}
                    self._entries[intent.key] = Entry(**fields, state="reserved", updated_at=self._now())
            return [self._entries[i.key] for i in intents]

    def sent(self, keys: Collection[str]) -> None:
        self._move([Outcome(key, "sent") for key in dict.fromkeys(keys)])

    def record(self, outcomes: Sequence[Outcome]) -> None:
        self._move(outcomes)

    def _move(self, outcomes: Sequence[Outcome]) -> None:
        with self._lock:
            moved: dict[str, Entry] = {}
            for outcome in outcomes:
                entry = moved.get(outcome.key) or self._entries.get(outcome.key)
                if check_move(outcome.key, entry.state if entry else _MISSING, outcome.state) and entry:
                    moved[outcome.key] = replace(
                        entry,
                        state=outcome.state,
                        outcome={} if outcome.state == "sent" else dict(outcome.outcome),
                        attempts=entry.attempts + (outcome.state == "sent"),
                        updated_at=self._now(),
                    )
            self._entries.update(moved)

    def look_up(self, key: str) -> Entry | None:
        return self._entries.get(key)

    def entries(
        self,
        pipeline: str,
        run_id: str | None = None,
        action: str | None = None,
        saga: str | None = None,
        states: Collection[str] | None = None,
    ) -> list[Entry]:
        with self._lock:
            found = [
                entry
                for entry in self._entries.values()
                if entry.pipeline == pipeline
                and run_id in (None, entry.run_id)
                and action in (None, entry.action)
                and saga in (None, entry.saga)
                and (states is None or entry.state in states)
            ]
        return sorted(found, key=lambda e: e.step)

    def open_sagas(self, pipeline: str, run_id: str) -> list[str]:
        states: dict[str, set[str]] = {}
        for entry in self.entries(pipeline, run_id):
            if not entry.undoes:
                states.setdefault(entry.saga, set()).add(entry.state)
        return [saga for saga, found in states.items() if is_open(found)]

    def finished(self, pipeline: str, run_id: str, action: str, ref: BatchRef) -> None:
        self._finished[pipeline, run_id, action] = ref

    def finished_actions(self, pipeline: str, run_id: str) -> dict[str, BatchRef]:
        with self._lock:
            return {a: ref for (p, r, a), ref in self._finished.items() if (p, r) == (pipeline, run_id)}

    def pin(self, pipeline: str, run_id: str, pin: Pin) -> Pin:
        with self._lock:
            return self._pins.setdefault((pipeline, run_id, pin.name), (pin, self._now()))[0]

    def pin_of(self, pipeline: str, run_id: str, name: str) -> Pin | None:
        held = self._pins.get((pipeline, run_id, name))
        return held[0] if held else None

    def pin_history(self, name: str) -> list[dict[str, Any]]:
        with self._lock:
            held = [(key, *value) for key, value in self._pins.items() if key[2] == name]
        return [
            {
                "pipeline": pipeline,
                "run_id": run_id,
                "name": name,
                "version": pin.version,
                "alias": pin.alias,
                "digest": pin.digest,
                "pinned_at": at.isoformat(timespec="microseconds"),
            }
            for (pipeline, run_id, _), pin, at in held
        ]

    def decided(self, pipeline: str, run_id: str, facts: Mapping[str, Any]) -> None:
        self._decisions[pipeline, run_id, str(facts.get("batch_id", ""))] = dict(facts)

    def decisions(self, pipeline: str, run_id: str) -> list[dict[str, Any]]:
        with self._lock:
            return [dict(f) for (p, r, _), f in self._decisions.items() if (p, r) == (pipeline, run_id)]

    def reviewed(self, pipeline: str, run_id: str, answers: Sequence[Mapping[str, Any]]) -> None:
        with self._lock:
            for answer in answers:
                self._reviews[pipeline, run_id, str(answer["row_id"])] = dict(answer)

    def reviews(self, pipeline: str, run_id: str) -> list[dict[str, Any]]:
        with self._lock:
            return [dict(a) for (p, r, _), a in self._reviews.items() if (p, r) == (pipeline, run_id)]

    def _rivals(self, pipeline: str, source: str, identity: str) -> list[Claim]:
        wanted = (pipeline, source, identity)
        return [c for c in self._claims.values() if (c.pipeline, c.span.source, c.span.identity) == wanted]
