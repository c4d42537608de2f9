"""The ledger's values and Protocol: spans claimed, effects intended and done, pins, decisions, reviews.

Invariants: nothing here holds a secret. What may follow what is in ``ledger_rules.py``, the SQL in ``ledger_sql.py``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol, runtime_checkable

from airflow_ai_provider.core.batch import BatchRef, Pin, Span


@dataclass(frozen=True)
class Claim:
    """One run's hold on a span of rows.

    :param state: ``claimed`` (being ingested) or ``landed`` (its batch is durable).
    :param ref: the landed batch; None while only claimed.
    :param run_id: the run that owns it, which need not be the run that asked.
    :param claimed_at: when it was claimed, UTC.
    :param updated_at: when it landed; until then, when it was claimed.
    """

    pipeline: str
    run_key: str
    span: Span
    state: str
    ref: BatchRef | None
    run_id: str
    claimed_at: datetime | None = field(default=None, compare=False)
    updated_at: datetime | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Intent:
    """One effect on the outside world, written down before it is tried.

    :param key: *which* effect: digest of pipeline, action and subject, never of the try.
    :param subject: what it is about: the key column's value, or the row id.
    :param fingerprint: *what* is sent: digest of the payload.
    :param row_id: the row it came from, within ``batch_id``.
    :param step: the action's place in the saga, from 0.
    :param saga: name shared by all effects for one subject in one run.
    :param undoes: key of the entry that this effect undoes; empty for an ordinary one.
    :param request: what an undo or a person needs to know (endpoint, undo endpoint); never a secret.
    """

    key: str
    pipeline: str
    action: str
    subject: str
    fingerprint: str
    run_id: str
    row_id: str
    batch_id: str
    step: int
    saga: str
    undoes: str = ""
    request: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Entry(Intent):
    """One line of the ledger: an intent and what became of it.

    :param state: a key of :data:`TRANSITIONS`.
    :param outcome: what the receiver answered (``status``, ``id``, ``reason``); empty before.
    :param attempts: how many times it was marked as sent.
    :param updated_at: when the state last changed, UTC.
    """

    state: str
    outcome: Mapping[str, Any] = field(default_factory=dict)
    attempts: int = 0
    updated_at: datetime


@dataclass(frozen=True)
class Outcome:
    """What became of one effect.

    :param state: the state to move the entry to.
    :param outcome: plain JSON, such as ``{"status": 201, "id": "T-7"}`` or ``{"status": 422, "reason": "…"}``.
    """

    key: str
    state: str
    outcome: Mapping[str, Any] = field(default_factory=dict)


Window = tuple[datetime, datetime]
"""A run's data interval: start and end, UTC; twice the same moment when it has only a logical date."""


@dataclass(frozen=True)
class Sighting:
    """Where an alias pointed: seen there first and last, and nowhere else between.

    :param version: model version; empty when the alias was seen to be gone.
    """

    version: str
    first_at: datetime
    last_at: datetime


@dataclass(frozen=True)
class SeenFile:
    """What a file was when it was read last, so that it need not be read again to know it.

    :param mark: what its file system said of it then; while it says the same, the bytes are the same.
    :param digest: SHA-256 of its bytes.
    :param size: how many bytes.
    :param rows: about how many rows.
    """

    mark: str
    digest: str
    size: int
    rows: int


