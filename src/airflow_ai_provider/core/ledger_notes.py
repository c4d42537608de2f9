"""What is said once per run and name: pins, decisions, reviews, finished actions; and how ledger lines look as rows.

Invariants: a ledger that keeps notes (two primitives) gets all of these methods, so the ledgers cannot disagree;
rows are plain text and numbers, readable with ``sqlite3`` or ``psql``; no I/O here.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from airflow_ai_provider.core.batch import BatchRef, Pin, Span, canonical_json
from airflow_ai_provider.core.ledger import Claim, Entry, Intent, SeenFile, Sighting, Window


class NoteKeeper(ABC):
    """Answer for pins, decisions, reviews and finished actions, from notes that the subclass keeps."""

    @abstractmethod
    def _note(
        self,
        kind: str,
        pipeline: str,
        run_id: str,
        values: Mapping[str, Mapping[str, Any]],
        replace: bool = True,
        **columns: str | None,
    ) -> None:
        """Keep values by name in one transaction; ``replace=False`` lets the first one stand.

        :param columns: further columns that this kind of note has.
        """

    @abstractmethod
    def _notes(self, kind: str, pipeline: str, run_id: str) -> dict[str, Any]:
        """Return the values of a run by name, oldest first."""

    @abstractmethod
    def _pins(self, name: str, pipeline: str | None) -> list[Mapping[str, Any]]:
        """Return the lines of a model's pins as they are kept, oldest first; None means every pipeline."""

    def finished(self, pipeline: str, run_id: str, action: str, ref: BatchRef) -> None:
        self._note("finished", pipeline, run_id, {action: ref.to_dict()})

    def finished_actions(self, pipeline: str, run_id: str) -> dict[str, BatchRef]:
        return {name: BatchRef.from_dict(ref) for name, ref in self._notes("finished", pipeline, run_id).items()}

    def lettered(self, pipeline: str, run_id: str, ref: BatchRef, topic: str) -> None:
        self._note("letter", pipeline, run_id, {f"{topic}/{ref.batch_id}": ref.to_dict()})

    def has_lettered(self, pipeline: str, run_id: str, ref: BatchRef, topic: str) -> bool:
        noted = self._notes("letter", pipeline, run_id).get(f"{topic}/{ref.batch_id}")
        return noted is not None and noted["digest"] == ref.digest

    def saw_files(self, pipeline: str, source: str, seen: Mapping[str, SeenFile]) -> None:
        self._note("file", pipeline, source, {path: vars(file) for path, file in seen.items()})

    def files_seen(self, pipeline: str, source: str) -> dict[str, SeenFile]:
        return {path: SeenFile(**noted) for path, noted in self._notes("file", pipeline, source).items()}

    def dismiss(self, pipeline: str, batch_id: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
        noted = {f"{batch_id}/{row_id}": note for row_id, note in rows.items()}
        self._note("dismissal", pipeline, "", noted, replace=False)

    def dismissed(self, pipeline: str) -> dict[tuple[str, str], dict[str, Any]]:
        found: dict[tuple[str, str], dict[str, Any]] = {}
        for name, note in self._notes("dismissal", pipeline, "").items():
            batch_id, _, row_id = name.partition("/")  # no batch id has a slash
            found[batch_id, row_id] = note
        return found

    def pin(self, pipeline: str, run_id: str, pin: Pin, window: Window | None = None, policy: str | None = None) -> Pin:
        start, end = map(time_text, window) if window else (None, None)
        facts = {"window_start": start, "window_end": end, "policy": policy}
        self._note("pin", pipeline, run_id, {pin.name: pin.to_dict()}, replace=False, **facts)
        return self.pin_of(pipeline, run_id, pin.name) or pin

    def pin_of(self, pipeline: str, run_id: str, name: str) -> Pin | None:
        held = self._notes("pin", pipeline, run_id).get(name)
        return Pin.from_dict(held) if held else None

    def pin_history(self, name: str, pipeline: str | None = None, window: Window | None = None) -> list[dict[str, Any]]:
        return [read_pinned(row) for row in self._pins(name, pipeline) if window is None or meets(row, window)]

    def decided(self, pipeline: str, run_id: str, facts: Mapping[str, Any]) -> None:
        self._note("decision", pipeline, run_id, {str(facts.get("batch_id", "")): facts})

    def decisions(self, pipeline: str, run_id: str) -> list[dict[str, Any]]:
        return list(self._notes("decision", pipeline, run_id).values())

    def reviewed(self, pipeline: str, run_id: str, answers: Sequence[Mapping[str, Any]]) -> None:
        self._note("review", pipeline, run_id, {str(answer["row_id"]): answer for answer in answers})

    def reviews(self, pipeline: str, run_id: str) -> list[dict[str, Any]]:
        return list(self._notes("review", pipeline, run_id).values())


def read_pinned(row: Mapping[str, Any]) -> dict[str, Any]:
    """Read a line of the history of pins."""
    pin = json.loads(row["value"])
    told = {fact: row[fact] for fact in ("pipeline", "run_id", "name", "window_start", "window_end", "policy")}
    return told | {"pinned_at": row["at"]} | {fact: pin[fact] for fact in ("version", "alias", "digest")}


def meets(row: Mapping[str, Any], window: Window) -> bool:
    """True when the window of a pin's line shares time with another one; a window may be one moment."""
    if row["window_start"] is None:
        return False
    one, other = (row["window_start"], row["window_end"]), (time_text(window[0]), time_text(window[1]))
    first, last = max(one[0], other[0]), min(one[1], other[1])
    is_moment = one[0] == one[1] or other[0] == other[1]
    # An interval does not hold its own end; a moment holds itself.
    return one == other or first < last or (is_moment and first == last != max(one[1], other[1]))


def read_sighting(row: Mapping[Any, Any]) -> Sighting:
    """Read a line of an alias's history."""
    first, last = (datetime.fromisoformat(row[name]) for name in ("first_at", "last_at"))
    return Sighting(row["version"], first, last)


def json_text(value: Any) -> str:
    """Return a plain value as the JSON text that a column holds."""
    return canonical_json(value).decode()


def time_text(at: datetime) -> str:
    """Return a time as the text that a column holds: ISO 8601, UTC, sortable."""
    return at.astimezone(UTC).isoformat(timespec="microseconds")


def claim_row(claim: Claim, at: datetime) -> dict[str, Any]:
    """Return a new claim as a row."""
    text = time_text(at)
    return {
        "pipeline": claim.pipeline,
        "run_key": claim.run_key,
        "run_id": claim.run_id,
        "source": claim.span.source,
        "identity": claim.span.identity,
        "span": json_text(claim.span.to_dict()),
        "state": claim.state,
        "claimed_at": text,
        "updated_at": text,
    }


def slice_rows(claim: Claim, claim_id: int) -> list[dict[str, Any]]:
    """Return the slices of a claim as rows."""
    span = claim.span
    owner = {"claim_id": claim_id, "pipeline": claim.pipeline, "source": span.source, "identity": span.identity}
    return [
        {**owner, "topic_partition": s.partition, "digest": s.digest, "first": s.first, "end": s.end}
        for s in span.slices
    ]


def read_claim(row: Mapping[Any, Any]) -> Claim:
    """Read a claim's row."""
    ref = BatchRef.from_dict(json.loads(row["ref"])) if row["ref"] else None
    span = Span.from_dict(json.loads(row["span"]))
    times = [datetime.fromisoformat(row[name]) for name in ("claimed_at", "updated_at")]
    return Claim(row["pipeline"], row["run_key"], span, row["state"], ref, row["run_id"], *times)


def entry_rows(intents: Sequence[Intent], at: datetime, state: str) -> list[tuple[Any, ...]]:
    """Return new entries as rows of :data:`~airflow_ai_provider.core.ledger_schema.ENTRY`.

    :param state: ``reserved``, or ``sent`` for those that leave at once.
    """
    text, attempts = time_text(at), int(state == "sent")
    requests: dict[int, str] = {}  # the intents of one action share one request
    for intent in intents:
        if id(intent.request) not in requests:
            requests[id(intent.request)] = json_text(dict(intent.request))
    return [
        (
            *(i.key, i.pipeline, i.action, i.subject, i.fingerprint, i.run_id, i.row_id, i.batch_id, i.step, i.saga),
            *(i.undoes, requests[id(i.request)], state, "{}", attempts, text, text),
        )
        for i in intents
    ]


def new_entry(intent: Intent, at: datetime) -> Entry:
    """Return the entry that :func:`entry_rows` writes for a reservation."""
    entry = object.__new__(Entry)  # its __init__ sets sixteen frozen fields one by one, for every row that is sent
    entry.__dict__.update(intent.__dict__, state="reserved", outcome={}, attempts=0, updated_at=at)
    return entry


def read_entry(row: Mapping[Any, Any]) -> Entry:
    """Read an entry's row."""
    fields = {name: value for name, value in row.items() if name not in ("seq", "reserved_at")}
    fields |= {"request": json.loads(row["request"]), "outcome": json.loads(row["outcome"])}
    return Entry(**fields | {"updated_at": datetime.fromisoformat(row["updated_at"])})
