"""Act as a flow: what is sent, what lands, what a retry finds."""

from __future__ import annotations

import json
import pickle
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from airflow_ai_provider.core.act.progress import Progress
from airflow_ai_provider.core.act.sender import Answer, Request
from airflow_ai_provider.core.act.value import HttpAction, Undo
from airflow_ai_provider.core.batch import BatchRef
from airflow_ai_provider.core.ledger import Outcome
from airflow_ai_provider.errors import (
    ActionUnavailableError,
    IdempotencyConflictError,
    SagaFailedError,
    SpecError,
    UnknownOutcomeError,
)
from airflow_ai_provider.testing.sender import ScriptedSender
from tests.core.act.world import PAGE, TICKET, World

SUBJECTS = [f"B-{n}" for n in range(10)]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def about(*subjects: str) -> Callable[[Request], bool]:
    """Whether a request is about one of these subjects."""
    return lambda r: bool(r.body) and json.loads(r.body or b"{}").get("subject") in subjects


def test_every_row_gets_its_effect_once_and_its_outcome(world: World) -> None:
    ref = world.act([world.rows(SUBJECTS)])
    assert (ref.kind, ref.counts) == ("outcomes", {"rows": 10, "done": 10, "refused": 0, "unknown": 0, "muted": 0})
    rows = world.outcomes(ref)
    assert [r["_row_id"] for r in rows] == [f"orders-1/0/{n}" for n in range(10)]
    assert {(r["state"], r["status"], r["reason"]) for r in rows} == {("done", 201, "")}
    assert world.receiver.effects == {r["key"]: 1 for r in rows}
    assert all(r["receiver_id"] == f"T-{r['key'][:8]}" for r in rows)
    entries = world.ledger.entries("p", "r1")
    assert [(e.subject, e.state, e.attempts, e.step) for e in entries] == [(s, "done", 1, 0) for s in SUBJECTS]
    assert entries[0].request["undo"] == {"method": "DELETE", "endpoint": "/tickets/{id}"}
    assert entries[0].request["address"] == "http://receiver.test"
    assert entries[0].outcome == {"status": 201, "id": f"T-{entries[0].key[:8]}"}
    assert world.ledger.finished_actions("p", "r1") == {"ticket": ref}
    assert world.receiver.bodies()[0] == {"subject": "B-0"}
    manifest = world.store.manifest(ref)
    assert manifest.facts["action"]["endpoint"] == "/tickets"
    assert manifest.facts["inputs"][0]["tables"] == ["act"]


def test_a_retry_sends_nothing_and_lands_the_same_bytes(world: World) -> None:
    rows = world.rows(SUBJECTS)
    first = world.act([rows])
    assert world.act([rows]) == first
    assert len(world.receiver.requests) == 10


def test_another_run_with_the_same_subject_does_nothing_twice(world: World) -> None:
    world.act([world.rows(SUBJECTS)])
    later = world.act([world.rows(SUBJECTS[:3], "orders-2")], run_id="r2")
    assert later.counts["done"] == 3
    assert len(world.receiver.requests) == 10
    assert [r["status"] for r in world.outcomes(later)] == [201] * 3
    assert world.states("r2") == []


def test_rows_with_one_subject_are_one_effect(world: World) -> None:
    ref = world.act([world.rows(["a", "b", "a", "a", "b", "c"]), world.rows(["c", "d"], "orders-2")], chunk=2)
    assert ref.counts["rows"] == ref.counts["done"] == 8
    assert len(world.receiver.requests) == 4
    by_row = {r["_row_id"]: r["key"] for r in world.outcomes(ref)}
    assert by_row["orders-1/0/0"] == by_row["orders-1/0/2"] == by_row["orders-1/0/3"]


def test_rows_without_a_subject_are_each_their_own(world: World) -> None:
    ref = world.act([world.rows([None, None, "x\0y"])])
    assert len({r["key"] for r in world.outcomes(ref)}) == 3
    subjects = [e.subject for e in world.ledger.entries("p")]
    assert subjects == ["orders-1/0/0", "orders-1/0/1", "x\\u0000y"]


