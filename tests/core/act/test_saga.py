"""Compensate: what is undone, in which order, and what waits for a person."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from airflow_ai_provider.core.act.saga import find_broken
from airflow_ai_provider.core.act.sender import Request
from airflow_ai_provider.core.act.value import HttpAction, Undo
from airflow_ai_provider.errors import (
    ActionRejectedError,
    ActionUnavailableError,
    CompensationError,
    SagaFailedError,
    SpecError,
    UnknownOutcomeError,
)
from airflow_ai_provider.testing.sender import ScriptedSender
from tests.core.act.world import PAGE, World

SUBJECTS = ["a", "b", "c", "d", "e"]
STEPS = ["ticket", "page"]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def refuses_pages_for(*subjects: str) -> Callable[[Request, int], str]:
    wanted = [f'"subject":"{s}"'.encode() for s in subjects]
    return lambda r, _: "refused" if r.path == "/pages" and any(w in (r.body or b"") for w in wanted) else "done"


def run_both(world: World, *refused: str) -> None:
    """A run of two steps; pages for some subjects are refused."""
    world.receiver = ScriptedSender(refuses_pages_for(*refused))
    rows = world.rows(SUBJECTS)
    world.act([rows])
    if refused:
        with pytest.raises(SagaFailedError):
            world.act([rows], PAGE, step=1)
    else:
        world.act([rows], PAGE, step=1)


def undone(world: World) -> list[str]:
    """The paths that were undone, in order."""
    return [r.path for r in world.receiver.requests if r.method == "DELETE"]


def test_only_the_sagas_that_failed_are_undone(world: World) -> None:
    run_both(world, "b", "d")
    counts = world.compensate(steps=STEPS, failed=["page"])
    assert counts == {"compensated": 2, "kept": 6, "parked": 0}
    assert world.said[-1] == "undo: 2 effects undone, 6 left as they are, 0 parked"
    by_subject = {(e.subject, e.action): e for e in world.ledger.entries("p", "r1") if not e.undoes}
    assert {s for (s, a), e in by_subject.items() if e.state == "compensated"} == {"b", "d"}
    assert by_subject["b", "page"].state == "refused"
    assert by_subject["a", "ticket"].state == by_subject["a", "page"].state == "done"
    ticket = by_subject["b", "ticket"]
    assert undone(world)[0] == f"/tickets/{ticket.outcome['id']}"
    assert ticket.outcome["undo"] == {"status": 201, "reason": ""}
    undo = next(e for e in world.ledger.entries("p", "r1") if e.undoes == ticket.key)
    assert (undo.state, undo.saga, undo.request["method"]) == ("done", ticket.saga, "DELETE")
    assert world.ledger.open_sagas("p", "r1") == []


def test_a_complete_run_is_kept(world: World) -> None:
    run_both(world)
    assert world.compensate(steps=STEPS) == {"compensated": 0, "kept": 10, "parked": 0}
    assert world.compensate(steps=STEPS, scope="run") == {"compensated": 0, "kept": 10, "parked": 0}
    assert undone(world) == []
    assert world.said[-1] == "undo: 0 effects undone, 10 left as they are, 0 parked", (
        "that nothing was to do is said too"
    )


def test_scope_run_undoes_everything_last_step_first(world: World) -> None:
    run_both(world, "b")
    counts = world.compensate(steps=STEPS, failed=["page"], scope="run")
    assert counts == {"compensated": 9, "kept": 0, "parked": 0}
    kinds = [path.split("/")[1] for path in undone(world)]
    assert kinds == ["pages"] * 4 + ["tickets"] * 5


def test_running_it_again_undoes_nothing_twice(world: World) -> None:
    run_both(world, "b")
    world.compensate(steps=STEPS, failed=["page"])
    sent = len(world.receiver.requests)
    assert world.compensate(steps=STEPS, failed=["page"]) == {"compensated": 0, "kept": 8, "parked": 0}
    assert len(world.receiver.requests) == sent


def test_an_action_that_failed_before_it_saw_a_row_makes_its_sagas_incomplete(world: World) -> None:
    world.act([world.rows(SUBJECTS)])
    assert world.compensate(steps=STEPS, failed=["page"]) == {"compensated": 5, "kept": 0, "parked": 0}


def test_an_action_that_was_skipped_makes_none_so(world: World) -> None:
    world.act([world.rows(SUBJECTS)])
    assert world.compensate(steps=STEPS, failed=[]) == {"compensated": 0, "kept": 5, "parked": 0}
    assert world.compensate(steps=STEPS, failed=["ingest"]) == {"compensated": 0, "kept": 5, "parked": 0}


def test_a_row_that_was_not_offered_to_a_failed_action_is_not_missing_there(world: World) -> None:
    """The page was for two rows only; it failed for one of them after it had been through both."""
    world.receiver = ScriptedSender(refuses_pages_for("b"))
    world.act([world.rows(SUBJECTS)])
    with pytest.raises(SagaFailedError):
        world.act([world.rows(["a", "b"], "orders-2")], PAGE, step=1)
    assert world.compensate(steps=STEPS, failed=["page"]) == {"compensated": 1, "kept": 5, "parked": 0}


def test_another_runs_effects_are_left_alone(world: World) -> None:
    rows = world.rows(SUBJECTS)
    world.act([rows])
    world.act([rows], run_id="r2")
    world.receiver = ScriptedSender(refuses_pages_for("b"))
    with pytest.raises(SagaFailedError):
        world.act([rows], PAGE, run_id="r2", step=1)
    assert world.compensate(run_id="r2", steps=STEPS, failed=["page"]) == {"compensated": 0, "kept": 4, "parked": 0}
    assert set(world.states("r1")) == {"done"}


def test_what_has_no_undo_is_kept(world: World) -> None:
    world.receiver = ScriptedSender(refuses_pages_for("a"))
    rows = world.rows(["a", "b"])
    world.act([rows], HttpAction("mail", "/mails"))
    with pytest.raises(SagaFailedError):
        world.act([rows], PAGE, step=1)
    assert world.compensate(steps=["mail", "page"], failed=["page"]) == {"compensated": 0, "kept": 3, "parked": 0}


@pytest.mark.parametrize(
    ("word", "kind", "undo_state"),
    [
        ("refused", ActionRejectedError, "refused"),
        ("later", ActionUnavailableError, "reserved"),
        ("lost", UnknownOutcomeError, "unknown"),
    ],
)
def test_an_undo_that_fails_is_parked_and_the_others_go_on(
    world: World, word: str, kind: type[Exception], undo_state: str
) -> None:
    run_both(world, "a", "b", "c")
    first = world.ledger.entries("p", "r1", "ticket")[0]
    works = world.receiver
    broken = [True]

    def script(request: Request, _: int) -> str:
        return word if broken[0] and request.path.endswith(str(first.outcome["id"])) else "done"

    works._script = script
    with pytest.raises(CompensationError) as caught:
        world.compensate(steps=STEPS, failed=["page"])
    error = pickle.loads(pickle.dumps(caught.value))
    assert error.keys == [first.key]
    assert error.counts == {"compensated": 2, "kept": 4, "parked": 1}
    assert first.key in str(error)
    assert [type(e) for e in error.exceptions] == [kind]
    assert "DELETE /tickets/" in str(error.exceptions[0])
    entry = world.ledger.look_up(first.key)
    assert entry and entry.state == "parked"
    assert entry.outcome["id"] == first.outcome["id"], "what the undo needs is kept"
    assert [e.state for e in world.ledger.entries("p", "r1") if e.undoes == first.key] == [undo_state]
    assert world.ledger.open_sagas("p", "r1") == [first.saga]
    broken[0] = False
    assert world.compensate(steps=STEPS, failed=["page"]) == {"compensated": 1, "kept": 4, "parked": 0}
    assert set(works.effects.values()) == {1}
    assert world.ledger.open_sagas("p", "r1") == []


def test_an_effect_whose_outcome_is_unknown_is_named_not_passed_over(world: World) -> None:
    world.receiver = ScriptedSender(lambda r, _: "lost" if r.path == "/pages" and b'"b"' in (r.body or b"") else "done")
    rows = world.rows(SUBJECTS)
    world.act([rows])
    with pytest.raises(UnknownOutcomeError):
        world.act([rows], PAGE, step=1)
    with pytest.raises(CompensationError, match="1 effects of run r1 of p could not be undone") as caught:
        world.compensate(steps=STEPS, failed=["page"])
    assert "Clear the task page" in str(caught.value.exceptions[0])
    states = {(e.subject, e.action): e.state for e in world.ledger.entries("p", "r1") if not e.undoes}
    assert states["b", "ticket"] == "compensated"
    assert states["b", "page"] == "unknown"
    assert states["a", "ticket"] == "done"


def test_an_answer_without_what_the_undo_needs_is_parked(world: World) -> None:
    world.receiver = ScriptedSender(refuses_pages_for("a"))
    rows = world.rows(["a", "b"])
    world.act([rows], HttpAction("ticket", "/tickets", undo=Undo("DELETE", "/tickets/{number}")))
    with pytest.raises(SagaFailedError):
        world.act([rows], PAGE, step=1)
    with pytest.raises(CompensationError) as caught:
        world.compensate(steps=STEPS, failed=["page"])
    assert "needs 'number'" in str(caught.value.exceptions[0])
    assert undone(world) == []
    assert world.states(action="ticket") == ["parked", "done"]


def test_an_undo_goes_only_where_its_action_went(world: World) -> None:
    run_both(world, "a")
    elsewhere = ScriptedSender(address="http://elsewhere.test")
    world.receiver = elsewhere
    with pytest.raises(CompensationError) as caught:
        world.compensate(steps=STEPS, failed=["page"])
    assert "was done at http://receiver.test" in str(caught.value.exceptions[0])
    assert elsewhere.requests == []


def test_gone_for_good_counts_as_undone_but_not_found_does_not(world: World) -> None:
    from airflow_ai_provider.core.act.sender import Answer

    run_both(world, "a", "b")
    keeps = world.receiver

    class Forgetful:
        address = keeps.address

        def __init__(self) -> None:
            self.statuses = [410, 404]

        def send(self, requests: list[Request]) -> list[Answer]:
            return [Answer("refused", self.statuses.pop(0), None, "not here") for _ in requests]

        def close(self) -> None:
            pass

    world.receiver = Forgetful()
    with pytest.raises(CompensationError) as caught:
        world.compensate(steps=STEPS, failed=["page"])
    assert caught.value.counts == {"compensated": 1, "kept": 6, "parked": 1}
    assert "404" not in str(caught.value) and "not here" in str(caught.value.exceptions[0])


def test_many_failed_undos_are_all_named_as_facts(world: World) -> None:
    world.receiver = ScriptedSender(lambda r, _: "refused" if r.method == "DELETE" else "done")
    world.act([world.rows([f"s{n}" for n in range(15)])])
    with pytest.raises(CompensationError, match="and 5 more") as caught:
        world.compensate(steps=STEPS, failed=["page"])
    assert len(caught.value.keys) == len(caught.value.exceptions) == 15


def test_after_the_undo_a_later_run_says_so(world: World) -> None:
    run_both(world, "b")
    world.compensate(steps=STEPS, failed=["page"])
    with pytest.raises(SagaFailedError, match="compensated: this effect was done and undone"):
        world.act([world.rows(SUBJECTS)], run_id="r2")
    assert set(world.receiver.effects.values()) == {1}


def test_a_clear_after_the_undo_changes_no_byte_and_sends_nothing(world: World) -> None:
    rows = world.rows(SUBJECTS)
    first = world.act([rows])
    assert world.compensate(steps=STEPS, failed=["page"])["compensated"] == len(SUBJECTS)
    before, sent = world.ledger.entries("p"), len(world.receiver.requests)
    assert world.act([rows]) == first
    assert f"0 sent, 0 done, 0 refused, {len(SUBJECTS)} compensated" in world.said[-1], "but the log says so"
    assert world.compensate(steps=STEPS, failed=["page"])["compensated"] == 0
    assert world.ledger.entries("p") == before
    assert len(world.receiver.requests) == sent


def test_scopes_are_two(world: World) -> None:
    with pytest.raises(SpecError, match="'all' is not one of row, run"):
        world.compensate(scope="all")


def test_broken_is_pure(world: World) -> None:
    world.act([world.rows(["a", "b"])])
    a, b = world.ledger.entries("p")
    assert find_broken([a, b], [], "row") == set()
    assert find_broken([a, replace(b, state="reserved")], [], "row") == {b.saga}
    assert find_broken([a, replace(b, state="refused")], [], "run") == {a.saga, b.saga}
    assert find_broken([a, b], ["page"], "row") == {a.saga, b.saga}
    assert find_broken([a, replace(a, key="k2", state="refused"), b], [], "row") == {a.saga}
    assert find_broken([], ["page"], "run") == set()
