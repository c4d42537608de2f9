"""Compensate: undo, in reverse, what a failed run has left half done.

Invariants: only what the ledger says is done is undone, the last step first; each undo is an effect with a key of its
own, so running it again undoes nothing twice; an undo that fails is parked and the others go on; what may have been
done and is not known is named, never passed over.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from airflow_ai_provider.core.act.deliver import judge
from airflow_ai_provider.core.act.effect import name_of
from airflow_ai_provider.core.act.progress import Progress
from airflow_ai_provider.core.act.sender import Answer, Request, Sender
from airflow_ai_provider.core.act.value import fill
from airflow_ai_provider.core.ledger import Entry, Intent, Ledger, Outcome
from airflow_ai_provider.errors import (
    ActionRejectedError,
    ActionUnavailableError,
    AiProviderError,
    CompensationError,
    SpecError,
    UnknownOutcomeError,
)

log = logging.getLogger(__name__)
SCOPES = ("row", "run")


def compensate(
    ledger: Ledger,
    sender: Sender,
    *,
    pipeline: str,
    run_id: str,
    steps: Sequence[str] = (),
    failed: Collection[str] = (),
    scope: str = "row",
    chunk: int = 256,
    progress: Callable[[str], None] = log.info,
) -> dict[str, int]:
    """Undo what is done of the sagas that are not complete, in reverse.

    :param steps: the names of the run's actions, in order.
    :param failed: names of the tasks that failed in this run; an action among them that did not get through its rows
        makes every saga without it incomplete. One that was skipped makes none so.
    :param scope: ``row`` undoes the incomplete sagas; ``run`` undoes all of the run as soon as one is incomplete or an
        action failed.
    :param chunk: undos per ledger commit.
    :param progress: gets a line about every five seconds, and one at the end.
    :return: counts of entries: ``compensated``, ``kept`` (done and left so), ``parked``.
    :raises CompensationError: some undo failed, or an outcome is unknown (``keys``, ``counts``); all others are undone,
        and a retry tries these again.
    """
    if scope not in SCOPES:
        raise SpecError(f"scope {scope!r} is not one of {', '.join(SCOPES)}.", faults=[("scope", scope)])
    entries = [e for e in ledger.entries(pipeline, run_id) if not e.undoes]
    finished = ledger.finished_actions(pipeline, run_id)
    broken = find_broken(entries, [s for s in steps if s in failed and s not in finished], scope)
    doubtful = [e for e in entries if e.saga in broken and e.state in ("sent", "unknown")]
    doomed = [e for e in entries if e.saga in broken and e.state in ("done", "parked") and e.request.get("undo")]
    work = _Undoing(ledger, sender, Progress("undo", len(doomed), progress))
    try:
        for _, same_step in groupby(sorted(doomed, key=lambda e: -e.step), key=lambda e: e.step):
            for some in _batched(list(same_step), chunk):
                work.undo(some)
    finally:
        sender.close()
    counts = {
        "compensated": work.undone,
        "kept": sum(e.state == "done" for e in entries) - sum(e.state == "done" for e in doomed),
        "parked": len(work.errors),
    }
    progress("undo: {compensated} effects undone, {kept} left as they are, {parked} parked".format(**counts))
    _demand_all(counts, work.errors | {e.key: _in_doubt(e) for e in doubtful}, pipeline, run_id)
    return counts


def find_broken(entries: Sequence[Entry], missing: Collection[str], scope: str) -> set[str]:
    """Return the sagas to undo.

    :param missing: actions that failed before they were through: a saga without them is incomplete.
    """
    sagas: dict[str, dict[str, str]] = {}
    for entry in entries:
        sagas.setdefault(entry.saga, {}).setdefault(entry.action, entry.state)
        if entry.state != "done":
            sagas[entry.saga][entry.action] = entry.state
    broken = {
        saga
        for saga, states in sagas.items()
        if any(state != "done" for state in states.values()) or any(action not in states for action in missing)
    }
    return set(sagas) if scope == "run" and (broken or missing) else broken


@dataclass
class _Undoing:
    """Undo chunk by chunk; what fails is kept as an error by key."""

    ledger: Ledger
    sender: Sender
    watch: Progress
    undone: int = 0
    errors: dict[str, AiProviderError] = field(default_factory=dict)

    def undo(self, entries: Sequence[Entry]) -> None:
        """Undo entries of one step: reserve → sent → send → record, as for any effect."""
        requests, faults = self._requests(entries)
        held = {
            e.undoes: e
            for e in self.ledger.reserve([_intent(e, requests[e.key]) for e in entries if e.key in requests])
        }
        todo = [key for key, undo in held.items() if undo.state != "done"]
        self.ledger.sent([held[key].key for key in todo])
        answers = {key: Answer("done", 0, None, "undone by an earlier try") for key in held if key not in todo}
        for key, answer in zip(todo, self.sender.send([requests[key] for key in todo]), strict=True):
            answers[key] = _judge(answer, held[key].state in ("sent", "unknown"))
        outcomes: list[Outcome] = []
        for entry in entries:
            error = faults.get(entry.key) or _error(entry, requests[entry.key], answers[entry.key])
            outcomes += _outcomes(entry, held.get(entry.key), answers.get(entry.key), error)
            if error:
                self.errors[entry.key] = error
            else:
                self.undone += 1
        self.ledger.record(outcomes)
        self.watch.count(len(todo), ["parked" if e.key in self.errors else "done" for e in entries])

    def _requests(self, entries: Sequence[Entry]) -> tuple[dict[str, Request], dict[str, AiProviderError]]:
        requests: dict[str, Request] = {}
        faults: dict[str, AiProviderError] = {}
        for entry in entries:
            try:
                requests[entry.key] = self._request(entry)
            except SpecError as error:
                faults[entry.key] = error
        return requests, faults

    def _request(self, entry: Entry) -> Request:
        undo, address = entry.request["undo"], entry.request.get("address")
        if address != self.sender.address:
            raise SpecError(
                f"{_name(entry)} was done at {address}, the undo's connection goes to {self.sender.address}. "
                "Undo it with the connection of its action.",
                faults=[("api_conn_id", str(address))],
            )
        return Request(name_of("undo", entry.key), undo["method"], fill(undo["endpoint"], entry.outcome))


def _intent(entry: Entry, request: Request) -> Intent:
    return Intent(
        key=request.key,
        pipeline=entry.pipeline,
        action=entry.action,
        subject=entry.subject,
        fingerprint=name_of(request.method, request.path),
        run_id=entry.run_id,
        row_id=entry.row_id,
        batch_id=entry.batch_id,
        step=entry.step,
        saga=entry.saga,
        undoes=entry.key,
        request={"method": request.method, "endpoint": request.path},
    )


def _outcomes(
    entry: Entry, undo: Entry | None, answer: Answer | None, error: AiProviderError | None
) -> Iterator[Outcome]:
    told = {"status": answer.status, "reason": answer.reason} if answer else {"status": 0, "reason": str(error)}
    if undo and answer and undo.state != "done":
        yield Outcome(undo.key, "reserved" if answer.state == "later" else answer.state, told)
    yield Outcome(entry.key, "parked" if error else "compensated", {**entry.outcome, "undo": told})


def _judge(answer: Answer, may_be_done: bool) -> Answer:
    if answer.status == 410:  # it was there and is gone for good; a 404 may be a wrong address as well
        return Answer("done", 410, None, "was gone already")
    return judge(answer, may_be_done)


def _error(entry: Entry, request: Request, answer: Answer) -> AiProviderError | None:
    if answer.state == "done":
        return None
    kind = {"later": ActionUnavailableError, "unknown": UnknownOutcomeError}.get(answer.state, ActionRejectedError)
    return kind(
        f"undo of {_name(entry)} ({request.method} {request.path}): {answer.state}, {answer.reason or answer.status}. "
        "It is parked in the ledger: make the undo possible and run this task again, or undo it by hand.",
        key=entry.key,
    )


def _in_doubt(entry: Entry) -> AiProviderError:
    return UnknownOutcomeError(
        f"{_name(entry)} is {entry.state}: it may have been done, so it can be neither undone nor passed over. "
        f"Clear the task {entry.action} (it asks again under the same key), then run this task again.",
        key=entry.key,
    )


def _name(entry: Entry) -> str:
    return f"{entry.action} for {entry.subject} (key {entry.key})"


def _demand_all(counts: Mapping[str, int], errors: Mapping[str, AiProviderError], pipeline: str, run_id: str) -> None:
    if errors:
        keys = list(errors)
        named = ", ".join(keys[:10]) + (f" and {len(keys) - 10} more" if len(keys) > 10 else "")
        raise CompensationError(
            f"{len(errors)} effects of run {run_id} of {pipeline} could not be undone, {counts['compensated']} were. "
            f"Keys: {named}. Each error says what to do; the ledger holds them.",
            list(errors.values()),
            keys=keys,
            counts=dict(counts),
        )


def _batched(entries: Sequence[Entry], size: int) -> Iterator[Sequence[Entry]]:
    return (entries[start : start + size] for start in range(0, len(entries), size))