def test_no_rows_land_too(world: World) -> None:
    for batches in ([], [world.rows([])]):
        ref = world.act(batches)
        assert ref.counts == {"rows": 0, "done": 0, "refused": 0, "unknown": 0, "muted": 0}
        assert world.outcomes(ref) == []
    assert world.receiver.requests == []


def test_muted_sends_nothing_and_leaves_the_ledger_alone(world: World) -> None:
    landed: list[BatchRef] = []
    rows = world.rows(SUBJECTS)
    ref = world.act([rows], run={"muted": True}, landed=landed.append)
    assert ref.counts == {"rows": 10, "done": 0, "refused": 0, "unknown": 0, "muted": 10}
    assert {r["state"] for r in world.outcomes(ref)} == {"muted"}
    assert landed == [ref]
    assert world.receiver.requests == []
    assert world.ledger.entries("p") == []
    assert world.ledger.finished_actions("p", "r1") == {}
    real = world.act([rows])
    assert (real.counts["done"], real.batch_id != ref.batch_id) == (10, True)
    with pytest.raises(SpecError):
        world.act([rows], HttpAction("t", "/t", json="{{ row.nope }}"), run={"muted": True})


def test_templates_and_endpoints_are_filled_from_the_row(world: World) -> None:
    action = HttpAction("t", "/patients/{subject}/n", "PUT", '{"n": {{ row.n }}, "m": "{{ run.model.version }}"}')
    world.act([world.rows(["a/1", "b"], n=[1, 2])], action)
    assert sorted((r.method, r.path) for r in world.receiver.requests) == [
        ("PUT", "/patients/a%2F1/n"),
        ("PUT", "/patients/b/n"),
    ]
    assert sorted(b["n"] for b in world.receiver.bodies()) == [1, 2]
    assert {b["m"] for b in world.receiver.bodies()} == {"3"}


def test_a_row_that_the_template_does_not_fit_stops_before_its_chunk(world: World) -> None:
    action = HttpAction("t", "/t", json='{"half": {{ 1 / row.n }}}')
    rows = world.rows(SUBJECTS, n=[1, 1, 1, 1, 1, 0, 1, 1, 1, 1])
    with pytest.raises(SpecError, match="action t: row orders-1/0/5: division by zero"):
        world.act([rows], action)
    assert set(world.states()) == {"done"}, "what was under way was recorded"
    assert len(world.receiver.requests) == 4


# --- refusals ---


def test_refusals_beyond_the_limit_fail_after_landing(world: World) -> None:
    world.receiver = ScriptedSender(lambda r, _: "refused" if about("B-2", "B-7")(r) else "done")
    landed: list[BatchRef] = []
    rows = world.rows(SUBJECTS)
    with pytest.raises(SagaFailedError, match="2 of 10 rows were refused, max_refused allows 0") as caught:
        world.act([rows], landed=landed.append)
    error = pickle.loads(pickle.dumps(caught.value))
    assert [error.ref] == landed
    assert "First: row orders-1/0/2: 422: scripted to refuse" in str(error)
    assert world.outcomes(error.ref)[2] | {"key": ""} == {
        "_row_id": "orders-1/0/2", "key": "", "state": "refused", "status": 422, "receiver_id": "",
        "reason": "422: scripted to refuse",
    }  # fmt: skip
    assert error.ref.counts == {"rows": 10, "done": 8, "refused": 2, "unknown": 0, "muted": 0}
    assert world.ledger.finished_actions("p", "r1") == {"ticket": error.ref}
    with pytest.raises(SagaFailedError):
        world.act([rows])
    assert len(world.receiver.requests) == 10, "what was refused is not sent again"


