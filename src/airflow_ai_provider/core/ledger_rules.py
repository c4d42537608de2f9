"""What may follow what in a ledger: pure functions that every ledger uses, so the fake and the SQL one cannot disagree.

Invariants: an entry moves only along :data:`TRANSITIONS`; rows of a source are claimed by one run only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from airflow_ai_provider.core.batch import BatchRef, Slice, Span
from airflow_ai_provider.core.ledger import Claim, Intent
from airflow_ai_provider.errors import IdempotencyConflictError, LedgerStateError, SpanConflictError

TRANSITIONS: Mapping[str, frozenset[str]] = {
    # refused without sending: our own rule says no (one key, two payloads)
    "reserved": frozenset({"sent", "refused"}),
    # sent again: a killed try left it so. reserved again: the receiver said "later", it surely did nothing
    "sent": frozenset({"sent", "done", "refused", "unknown", "reserved"}),
    "unknown": frozenset({"sent"}),
    # only by an explicit resend: a person changed something at the receiver
    "refused": frozenset({"sent"}),
    "done": frozenset({"compensated", "parked"}),
    # the undo failed; a later try may pass, or fail for another reason
    "parked": frozenset({"compensated", "parked"}),
    "compensated": frozenset(),
}
"""State of an entry → the states it may move to."""


def check_move(key: str, state: str, to: str) -> bool:
    """Say whether an entry moves.

    :return: True when it moves, False when it is there already (and nothing is to be written).
    :raises LedgerStateError: when :data:`TRANSITIONS` does not allow it; a retry reads the entry again.
    """
    if to in TRANSITIONS.get(state, ()):
        return True
    if state == to:
        return False
    allowed = ", ".join(sorted(TRANSITIONS.get(state, ()))) or "nowhere"
    raise LedgerStateError(
        f"ledger entry {key} is {state} and cannot become {to} (from there: {allowed}). "
        "Another process has moved it, or nothing was reserved; the retry reads it again.",
        key=key,
        state=state,
        to=to,
    )


def shared_rows(one: Slice, other: Slice) -> Slice | None:
    """Return the rows that two slices of the same source share. Another digest is another file, whatever its path."""
    first, end = max(one.first, other.first), min(one.end, other.end)
    same_rows = one.partition == other.partition and one.digest == other.digest
    return replace(one, first=first, end=end) if same_rows and first < end else None


def settle_claim(span: Span, rivals: Iterable[Claim]) -> Claim | None:
    """Decide about a span that this run does not hold yet.

    :param rivals: other runs' claims of the same pipeline, source and identity.
    :return: the claim that landed exactly this span, or None when the span is free.
    :raises SpanConflictError: when another run holds some of these rows; a retry does not help.
    """
    for rival in rivals:
        found = (shared_rows(mine, taken) for mine in span.slices for taken in rival.span.slices)
        shared = [rows for rows in found if rows is not None]
        if not shared:
            continue
        if rival.state == "landed" and set(rival.span.slices) == set(span.slices):
            return rival
        where = ", ".join(f"{s.partition}[{s.first}:{s.end}]" for s in shared[:5])
        then = (
            "There they are landed, so none is missing; clear that run to work on them again."
            if rival.state == "landed"
            else "Let it finish, or clear its ingest task. If it never shall: airflow ai claims release "
            f"'{rival.run_key}' --pipeline {rival.pipeline}"
        )
        raise SpanConflictError(
            f"{span.source}: rows {where} are held by run {rival.run_id} ({rival.state}); "
            f"a row belongs to one run. {then}",
            owner=rival.run_id,
            owner_key=rival.run_key,
            slices=shared,
        )
    return None


def check_attempt(run_key: str, attempt: str, closed_by: str) -> None:
    """Refuse a claim to a try whose successor has found no rows.

    :param attempt: the try that asks; empty when it is not known.
    :param closed_by: the last try that found none; empty when there was none.
    :raises SpanConflictError: when the one that asks is an earlier one; a retry does not help.
    """
    if attempt and attempt < closed_by:
        raise SpanConflictError(
            f"a later try of the task that plans {run_key} has found no rows, and its empty batch stands; this one is "
            "too late to claim any. They wait for the next run. To have them in this one, clear the task.",
            owner_key=run_key,
        )


def check_landing(claim: Claim | None, pipeline: str, run_key: str, ref: BatchRef) -> bool:
    """Say whether a claim is to be marked landed.

    :return: False when it has landed this very batch already.
    :raises LedgerStateError: when there is no claim, or it landed another batch; a retry may help.
    """
    if claim is None:
        raise LedgerStateError(
            f"{run_key} of {pipeline} holds no claim, so batch {ref.batch_id} cannot land. "
            "It was released meanwhile: the retry claims again.",
            run_key=run_key,
        )
    if claim.ref is None:
        return True
    if claim.ref.digest == ref.digest:
        return False
    raise LedgerStateError(
        f"{run_key} of {pipeline} has landed batch {claim.ref.batch_id} as {claim.ref.digest[:19]}, "
        f"not {ref.digest[:19]}. The retry takes the landed one.",
        run_key=run_key,
    )


def check_fingerprints(known: Mapping[str, str], intents: Iterable[Intent]) -> None:
    """Refuse a key that comes with two payloads.

    :param known: key → fingerprint, of the ledger.
    :raises IdempotencyConflictError: naming every such key in ``keys``; a retry does not help.
    """
    seen, clashes = dict(known), []
    for intent in intents:
        if seen.setdefault(intent.key, intent.fingerprint) != intent.fingerprint:
            clashes.append(intent)
    if clashes:
        named = ", ".join(f"{i.action} for {i.subject}" for i in clashes[:5])
        raise IdempotencyConflictError(
            f"{len(clashes)} of the actions are in the ledger with another payload: {named}. "
            "One key stands for one effect: undo the first, or give the changed action a new name.",
            keys=[i.key for i in clashes],
        )


def open_among(found: Iterable[tuple[str, str]]) -> list[str]:
    """Return the sagas that wait for an answer, an undo or a person.

    :param found: (saga, state) of each entry that is not itself an undo, in any number and order.
    """
    states: dict[str, set[str]] = {}
    for saga, state in found:
        states.setdefault(saga, set()).add(state)
    waiting = {"reserved", "sent", "unknown", "parked"}
    return [saga for saga, s in states.items() if not waiting.isdisjoint(s) or {"refused", "done"} <= s]


def settle_aliases(latest: Mapping[str, str], seen: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Hold what is seen of a model's aliases against what was seen last.

    :param latest: alias → version, as of the last sighting.
    :param seen: alias → version, now.
    :return: what is new (an alias that is gone points to ""), and the aliases that still point where they did.
    """
    now = {alias: "" for alias in latest} | dict(seen)
    fresh = {alias: version for alias, version in now.items() if latest.get(alias) != version}
    return fresh, [alias for alias in now if alias not in fresh]
