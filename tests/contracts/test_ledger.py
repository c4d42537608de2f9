"""What every ledger promises, over memory, SQLite and PostgreSQL."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from airflow_ai_provider.core.batch import BatchRef, Pin, Slice, Span
from airflow_ai_provider.core.ledger import Intent, Ledger, Outcome, SeenFile
from airflow_ai_provider.core.ledger_rules import TRANSITIONS
from airflow_ai_provider.core.ledger_sql import open_ledger
from airflow_ai_provider.errors import IdempotencyConflictError, LedgerStateError, SpanConflictError
from airflow_ai_provider.testing.ledger import MemoryLedger

START = datetime(2026, 11, 22, 12, tzinfo=UTC)
REF = BatchRef("batch", "orders-1", "file:///data/p/batch/orders-1", "sha256:aa", {"read": 2})


class Clock:
    """Each look is one second later."""

    def __init__(self) -> None:
        self.at = START

    def __call__(self) -> datetime:
        self.at += timedelta(seconds=1)
        return self.at


@pytest.fixture(params=["memory", "sqlite", "postgresql"])
def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Ledger]:
    if request.param == "memory":
        yield MemoryLedger(Clock())
        return
    fresh: Callable[[], str] = (
        request.getfixturevalue("fresh_postgres_url") if request.param == "postgresql" else lambda: ""
    )
    yield open_ledger(fresh() or f"sqlite:///{tmp_path}/deep/ledger.db", Clock())


def span(*slices: tuple[str, int, int], source: str = "kafka:orders", identity: str = "T1") -> Span:
    return Span(source, identity, tuple(Slice(*s) for s in slices), {"partitions": len(slices)})


def intent(key: str, **fields: Any) -> Intent:
    values: dict[str, Any] = {
        "pipeline": "p",
        "action": "ticket",
        "subject": f"s-{key}",
        "fingerprint": "f1",
        "run_id": "r1",
        "row_id": f"orders/0/{key}",
        "batch_id": "b",
        "step": 0,
        "saga": f"saga-{key}",
        "request": {"endpoint": "/tickets", "undo": {"method": "DELETE"}},
    }
    return Intent(key, **{**values, **fields})


def reach(ledger: Ledger, key: str, state: str) -> None:
    """Take an entry to a state along the legal way."""
    ledger.reserve([intent(key)])
    way = {"reserved": (), "sent": ("sent",), "compensated": ("sent", "done", "compensated")}
    way["parked"] = ("sent", "done", "parked")
    for step in way.get(state, ("sent", state)):
        ledger.sent([key]) if step == "sent" else ledger.record([Outcome(key, step, {"status": 201})])
    found = ledger.look_up(key)
    assert found and found.state == state


# --- claims ---


def test_the_same_run_key_gets_its_own_claim_whatever_it_asks_for(ledger: Ledger) -> None:
    first = ledger.claim("p", "r1/ingest", span(("0", 0, 10)), "r1")
    again = ledger.claim("p", "r1/ingest", span(("0", 0, 99), ("1", 0, 5)), "r1")
    assert first == again == ledger.claim_of("p", "r1/ingest")
    assert (first.state, first.ref, first.run_id) == ("claimed", None, "r1")
    assert again.span.facts == {"partitions": 1}


def test_rows_that_another_run_holds_are_refused(ledger: Ledger) -> None:
    ledger.claim("p", "r1/ingest", span(("0", 0, 10), ("1", 5, 9)), "r1")
    for wanted in [span(("0", 0, 10), ("1", 5, 9)), span(("0", 9, 20)), span(("1", 0, 6)), span(("0", 2, 3))]:
        with pytest.raises(SpanConflictError, match="r1") as caught:
            ledger.claim("p", "r2/ingest", wanted, "r2")
        assert caught.value.owner == "r1"
        assert set(caught.value.slices) <= set(wanted.slices)
    assert ledger.claim_of("p", "r2/ingest") is None


@pytest.mark.parametrize(
    ("pipeline", "wanted"),
    [
        ("p", span(("0", 10, 20))),
        ("p", span(("2", 0, 10))),
        ("p", span(("0", 0, 10), identity="T2")),
        ("p", span(("0", 0, 10), source="kafka:other")),
        ("q", span(("0", 0, 10))),
        ("p", span(("0", 5, 5))),
    ],
    ids=["next offsets", "other partition", "topic made anew", "other topic", "other pipeline", "no rows"],
)
def test_what_shares_no_row_is_free(ledger: Ledger, pipeline: str, wanted: Span) -> None:
    ledger.claim("p", "r1/ingest", span(("0", 0, 10)), "r1")
    assert ledger.claim(pipeline, "r2/ingest", wanted, "r2").run_id == "r2"


def test_a_landed_span_gives_its_batch_to_whoever_asks_for_exactly_it(ledger: Ledger) -> None:
    taken = span(("0", 0, 10), ("1", 0, 3))
    ledger.claim("p", "r1/ingest", taken, "r1")
    ledger.landed("p", "r1/ingest", REF)
    ledger.landed("p", "r1/ingest", REF)
    found = ledger.claim("p", "r2/ingest", taken, "r2")
    assert (found.run_id, found.state, found.ref) == ("r1", "landed", REF)
    with pytest.raises(SpanConflictError, match="landed"):
        ledger.claim("p", "r3/ingest", span(("0", 0, 11)), "r3")


def test_claims_are_told_oldest_first_with_their_times(ledger: Ledger) -> None:
    ledger.claim("p", "r1/ingest", span(("0", 0, 10)), "r1")
    ledger.claim("q", "r1/ingest", span(("0", 0, 10)), "r1")
    ledger.claim("p", "r2/ingest", span(("0", 10, 20)), "r2")
    ledger.landed("p", "r1/ingest", REF)
    assert [(c.pipeline, c.run_id) for c in ledger.claims()] == [("p", "r1"), ("q", "r1"), ("p", "r2")]
    (landed,) = ledger.claims("p", "landed")
    assert landed.claimed_at and landed.updated_at
    assert START < landed.claimed_at < landed.updated_at
    assert (landed.ref, landed.span) == (REF, span(("0", 0, 10)))
    (waiting,) = ledger.claims("p", "claimed")
    assert waiting.claimed_at == waiting.updated_at
    assert ledger.claims("absent") == []


def test_letters_are_noted_for_the_very_bytes(ledger: Ledger) -> None:
    assert not ledger.has_lettered("p", "r1", REF, "dead")
    ledger.lettered("p", "r1", REF, "dead")
    ledger.lettered("p", "r1", REF, "dead")
    assert ledger.has_lettered("p", "r1", REF, "dead")
    other = BatchRef(REF.kind, REF.batch_id, REF.uri, "sha256:bb", REF.counts)
    for pipeline, run, ref, topic in [("q", "r1", REF, "dead"), ("p", "r2", REF, "dead"), ("p", "r1", other, "dead"), ("p", "r1", REF, "x")]:  # noqa: E501  # fmt: skip
        assert not ledger.has_lettered(pipeline, run, ref, topic)


def test_landing_needs_a_claim_and_keeps_its_first_batch(ledger: Ledger) -> None:
    with pytest.raises(LedgerStateError, match="no claim"):
        ledger.landed("p", "r1/ingest", REF)
    ledger.claim("p", "r1/ingest", span(("0", 0, 10)), "r1")
    ledger.landed("p", "r1/ingest", REF)
    other = BatchRef("batch", "orders-1", REF.uri, "sha256:bb", {"read": 3})
    with pytest.raises(LedgerStateError, match="landed batch"):
        ledger.landed("p", "r1/ingest", other)


def test_position_and_files_come_from_the_claims(ledger: Ledger) -> None:
    ledger.claim("p", "r1", span(("0", 0, 10), ("1", 5, 9)), "r1")
    ledger.claim("p", "r2", span(("0", 10, 12), ("3", 7, 7)), "r2")
    ledger.claim("p", "other", span(("0", 0, 500), identity="T2"), "other")
    assert ledger.position("p", "kafka:orders", "T1") == {"0": 12, "1": 9, "3": 7}
    assert ledger.position("q", "kafka:orders", "T1") == {}
    files = Span("files:in", "", (Slice("a.csv", 0, 4, "sha256:1"), Slice("empty.csv", 0, 0, "sha256:0")))
    ledger.claim("p", "r3", files, "r3")
    later = Span("files:in", "", (Slice("a.csv", 0, 9, "sha256:2"),))
    ledger.claim("p", "r4", later, "r4")
    assert ledger.files_taken("p", "files:in") == {"a.csv": "sha256:2", "empty.csv": "sha256:0"}


def test_what_files_were_is_kept_by_source_and_path_and_the_last_word_holds(ledger: Ledger) -> None:
    first, second = SeenFile("csv 4 1", "sha256:1", 4, 1), SeenFile("csv 4 2", "sha256:1", 4, 1)
    ledger.saw_files("p", "files:in", {"a.csv": first, "b.csv": first})
    ledger.saw_files("p", "files:in", {"a.csv": second})
    ledger.saw_files("p", "files:in", {})
    ledger.saw_files("p", "files:other", {"a.csv": first})
    assert ledger.files_seen("p", "files:in") == {"a.csv": second, "b.csv": first}
    assert ledger.files_seen("q", "files:in") == {}
    assert ledger.files_taken("p", "files:in") == {}, "to have seen a file is not to have taken it"


def test_a_dismissal_is_noted_once_per_batch_and_row(ledger: Ledger) -> None:
    first = {"reason": "tombstone", "who": "mira", "why": "gone", "at": "2026-01-01T00:00:00+00:00"}
    ledger.dismiss("p", "b-1", {"t~1/0/7": first})
    ledger.dismiss("p", "b-1", {"t~1/0/7": {**first, "who": "otto"}, "t~1/0/8": first})
    ledger.dismiss("p", "b-2", {"t~1/0/7": first})
    assert ledger.dismissed("p") == {("b-1", "t~1/0/7"): first, ("b-1", "t~1/0/8"): first, ("b-2", "t~1/0/7"): first}
    assert ledger.dismissed("q") == {}


def test_a_released_claim_frees_its_rows_but_a_landed_one_stays(ledger: Ledger) -> None:
    ledger.claim("p", "r1", span(("0", 0, 10)), "r1")
    ledger.release("p", "r1")
    ledger.release("p", "r1")
    assert ledger.claim_of("p", "r1") is None
    assert ledger.position("p", "kafka:orders", "T1") == {}
    ledger.claim("p", "r2", span(("0", 0, 10)), "r2")
    ledger.landed("p", "r2", REF)
    ledger.release("p", "r2")
    assert ledger.claim_of("p", "r2") is not None


def test_a_try_that_came_before_one_without_rows_claims_none(ledger: Ledger) -> None:
    assert ledger.claim_nothing("p", "r1", "try-2") is None
    assert ledger.claim_nothing("p", "r1", "try-1") is None, "the later one stands"
    with pytest.raises(SpanConflictError, match="a later try .* r1 has found no rows.*clear the task") as caught:
        ledger.claim("p", "r1", span(("0", 0, 10)), "r1", "try-1")
    assert caught.value.owner_key == "r1"
    assert ledger.claim_of("p", "r1") is None
    for pipeline, run_key in [("q", "r1"), ("p", "r2")]:
        assert ledger.claim(pipeline, run_key, span(("0", 0, 10)), run_key, "try-1").run_key == run_key
    ledger.release("p", "r2")
    assert ledger.claim("p", "r1", span(("0", 0, 10)), "r1", "try-3").run_key == "r1"


def test_a_try_without_rows_takes_what_one_before_it_has_claimed(ledger: Ledger) -> None:
    held = ledger.claim("p", "r1", span(("0", 0, 10)), "r1", "try-1")
    assert ledger.claim_nothing("p", "r1", "try-2") == held
    assert ledger.claim("p", "r1", span(("0", 0, 99)), "r1", "try-1") == held
    ledger.release("p", "r1")
    assert ledger.claim("p", "r1", span(("0", 0, 99)), "r1", "try-1").span == span(("0", 0, 99)), "nothing was noted"


def test_tries_that_are_not_known_are_not_told_apart(ledger: Ledger) -> None:
    assert ledger.claim_nothing("p", "r1") is None
    assert ledger.claim("p", "r1", span(("0", 0, 10)), "r1", "try-1").state == "claimed"
    assert ledger.claim_nothing("p", "r2", "try-2") is None
    assert ledger.claim("p", "r2", span(("0", 10, 20)), "r2").state == "claimed"


def test_of_a_claim_and_a_note_at_the_same_moment_one_wins(ledger: Ledger) -> None:
    for number in range(20):
        key, gate = f"r{number}", threading.Barrier(2)

        def late(key: str = key, gate: threading.Barrier = gate, number: int = number) -> bool:
            gate.wait()
            try:
                ledger.claim("p", key, span(("0", number, number + 1)), key, "try-1")
            except SpanConflictError:
                return False
            return True

        with ThreadPoolExecutor(1) as pool:
            has_claimed = pool.submit(late)
            gate.wait()
            assert (ledger.claim_nothing("p", key, "try-2") is not None) == has_claimed.result()


def test_of_many_threads_one_gets_the_span(ledger: Ledger) -> None:
    gate = threading.Barrier(8)

    def take(number: int) -> str:
        gate.wait()
        try:
            return ledger.claim("p", f"r{number}", span(("0", number, 100)), f"r{number}").run_id
        except SpanConflictError as error:
            return f"not {error.owner}"

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(take, range(8)))
    winners = [a for a in answers if not a.startswith("not")]
    assert len(winners) == 1
    assert answers.count(f"not {winners[0]}") == 7


# --- effects ---


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


# --- pins, decisions, reviews ---


def pin(version: str, name: str = "triage") -> Pin:
    return Pin(name, version, "champion", f"sha256:{version}", {"model.onnx": "sha256:f"}, "onnx", {"inputs": []})


def test_the_first_pin_of_a_run_holds(ledger: Ledger) -> None:
    assert ledger.pin_of("p", "r1", "triage") is None
    assert ledger.pin("p", "r1", pin("3")) == pin("3")
    assert ledger.pin("p", "r1", pin("4")) == pin("3")
    assert ledger.pin("p", "r1", pin("9", "other")) == pin("9", "other")
    assert ledger.pin("p", "r2", pin("4")) == pin("4")
    assert ledger.pin_of("p", "r1", "triage") == pin("3")
    history = ledger.pin_history("triage")
    assert [(h["run_id"], h["version"], h["alias"], h["digest"]) for h in history] == [
        ("r1", "3", "champion", "sha256:3"),
        ("r2", "4", "champion", "sha256:4"),
    ]
    assert history[0]["pinned_at"] < history[1]["pinned_at"]
    assert {h["pipeline"] for h in history} == {"p"}


def hours(start: float, end: float) -> tuple[datetime, datetime]:
    return START + timedelta(hours=start), START + timedelta(hours=end)


def test_the_history_of_pins_is_asked_by_pipeline_and_window(ledger: Ledger) -> None:
    ledger.pin("p", "r1", pin("3"), hours(0, 1), "current")
    ledger.pin("p", "r2", pin("4"), hours(1, 2), "as_of")
    ledger.pin("p", "r3", pin("5"), hours(5, 5))
    ledger.pin("p", "r4", pin("6"))  # a run with neither interval nor logical date
    ledger.pin("other", "r1", pin("7"), hours(0, 1))
    first = ledger.pin_history("triage", "p")[0]
    assert (first["window_start"], first["window_end"]) == ("2026-11-22T12:00:00.000000+00:00", first["window_end"])
    assert [h["policy"] for h in ledger.pin_history("triage", "p")] == ["current", "as_of", None, None]

    def met(start: float, end: float) -> list[str]:
        return [h["version"] for h in ledger.pin_history("triage", "p", hours(start, end))]

    assert [met(0, 1), met(1, 2), met(0.5, 1.5), met(-1, 0), met(2, 3)] == [["3"], ["4"], ["3", "4"], [], []]
    assert [met(5, 5), met(1, 1), met(2, 2), met(4, 5), met(5, 6), met(4, 6)] == [["5"], ["4"], [], [], ["5"], ["5"]]
    assert len(ledger.pin_history("triage")) == 5


def test_an_alias_is_remembered_from_first_to_last_sight(ledger: Ledger) -> None:
    def seen(alias: str, registry: str = "http://m") -> list[tuple[str, int, int]]:
        found = ledger.alias_history(registry, "triage", alias)
        return [(s.version, (s.first_at - START).seconds, (s.last_at - START).seconds) for s in found]

    ledger.saw_aliases("http://m", "triage", {"champion": "3", "old": "1"})
    ledger.saw_aliases("http://m", "triage", {"champion": "3", "old": "1"})
    ledger.saw_aliases("http://m", "triage", {"champion": "4"})
    ledger.saw_aliases("http://m", "triage", {"champion": "4", "old": "2"})
    ledger.saw_aliases("http://elsewhere", "triage", {"champion": "9"})
    assert seen("champion") == [("3", 1, 2), ("4", 3, 4)]
    assert seen("old") == [("1", 1, 2), ("", 3, 3), ("2", 4, 4)]
    assert seen("champion", "http://elsewhere") == [("9", 5, 5)]
    assert seen("nobody") == []


def test_of_many_threads_that_see_an_alias_one_begins_its_line(ledger: Ledger) -> None:
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda _: ledger.saw_aliases("r", "triage", {"champion": "3"}), range(12)))
    (only,) = ledger.alias_history("r", "triage", "champion")
    assert only.version == "3" and only.first_at < only.last_at


def test_of_many_threads_one_pins(ledger: Ledger) -> None:
    gate = threading.Barrier(6)

    def take(number: int) -> str:
        gate.wait()
        return ledger.pin("p", "r1", pin(str(number))).version

    with ThreadPoolExecutor(6) as pool:
        assert len(set(pool.map(take, range(6)))) == 1


def test_decisions_and_reviews_are_kept_once(ledger: Ledger) -> None:
    ledger.decided("p", "r1", {"batch_id": "b1", "routes": {"act": 1}})
    ledger.decided("p", "r1", {"batch_id": "b2", "routes": {"act": 2}})
    ledger.decided("p", "r1", {"batch_id": "b1", "routes": {"act": 3}})
    assert ledger.decisions("p", "r1") == [
        {"batch_id": "b1", "routes": {"act": 3}},
        {"batch_id": "b2", "routes": {"act": 2}},
    ]
    answers = [{"row_id": "o/0/1", "before": "b", "after": "m", "responder": "Zoë"}, {"row_id": "o/0/2", "after": None}]
    ledger.reviewed("p", "r1", answers)
    ledger.reviewed("p", "r1", [{**answers[0], "after": "b"}])
    ledger.reviewed("p", "r1", [])
    assert ledger.reviews("p", "r1") == [{**answers[0], "after": "b"}, answers[1]]
    assert ledger.reviews("p", "r2") == ledger.decisions("p", "r2") == []