@pytest.mark.parametrize(
    ("limit", "fails"), [(0, True), (1, True), (2, False), (0.1, True), (0.2, False), (None, False)]
)
def test_the_limit_is_a_count_or_a_share(world: World, limit: float | None, fails: bool) -> None:
    world.receiver = ScriptedSender(lambda r, _: "refused" if about("B-2", "B-7")(r) else "done")
    action = HttpAction("ticket", "/tickets", max_refused=limit)
    if fails:
        with pytest.raises(SagaFailedError):
            world.act([world.rows(SUBJECTS)], action)
    else:
        assert world.act([world.rows(SUBJECTS)], action).counts["refused"] == 2


def test_an_explicit_resend_asks_again_for_what_was_refused(world: World) -> None:
    world.receiver = ScriptedSender(lambda r, came: "refused" if came == 1 and about("B-2")(r) else "done")
    rows = world.rows(SUBJECTS)
    with pytest.raises(SagaFailedError):
        world.act([rows])
    ref = world.act([rows], run={"resend_refused": True})
    assert ref.counts["done"] == 10
    assert len(world.receiver.requests) == 11
    assert world.ledger.entries("p", states=["refused"]) == []


def test_one_key_with_another_payload_is_a_conflict_and_the_others_go_on(world: World) -> None:
    world.act([world.rows(["a", "b"], n=[1, 1])])
    with pytest.raises(IdempotencyConflictError, match="rename the changed action") as caught:
        world.act([world.rows(["b", "a", "c"], "orders-2", n=[1, 2, 1])], run_id="r2")
    rows = world.outcomes(caught.value.ref)
    assert [r["state"] for r in rows] == ["done", "refused", "done"]
    assert "conflict" in rows[1]["reason"]
    assert caught.value.keys == [rows[1]["key"]]
    assert len(world.receiver.requests) == 3
    assert sorted(world.states("r2")) == ["done", "refused"], "the conflict has a line of its own in its run"
    again = world.rows(["b", "a", "c"], "orders-2", n=[1, 2, 1])
    with pytest.raises(IdempotencyConflictError):
        world.act([again], run_id="r2")
    assert len(world.receiver.requests) == 3


def test_two_payloads_for_one_key_within_one_call(world: World) -> None:
    rows = world.rows(["a", "b", "a", "a"], n=[1, 1, 2, 1])
    ref = world.act([rows], HttpAction("ticket", "/tickets", max_refused=1))
    assert [r["state"] for r in world.outcomes(ref)] == ["done", "done", "refused", "done"]
    assert [b["n"] for b in world.receiver.bodies()] == [1, 1]


def test_what_was_undone_is_not_called_done(world: World) -> None:
    rows = world.rows(["a", "b"])
    world.act([rows])
    keys = [e.key for e in world.ledger.entries("p")]
    world.ledger.record([Outcome(keys[0], "compensated", {"status": 200}), Outcome(keys[1], "parked", {"status": 500})])
    with pytest.raises(SagaFailedError) as caught:
        world.act([rows], run={"resend_refused": True})
    outcomes = world.outcomes(caught.value.ref)
    assert [r["state"] for r in outcomes] == ["refused", "refused"]
    assert "compensated: this effect was done and undone; rename the action" in outcomes[0]["reason"]
    assert "parked" in outcomes[1]["reason"]
    assert len(world.receiver.requests) == 2


# --- no answer, no taker ---


def test_a_lost_answer_is_asked_for_again_under_the_same_key(world: World) -> None:
    world.receiver = ScriptedSender(lambda r, came: "lost" if came < 3 and about("B-3")(r) else "done")
    ref = world.act([world.rows(SUBJECTS)])
    assert ref.counts["done"] == 10
    assert set(world.receiver.effects.values()) == {1}
    assert sum(map(about("B-3"), world.receiver.requests)) == 3
    assert [e.attempts for e in world.ledger.entries("p")] == [1, 1, 1, 3, 1, 1, 1, 1, 1, 1]


