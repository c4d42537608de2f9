"""What every ledger promises of effects on the outside, over memory, SQLite and PostgreSQL."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from airflow_ai_provider.core.batch import BatchRef
from airflow_ai_provider.core.ledger import Ledger, Outcome
from airflow_ai_provider.core.ledger_rules import TRANSITIONS
from airflow_ai_provider.errors import IdempotencyConflictError, LedgerStateError
from tests.contracts.ledgers import REF, intent, reach


def test_reserve_keeps_order_and_gives_known_keys_as_they_are(ledger: Ledger) -> None:
    ledger.reserve([intent("b")])
    ledger.sent(["b"])
    ledger.record([Outcome("b", "done", {"status": 201, "id": "T-1", "reason": "naïve ✓"})])
    entries = ledger.reserve([intent("c"), intent("b"), intent("a"), intent("c")])
    assert [e.key for e in entries] == ["c", "b", "a", "c"]
    assert [e.state for e in entries] == ["reserved", "done", "reserved", "reserved"]
    assert entries[1].outcome == {"status": 201, "id": "T-1", "reason": "naïve ✓"}
    assert entries[1].attempts == 1
    assert entries[0] == ledger.look_up("c")
    assert entries[0].updated_at.tzinfo is not None
    assert entries[0].request == {"endpoint": "/tickets", "undo": {"method": "DELETE"}}
    assert ledger.reserve([]) == []
    assert ledger.look_up("nobody") is None


def test_a_known_key_with_another_payload_reserves_nothing(ledger: Ledger) -> None:
    ledger.reserve([intent("a"), intent("b")])
    with pytest.raises(IdempotencyConflictError) as caught:
        ledger.reserve([intent("new"), intent("b", fingerprint="f2"), intent("a", fingerprint="f2")])
    assert sorted(caught.value.keys) == ["a", "b"]
    assert ledger.look_up("new") is None
    with pytest.raises(IdempotencyConflictError):
        ledger.reserve([intent("x"), intent("x", fingerprint="f2")])
    assert ledger.look_up("x") is None


def test_dispatch_marks_what_is_new_as_sent_and_gives_what_was_known(ledger: Ledger) -> None:
    assert ledger.dispatch([intent("a"), intent("b")]) == {}
    first = ledger.look_up("a")
    assert first and (first.state, first.attempts, first.outcome) == ("sent", 1, {})
    ledger.record([Outcome("a", "done", {"id": "T-1"})])
    reach(ledger, "r", "reserved")
    known = ledger.dispatch([intent("c"), intent("a"), intent("r"), intent("b")])
    assert {k: e.state for k, e in known.items()} == {"a": "done", "r": "reserved", "b": "sent"}
    assert known["a"] == ledger.look_up("a")
    assert [e.key for e in ledger.entries("p")] == ["a", "b", "r", "c"]
    assert ledger.dispatch([intent("a")]).keys() == {"a"}
    assert ledger.dispatch([]) == {}


def test_a_dispatch_with_another_payload_writes_nothing(ledger: Ledger) -> None:
    ledger.dispatch([intent("a")])
    with pytest.raises(IdempotencyConflictError) as caught:
        ledger.dispatch([intent("new"), intent("a", fingerprint="f2")])
    assert caught.value.keys == ["a"]
    with pytest.raises(IdempotencyConflictError):
        ledger.dispatch([intent("x"), intent("x", fingerprint="f2")])
    assert ledger.look_up("new") is ledger.look_up("x") is None


def test_of_many_threads_one_may_send(ledger: Ledger) -> None:
    gate = threading.Barrier(6)
    wanted = [intent(f"k{n}") for n in range(150)]

    def take(number: int) -> list[str]:
        gate.wait()
        mine = wanted if number % 2 else wanted[::-1]
        known = ledger.dispatch(mine)
        return [i.key for i in mine if i.key not in known]

    with ThreadPoolExecutor(6) as pool:
        new = [key for keys in pool.map(take, range(6)) for key in keys]
    assert sorted(new) == sorted(i.key for i in wanted), "each key is new to one of them only"


@pytest.mark.parametrize("state", sorted(TRANSITIONS))
@pytest.mark.parametrize("to", sorted(TRANSITIONS))
def test_only_legal_moves(ledger: Ledger, state: str, to: str) -> None:
    reach(ledger, "k", state)
    before = ledger.look_up("k")
    assert before
    reach(ledger, "free", "reserved")

    def move() -> None:
        if to == "sent":
            ledger.sent(["free", "k"])
        else:
            ledger.record([Outcome("k", to, {"status": 299})])

    if to in TRANSITIONS[state]:
        move()
        after = ledger.look_up("k")
        assert after and after.state == to
        assert after.attempts == before.attempts + (to == "sent")
        assert after.updated_at > before.updated_at
        assert after.outcome == ({} if to == "sent" else {"status": 299})
    elif to == state:
        move()
        assert ledger.look_up("k") == before
    else:
        with pytest.raises(LedgerStateError, match=f"is {state} and cannot become {to}"):
            move()
        assert ledger.look_up("k") == before
        free = ledger.look_up("free")
        assert free and free.state == "reserved", "one illegal move must move none"


def test_moving_what_was_never_reserved_is_refused(ledger: Ledger) -> None:
    with pytest.raises(LedgerStateError, match="absent"):
        ledger.sent(["ghost"])
    with pytest.raises(LedgerStateError, match="absent"):
        ledger.record([Outcome("ghost", "done")])
    ledger.sent([])
    ledger.record([])


def test_entries_by_step_then_reservation(ledger: Ledger) -> None:
    ledger.reserve([intent("page-1", action="page", step=1, saga="x"), intent("t2", saga="y"), intent("t1", saga="x")])
    ledger.reserve([intent("t0", run_id="r0", saga="z"), intent("other", pipeline="q")])
    ledger.sent(["t1"])
    keys = [e.key for e in ledger.entries("p")]
    assert keys == ["t2", "t1", "t0", "page-1"]
    assert [e.key for e in ledger.entries("p", run_id="r1")] == ["t2", "t1", "page-1"]
    assert [e.key for e in ledger.entries("p", action="page")] == ["page-1"]
    assert [e.key for e in ledger.entries("p", saga="x")] == ["t1", "page-1"]
    assert [e.key for e in ledger.entries("p", states=["sent", "done"])] == ["t1"]
    assert ledger.entries("p", states=[]) == []


def test_open_sagas_wait_for_an_answer_an_undo_or_a_person(ledger: Ledger) -> None:
    for key, states in {
        "all-done": ["done", "done"],
        "refused-alone": ["refused"],
        "half": ["done", "refused"],
        "unanswered": ["sent"],
        "unknown": ["done", "unknown"],
        "undone": ["compensated", "refused"],
        "stuck": ["parked", "refused"],
        "waiting": ["reserved"],
    }.items():
        for number, state in enumerate(states):
            name = f"{key}/{number}"
            ledger.reserve([intent(name, saga=key, step=number)])
            for step in ("sent", "done", state) if state in ("compensated", "parked") else ("sent", state):
                if state == "reserved":
                    break
                ledger.sent([name]) if step == "sent" else ledger.record([Outcome(name, step)])
    ledger.reserve([intent("undo", saga="all-done", undoes="all-done/0")])
    assert sorted(ledger.open_sagas("p", "r1")) == ["half", "stuck", "unanswered", "unknown", "waiting"]
    assert ledger.open_sagas("p", "r2") == []


def test_of_many_threads_each_key_gets_one_row(ledger: Ledger) -> None:
    gate = threading.Barrier(6)
    wanted = [f"k{n}" for n in range(200)]

    def take(number: int) -> list[str]:
        gate.wait()
        order = wanted if number % 2 else wanted[::-1]
        return [e.run_id for e in ledger.reserve([intent(k, run_id=f"r{number}") for k in order])][
            :: 1 if number % 2 else -1
        ]

    with ThreadPoolExecutor(6) as pool:
        seen = list(pool.map(take, range(6)))
    assert len(ledger.entries("p")) == 200
    assert all(owners == seen[0] for owners in seen), "everybody sees the same owner of each key"


def test_more_keys_than_one_statement_takes(ledger: Ledger) -> None:
    intents = [intent(f"k{n}") for n in range(2_500)]
    ledger.reserve(intents)
    ledger.sent([i.key for i in intents])
    ledger.record([Outcome(i.key, "done", {"id": i.key}) for i in intents])
    again = ledger.reserve(intents)
    assert [e.key for e in again] == [i.key for i in intents]
    assert {e.state for e in again} == {"done"}
    assert [e.key for e in ledger.entries("p", states=["done"])] == [i.key for i in intents]


def test_finished_actions_keep_their_outcomes(ledger: Ledger) -> None:
    ledger.finished("p", "r1", "ticket", REF)
    other = BatchRef("outcomes", "o-2", "file:///o", "sha256:cc", {"rows": 1})
    ledger.finished("p", "r1", "ticket", other)
    ledger.finished("p", "r1", "page", REF)
    assert ledger.finished_actions("p", "r1") == {"ticket": other, "page": REF}
    assert ledger.finished_actions("p", "r2") == {}
