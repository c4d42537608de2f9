"""A ledger in memory, for tests.

Invariants: decides everything with the same pure functions as the SQL ledger; every method holds one lock, so it is
one transaction; what it returns is never changed afterwards.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from airflow_ai_provider.core.batch import BatchRef, Span
from airflow_ai_provider.core.ledger import Claim, Entry, Intent, Outcome, Sighting
from airflow_ai_provider.core.ledger_notes import NoteKeeper, json_text, new_entry, time_text
from airflow_ai_provider.core.ledger_rules import (
    check_attempt,
    check_fingerprints,
    check_landing,
    check_move,
    open_among,
    settle_aliases,
    settle_claim,
)

_MISSING = "absent"


class MemoryLedger(NoteKeeper):
    """Keep a ledger in memory: for tests and for trying a pipeline out. Gone with the process.

    :param now: the clock.
    """

    def __init__(self, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._now, self._lock = now, threading.RLock()
        self._claims: dict[tuple[str, str], Claim] = {}
        self._closed_by: dict[tuple[str, str], str] = {}
        self._entries: dict[str, Entry] = {}
        self._kept: dict[tuple[str, str, str, str], dict[str, Any]] = {}
        self._aliases: dict[tuple[str, str, str], list[Sighting]] = {}

    def claim(self, pipeline: str, run_key: str, span: Span, run_id: str, attempt: str = "") -> Claim:
        with self._lock:
            own = self._claims.get((pipeline, run_key))
            if own is None:
                check_attempt(run_key, attempt, self._closed_by.get((pipeline, run_key), ""))
                own = settle_claim(span, self._rivals(pipeline, span.source, span.identity))
            if own is None:
                at = self._now()
                own = Claim(pipeline, run_key, span, "claimed", None, run_id, at, at)
                self._claims[pipeline, run_key] = own
            return own

    def claim_nothing(self, pipeline: str, run_key: str, attempt: str = "") -> Claim | None:
        with self._lock:
            own = self._claims.get((pipeline, run_key))
            if own is None:
                last = self._closed_by.get((pipeline, run_key), "")
                self._closed_by[pipeline, run_key] = max(attempt, last)
            return own

    def claim_of(self, pipeline: str, run_key: str) -> Claim | None:
        return self._claims.get((pipeline, run_key))

    def claims(self, pipeline: str | None = None, state: str | None = None) -> list[Claim]:
        with self._lock:
            held = list(self._claims.values())
        return [c for c in held if pipeline in (None, c.pipeline) and state in (None, c.state)]

    def landed(self, pipeline: str, run_key: str, ref: BatchRef) -> None:
        with self._lock:
            claim = self._claims.get((pipeline, run_key))
            if check_landing(claim, pipeline, run_key, ref) and claim:
                self._claims[pipeline, run_key] = replace(claim, state="landed", ref=ref, updated_at=self._now())

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
                    self._entries[intent.key] = new_entry(intent, self._now())
            return [self._entries[i.key] for i in intents]

    def dispatch(self, intents: Sequence[Intent]) -> dict[str, Entry]:
        with self._lock:
            known = {i.key: self._entries[i.key] for i in intents if i.key in self._entries}
            self.reserve(intents)
            self.sent([i.key for i in intents if i.key not in known])
            return known

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
        return open_among((e.saga, e.state) for e in self.entries(pipeline, run_id) if not e.undoes)

    def _note(
        self,
        kind: str,
        pipeline: str,
        run_id: str,
        values: Mapping[str, Mapping[str, Any]],
        replace: bool = True,
        **columns: str | None,
    ) -> None:
        with self._lock:
            for name, value in values.items():
                if replace or (kind, pipeline, run_id, name) not in self._kept:
                    row = {"at": time_text(self._now()), "value": json_text(dict(value)), **columns}
                    self._kept[kind, pipeline, run_id, name] = row

    def _notes(self, kind: str, pipeline: str, run_id: str) -> dict[str, Any]:
        with self._lock:
            return {
                key[3]: json.loads(row["value"])
                for key, row in self._kept.items()
                if key[:3] == (kind, pipeline, run_id)
            }

    def _pins(self, name: str, pipeline: str | None) -> list[Mapping[str, Any]]:
        with self._lock:
            kept = list(self._kept.items())
        return [
            {"pipeline": own, "run_id": run_id, "name": name, **row}
            for (kind, own, run_id, about), row in kept
            if (kind, about) == ("pin", name) and pipeline in (None, own)
        ]

    def saw_aliases(self, registry: str, name: str, aliases: Mapping[str, str]) -> None:
        with self._lock:
            at = self._now()
            known = {key[2]: seen for key, seen in self._aliases.items() if key[:2] == (registry, name)}
            fresh, same = settle_aliases({alias: seen[-1].version for alias, seen in known.items()}, aliases)
            for alias in same:
                known[alias][-1] = replace(known[alias][-1], last_at=max(at, known[alias][-1].last_at))
            for alias, version in fresh.items():
                self._aliases.setdefault((registry, name, alias), []).append(Sighting(version, at, at))

    def alias_history(self, registry: str, name: str, alias: str) -> list[Sighting]:
        with self._lock:
            return list(self._aliases.get((registry, name, alias), []))

    def _rivals(self, pipeline: str, source: str, identity: str) -> list[Claim]:
        wanted = (pipeline, source, identity)
        return [c for c in self._claims.values() if (c.pipeline, c.span.source, c.span.identity) == wanted]