def test_an_outcome_that_stays_unknown_lands_nothing_until_a_retry_knows(world: World) -> None:
    silent = True
    world.receiver = ScriptedSender(lambda r, _: "lost" if silent and about("B-3")(r) else "done")
    rows = world.rows(SUBJECTS)
    with pytest.raises(
        UnknownOutcomeError, match="1 calls to http://receiver.test left and got no whole answer"
    ) as caught:
        world.act([rows])
    assert sum(map(about("B-3"), world.receiver.requests)) == 3, "bounded"
    key = caught.value.keys[0]
    entry = world.ledger.look_up(key)
    assert entry and (entry.state, entry.subject) == ("unknown", "B-3")
    assert world.ledger.finished_actions("p", "r1") == {}
    assert world.states().count("done") == 9, "the others are done and recorded"
    assert world.store.find("p", "outcomes", "x") is None
    silent = False
    assert world.act([rows]).counts["done"] == 10
    assert world.receiver.effects[key] == 1
    assert len(world.receiver.requests) == 13, "nine are not sent again"


def test_unheard_is_as_unknown_as_lost(world: World) -> None:
    world.receiver = ScriptedSender(lambda r, came: "unheard" if came == 1 else "done")
    assert world.act([world.rows(SUBJECTS)]).counts["done"] == 10
    assert set(world.receiver.effects.values()) == {1}


def test_a_receiver_that_takes_nothing_is_transient_and_keeps_what_is_done(world: World) -> None:
    is_open = False
    busy = about(*SUBJECTS[6:])
    world.receiver = ScriptedSender(lambda r, _: "later" if busy(r) and not is_open else "done")
    rows = world.rows(SUBJECTS)
    with pytest.raises(ActionUnavailableError, match=r"ticket: http://receiver.test takes nothing now \(503") as caught:
        world.act([rows])
    assert "sends only what is open" in str(caught.value)
    assert caught.value.address == "http://receiver.test"
    assert world.states().count("done") == 6
    assert set(world.states()) == {"done", "reserved"}, "later surely did nothing"
    is_open = True
    before = len(world.receiver.requests)
    assert world.act([rows]).counts["done"] == 10
    assert len(world.receiver.requests) == before + 4
    assert set(world.receiver.effects.values()) == {1}


def test_no_more_chunks_are_sent_to_a_receiver_that_is_gone(world: World) -> None:
    for word in ("later", "unheard"):
        world.receiver = ScriptedSender(lambda *_, word=word: word)
        with pytest.raises((ActionUnavailableError, UnknownOutcomeError)):
            world.act([world.rows([f"{word}-{n}" for n in range(400)], f"many-{word}")], chunk=4, run_id=word)
        assert len({r.key for r in world.receiver.requests}) <= 12
        assert world.receiver.closed_count == 1


def test_later_after_an_unknown_try_stays_unknown(world: World) -> None:
    """What may have been done is never taken for not done because the receiver is busy now."""
    words = ["lost", "later", "later", "later"]
    world.receiver = ScriptedSender(lambda _, came: words[came - 1] if came <= len(words) else "done")
    rows = world.rows(["a"])
    for _ in range(3):
        with pytest.raises(UnknownOutcomeError):
            world.act([rows])
        assert world.states() == ["unknown"]
    assert world.act([rows]).counts["done"] == 1
    assert list(world.receiver.effects.values()) == [1]


class Replying:
    """A sender with fixed answers, one list per call."""

    address = "http://receiver.test"

    def __init__(self, *calls: Sequence[Answer]) -> None:
        self.calls, self.sent = list(calls), 0

    def send(self, requests: Sequence[Request]) -> list[Answer]:
        self.sent += 1
        return list(self.calls.pop(0))[: len(requests)]

    def close(self) -> None:
        pass


def test_a_conflict_right_after_an_unknown_try_is_the_first_try_still_running(world: World) -> None:
    world.receiver = Replying(
        [Answer("unknown", 0, None, "cut")],
        [Answer("refused", 409, None, "in progress")],
        [Answer("done", 201, {"id": 1})],
    )
    assert world.act([world.rows(["a"])]).counts["done"] == 1
    world.receiver = Replying([Answer("refused", 409, None, "other payload")])
    with pytest.raises(SagaFailedError, match="other payload"):
        world.act([world.rows(["b"], "orders-2")])