@runtime_checkable
class Ledger(Protocol):
    """Durable list of claims, effects, pins, decisions and reviews, shared by all tasks of all runs.

    Each method is one transaction: it happened, or it did not. Safe to call from several threads and processes.
    Every method raises LedgerUnavailableError when the database does not answer; a retry may help.
    """

    def claim(self, pipeline: str, run_key: str, span: Span, run_id: str, attempt: str = "") -> Claim:
        """Take a span, once. The same ``run_key`` gets its own claim again, whatever span it now asks for; a span that
        another run has landed exactly so is returned as that run's claim.

        :param attempt: which try asks, in a text that sorts behind those of the tries before; empty: not known.
        :raises SpanConflictError: when another run holds some of these rows, or a later try of this one has found none.
        """

    def claim_nothing(self, pipeline: str, run_key: str, attempt: str = "") -> Claim | None:
        """Note that a try has found no rows: the tries before it claim none any more, those after it may.

        :param attempt: as for :meth:`claim`; of one that is not known nothing is noted.
        :return: what this ``run_key`` holds, for a try before it may have been quicker; then nothing is noted.
        """

    def claim_of(self, pipeline: str, run_key: str) -> Claim | None:
        """Return what this ``run_key`` holds."""

    def claims(self, pipeline: str | None = None, state: str | None = None) -> list[Claim]:
        """Return claims, oldest first; None means any pipeline, any state."""

    def landed(self, pipeline: str, run_key: str, ref: BatchRef) -> None:
        """Mark a claim's batch as durable; again with the same batch does nothing.

        :raises LedgerStateError: when there is no such claim, or it landed another batch; a retry may help.
        """

    def position(self, pipeline: str, source: str, identity: str) -> dict[str, int]:
        """Return the end of the highest claimed slice per topic partition."""

    def files_taken(self, pipeline: str, source: str) -> dict[str, str]:
        """Return path → digest of the files claimed so far (of a path claimed twice, the later digest)."""

    def saw_files(self, pipeline: str, source: str, seen: Mapping[str, SeenFile]) -> None:
        """Note what files were when they were read, by their paths; a later note of a path replaces the earlier."""

    def files_seen(self, pipeline: str, source: str) -> dict[str, SeenFile]:
        """Return what :meth:`saw_files` noted of each path. A hint: :meth:`files_taken` says what was taken."""

    def release(self, pipeline: str, run_key: str) -> None:
        """Give a claim back unless it has landed."""

    def reserve(self, intents: Sequence[Intent]) -> list[Entry]:
        """Write intents down before they are tried; known keys give the entry that is there. Order is kept.

        :raises IdempotencyConflictError: when a key is known with another fingerprint (``keys`` names them all); then
            none is reserved; a retry does not help.
        """

    def dispatch(self, intents: Sequence[Intent]) -> dict[str, Entry]:
        """Reserve intents that leave at once: what is new is written down as ``sent``, in the one commit.

        :param intents: each key once.
        :return: key → entry of those that were known, as they are; the others are new and may be sent now.
        :raises IdempotencyConflictError: as :meth:`reserve` does; then none is written.
        """

    def sent(self, keys: Collection[str]) -> None:
        """Mark entries as leaving now.

        :raises LedgerStateError: when one may not be sent from where it is; then none moves; a retry may help.
        """

    def record(self, outcomes: Sequence[Outcome]) -> None:
        """Move entries to what became of them; an entry that is there already keeps its first outcome.

        :raises LedgerStateError: when one may not move so; then none moves; a retry may help.
        """

    def look_up(self, key: str) -> Entry | None:
        """Return one entry."""

    def entries(
        self,
        pipeline: str,
        run_id: str | None = None,
        action: str | None = None,
        saga: str | None = None,
        states: Collection[str] | None = None,
    ) -> list[Entry]:
        """Return entries by step, then in the order of their reservation; None means any."""

    def open_sagas(self, pipeline: str, run_id: str) -> list[str]:
        """Return the sagas of a run that wait for something: an answer, an undo, a person."""

    def finished(self, pipeline: str, run_id: str, action: str, ref: BatchRef) -> None:
        """Note that an action is through with its rows of this run: a row without an entry was not offered to it."""

    def finished_actions(self, pipeline: str, run_id: str) -> dict[str, BatchRef]:
        """Return the actions noted by :meth:`finished`, with their outcomes."""

    def lettered(self, pipeline: str, run_id: str, ref: BatchRef, topic: str) -> None:
        """Note that the quarantined rows of a batch are in a dead-letter topic, all of them."""

    def has_lettered(self, pipeline: str, run_id: str, ref: BatchRef, topic: str) -> bool:
        """Say whether :meth:`lettered` noted these very bytes."""

    def dismiss(self, pipeline: str, batch_id: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
        """Note that quarantined rows of a batch need wait no more, by row id: ``reason``, ``who``, ``why``, ``at``.

        Of a row that was dismissed before, the first note stands.
        """

    def dismissed(self, pipeline: str) -> dict[tuple[str, str], dict[str, Any]]:
        """Return what :meth:`dismiss` noted, by batch id and row id."""

    def pin(self, pipeline: str, run_id: str, pin: Pin, window: Window | None = None, policy: str | None = None) -> Pin:
        """Pin a model for a run; the first one wins, and the one that holds is returned.

        :param window: the run's data interval, or its logical date twice; None when it has neither.
        :param policy: how the version was chosen.
        """

    def pin_of(self, pipeline: str, run_id: str, name: str) -> Pin | None:
        """Return the pin that holds for a run and a registered model."""

    def pin_history(self, name: str, pipeline: str | None = None, window: Window | None = None) -> list[dict[str, Any]]:
        """Return each run's pin of a model, oldest first: run_id, name, version, alias, digest, pinned_at, policy,
        window_start, window_end (ISO 8601 or None).

        :param pipeline: only this one's runs.
        :param window: only pins of runs whose window shares time with this one.
        """

    def saw_aliases(self, registry: str, name: str, aliases: Mapping[str, str]) -> None:
        """Note where all aliases of a model point now; one known from before that is not among them is gone.

        :param registry: the registry's address, without credentials.
        :param aliases: alias → version.
        """

    def alias_history(self, registry: str, name: str, alias: str) -> list[Sighting]:
        """Return where an alias was seen to point, oldest first. The registry keeps no such history."""

    def decided(self, pipeline: str, run_id: str, facts: Mapping[str, Any]) -> None:
        """Note one decide (policy digest, pin, counts per route); again for the same ``batch_id`` replaces it."""

    def decisions(self, pipeline: str, run_id: str) -> list[dict[str, Any]]:
        """Return the decisions of a run, oldest first."""

    def reviewed(self, pipeline: str, run_id: str, answers: Sequence[Mapping[str, Any]]) -> None:
        """Note what people answered, per ``row_id``; again for the same row replaces it."""

    def reviews(self, pipeline: str, run_id: str) -> list[dict[str, Any]]:
        """Return the answers of a run, oldest first."""
