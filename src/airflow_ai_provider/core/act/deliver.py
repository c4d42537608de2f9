"""One chunk of effects, in the one order: reserve → sent → send → record.

Invariants: nothing is sent that the ledger does not know as ``sent``; an effect that may have been sent before is
never taken for one that was not, whatever the receiver says now; what is recorded as done, refused, compensated or
parked is not sent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from airflow_ai_provider.core.act.effect import Effect, name_of
from airflow_ai_provider.core.act.sender import Answer, Sender
from airflow_ai_provider.core.ledger import Entry, Intent, Ledger, Outcome
from airflow_ai_provider.errors import IdempotencyConflictError

PAUSES_S = (0.2, 1.0)
"""Pauses before an unknown outcome is asked for again, under the same key; after the last it stays unknown."""


@dataclass(frozen=True)
class Settled:
    """How an effect stands after its chunk.

    :param state: ``done``, ``refused``, ``unknown``, or ``later`` (surely not done).
    :param is_news: True when this chunk made it so, False when the ledger knew.
    :param undone: what became of it since this run did it (``compensated``, ``parked``); the log says so.
    """

    state: str
    status: int = 0
    receiver_id: str = ""
    reason: str = ""
    is_news: bool = False
    undone: str = ""


CONFLICT = Settled(
    "refused", reason="conflict: this key is in the ledger with another payload; undo the first or rename the action"
)

_UNDONE = {
    "compensated": "compensated: this effect was done and undone; rename the action to do it anew",
    "parked": "parked: this effect was done, its undo failed and waits for a person",
}


@dataclass(frozen=True)
class Courier:
    """Take chunks of effects to a receiver by way of the ledger. Safe for several threads.

    :param fields: fields of an answer to keep, beside ``id`` (the undo needs them).
    :param resend_refused: send what was refused once more: a person has changed something at the receiver.
    :param sleep: waits a number of seconds.
    """

    ledger: Ledger
    sender: Sender
    fields: Collection[str] = ()
    resend_refused: bool = False
    sleep: Callable[[float], None] = time.sleep

    def deliver(self, effects: Sequence[Effect]) -> dict[str, Settled]:
        """Make effects true, as far as the receiver does.

        :param effects: each key once.
        :return: key → how it stands; all of it is in the ledger.
        """
        # 1. reserve, 2. sent: one commit for what is new
        known, settled = self._dispatch(effects)
        wanted = {e.intent.key: e.request for e in effects if e.intent.key not in settled}
        again = [key for key, entry in known.items() if self._is_due(entry)]
        runs = {e.intent.key: e.intent.run_id for e in effects}
        settled |= {key: self._known(entry, runs[key]) for key, entry in known.items() if not self._is_due(entry)}
        todo = {key: request for key, request in wanted.items() if key not in settled}
        may_be_done = {key for key in again if known[key].state in ("sent", "unknown")}
        for pause_s in (*PAUSES_S, None):
            if not todo:
                break
            if again:
                self.ledger.sent(again)
            # 3. send, 4. record
            answers = dict(zip(todo, self.sender.send(list(todo.values())), strict=True))
            judged = {key: judge(answer, key in may_be_done) for key, answer in answers.items()}
            self.ledger.record([self._outcome(key, answer) for key, answer in judged.items()])
            settled |= {key: _settle(answer) for key, answer in judged.items()}
            # Only what left and was not answered; what the receiver put off has had the sender's whole patience.
            todo = {k: todo[k] for k, a in judged.items() if a.state == "unknown" and answers[k].state != "later"}
            again = list(todo)
            may_be_done |= set(again)
            if todo and pause_s is not None:
                self.sleep(pause_s)
        return settled

    def _dispatch(self, effects: Sequence[Effect]) -> tuple[dict[str, Entry], dict[str, Settled]]:
        """Dispatch all; an effect whose key stands for another payload is refused, the others go on."""
        intents = [e.intent for e in effects]
        try:
            return self.ledger.dispatch(intents), {}
        except IdempotencyConflictError as error:
            settled = self.refuse_conflicts([i for i in intents if i.key in set(error.keys)])
        return self.ledger.dispatch([i for i in intents if i.key not in settled]), settled

    def refuse_conflicts(self, intents: Sequence[Intent]) -> dict[str, Settled]:
        """Note effects whose key stands for another payload: each gets a line of its own, never sent."""
        lines = [replace(i, key=name_of(i.key, i.fingerprint)) for i in intents]
        self.ledger.reserve(lines)
        self.ledger.record([Outcome(line.key, "refused", {"status": 0, "reason": CONFLICT.reason}) for line in lines])
        return {i.key: CONFLICT for i in intents}

    def _known(self, entry: Entry, run_id: str) -> Settled:
        """Tell how an effect stands that is not sent."""
        told = entry.outcome
        status, receiver_id, reason = int(told.get("status", 0)), str(told.get("id", "")), str(told.get("reason", ""))
        if entry.state in ("done", "refused"):
            return Settled(entry.state, status, receiver_id, reason)
        if entry.run_id == run_id and not self.resend_refused:
            # A clear of the run that did and undid it: its outcomes keep their bytes, and the undo finds nothing to do.
            return Settled("done", status, receiver_id, undone=entry.state)
        return Settled("refused", status, receiver_id, _UNDONE[entry.state])

    def _is_due(self, entry: Entry) -> bool:
        return entry.state in ("reserved", "sent", "unknown") or (entry.state == "refused" and self.resend_refused)

    def _outcome(self, key: str, answer: Answer) -> Outcome:
        # "later" surely did nothing: back to where it can be sent from, or undone by doing nothing
        state = "reserved" if answer.state == "later" else answer.state
        kept = {name: answer.body[name] for name in ("id", *self.fields) if answer.body and name in answer.body}
        return Outcome(
            key, state, {"status": answer.status, **kept} | ({"reason": answer.reason} if answer.reason else {})
        )


def judge(answer: Answer, may_be_done: bool) -> Answer:
    """Weigh an answer by what may have happened before it."""
    in_progress = answer.state == "refused" and answer.status == 409
    if may_be_done and (answer.state == "later" or in_progress):
        return replace(answer, state="unknown", reason=f"an earlier try may have been taken; now {answer.reason}")
    return answer


def _settle(answer: Answer) -> Settled:
    receiver_id = str((answer.body or {}).get("id", ""))
    return Settled(answer.state, answer.status, receiver_id, answer.reason, is_news=True)