def test_the_undo_fields_of_an_answer_are_kept_and_nothing_else(world: World) -> None:
    body = {"id": 7, "order": "O/1", "token": "hunter2", "echo": {"secret": "hunter2"}}
    world.receiver = Replying([Answer("done", 201, body)])
    ref = world.act([world.rows(["a"])], HttpAction("t", "/t", undo=Undo("DELETE", "/o/{order}/{id}")))
    entry = world.ledger.entries("p")[0]
    assert entry.outcome == {"status": 201, "id": 7, "order": "O/1"}
    assert world.outcomes(ref)[0]["receiver_id"] == "7"


def test_a_sender_that_loses_count_is_caught(world: World) -> None:
    world.receiver = Replying([Answer("done", 201)])
    with pytest.raises(ValueError, match="shorter"):
        world.act([world.rows(["a", "b"])])
    assert world.states() == ["sent", "sent"], "nothing is recorded for either"


# --- several things at a time ---


def test_two_tasks_act_at_once_on_the_same_rows(world: World) -> None:
    """A zombie and its successor: each effect happens once, both see it through or stop with a transient error."""
    rows = world.rows([f"B-{n}" for n in range(60)])
    gate, results = threading.Barrier(2), []

    def task() -> None:
        gate.wait()
        try:
            results.append(world.act([rows], chunk=5).counts["done"])
        except Exception as error:
            results.append(type(error).__name__)

    threads = [threading.Thread(target=task) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert set(results) <= {60, "LedgerStateError"}
    assert world.act([rows]).counts["done"] == 60
    assert set(world.receiver.effects.values()) == {1}
    assert len(world.receiver.effects) == 60


def test_chunks_overlap(world: World) -> None:
    class Slow(ScriptedSender):
        together = most = 0

        def send(self, requests: Sequence[Request]) -> list[Answer]:
            self.together += 1
            self.most = max(self.most, self.together)
            time.sleep(0.2)
            answers = super().send(requests)
            self.together -= 1
            return answers

    slow = Slow()
    from airflow_ai_provider.core.act.effect import ActRun
    from airflow_ai_provider.core.act.flow import act

    act([world.rows(SUBJECTS)], TICKET, world.store, world.ledger, slow, ActRun("p", "r1"), chunk=2)
    assert 2 <= slow.most <= 3


def test_progress_every_five_seconds() -> None:
    said: list[str] = []
    now = iter([0.0, 2.0, 6.0, 6.0, 6.0, 7.0, 12.0]).__next__
    watch = Progress("ticket", 100, said.append, now)
    watch.count(10, ["done"] * 10)
    watch.count(15, ["done"] * 10 + ["refused"] * 4 + ["unknown"] * 6)
    assert said == ["ticket: 30 of 100 rows, 25 sent, 20 done, 4 refused, 6 unknown; 5 rows/s, 14 s left"]
    watch.count(0, ["done"])
    assert len(said) == 1
    watch.end()
    assert said[-1].startswith("ticket: 31 of 100 rows, 25 sent, 21 done")


def test_the_last_line_is_always_said(world: World) -> None:
    world.act([world.rows(SUBJECTS)])
    assert world.said[-1].startswith("ticket: 10 of 10 rows, 10 sent, 10 done, 0 refused;")


def test_steps_of_one_run_share_a_saga_per_subject(world: World) -> None:
    rows: Any = world.rows(["a", "b"])
    world.act([rows])
    world.act([rows], PAGE, step=1)
    sagas = {}
    for entry in world.ledger.entries("p", "r1"):
        sagas.setdefault(entry.saga, []).append((entry.subject, entry.action))
    assert sorted(sagas.values()) == [[("a", "ticket"), ("a", "page")], [("b", "ticket"), ("b", "page")]]
