"""Promise 10: any decision can be explained, whichever way a row has ended."""

from __future__ import annotations

from pathlib import Path

import pytest

from airflow_ai_provider.core.ingest.replay import replay_quarantine
from airflow_ai_provider.core.ledger import Ledger
from airflow_ai_provider.core.pipeline.explain import explain
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.errors import SpecError
from airflow_ai_provider.testing import MemoryLedger, RuleValidator
from tests.core.pipeline.story_world import HOSTILE, PIPELINE, RUN, make_world, row_id


@pytest.fixture
def world(tmp_path: Path) -> tuple[Ledger, Store]:
    ledger, store = MemoryLedger(), Store(str(tmp_path))
    make_world(store, ledger)
    return ledger, store


def test_from_the_action_back_to_the_offset(world: tuple[Ledger, Store]) -> None:
    (story,) = explain(*world, PIPELINE, subject="B-0")
    assert [(e.key, e.state, e.undoes) for e in story.actions] == [("k0", "compensated", ""), ("u0", "done", "k0")]
    assert story.actions[0].outcome["id"] == "T-7"
    assert story.decision["route"] == "act"
    assert (story.decision["confidence"], story.decision["bar"]) == (0.97, 0.9)
    assert story.decision["reason"] == "confidence 0.97 ≥ act 0.90"
    assert (story.model["name"], story.model["version"], story.model["prediction"]) == ("triage", "3", "malignant")
    assert (story.origin["topic"], story.origin["partition"], story.origin["offset"]) == ("biopsies", 0, 0)
    assert story.origin["source"] == "kafka:biopsies"
    assert story.row == {"biopsy_id": "B-0", "worst_radius": 20.0}
    assert explain(*world, PIPELINE, row_id=row_id(0)) == [story]


def test_a_persons_answer_is_part_of_it(world: tuple[Ledger, Store]) -> None:
    (story,) = explain(*world, PIPELINE, row_id=row_id(1))
    assert (story.review["before"], story.review["after"], story.review["responder"]) == ("benign", "malignant", "anna")
    assert story.decision["route"] == "review"


def test_a_held_row_has_no_action(world: tuple[Ledger, Store]) -> None:
    for story in (*explain(*world, PIPELINE, subject="B-2"), *explain(*world, PIPELINE, row_id=row_id(2))):
        assert story.decision["reason"] == "confidence 0.20 < review 0.50: otherwise hold"
        assert story.actions == ()


def test_a_row_that_the_model_could_not_take(world: tuple[Ledger, Store]) -> None:
    (story,) = explain(*world, PIPELINE, subject="B-3")
    assert story.fate == "failed in the model: worst_radius is missing"
    assert story.decision == {}
    assert story.row["image"] == "1 bytes"


def test_a_quarantined_row_keeps_its_bytes_and_reason(world: tuple[Ledger, Store]) -> None:
    (story,) = explain(*world, PIPELINE, row_id=row_id(4), run_ids=[RUN])
    assert story.fate == "quarantined: broken_json: invalid UTF-8"
    assert story.row["payload"] == HOSTILE
    assert story.model == {}
    assert story.origin["offset"] == 4


def test_a_quarantined_row_is_found_without_its_run_and_followed_through_its_replays(
    world: tuple[Ledger, Store],
) -> None:
    ledger, store = world
    (story,) = explain(ledger, store, PIPELINE, row_id=row_id(4))
    assert (story.run_id, story.fate, story.replays) == (RUN, "quarantined: broken_json: invalid UTF-8", ())
    first = ledger.claims(PIPELINE)[0].ref
    assert first is not None
    assert story.origin["quarantine"] == f"{first.uri}/quarantine"
    rules = RuleValidator(lambda row: None if row["biopsy_id"] != "B-?" else "bad_format: B-?", {"biopsy_id": "string"})
    mended = {row_id(4): {"biopsy_id": "B-?"}}
    second = replay_quarantine(store, ledger, rules, first, corrections=mended, pipeline=PIPELINE, run_id="replay-1")
    mended = {row_id(4): {"biopsy_id": "B-4"}}
    third = replay_quarantine(store, ledger, rules, second, corrections=mended, pipeline=PIPELINE, run_id="replay-2")
    stories = explain(ledger, store, PIPELINE, row_id=row_id(4))
    assert [(s.run_id, s.fate) for s in stories] == [
        (RUN, "quarantined: broken_json: invalid UTF-8"),
        ("replay-1", "quarantined: bad_format: B-?"),
    ]
    assert [[(r["batch"], r["run_id"], r["became"]) for r in s.replays] for s in stories] == [
        [(second.batch_id, "replay-1", "quarantined: bad_format: B-?")],
        [(third.batch_id, "replay-2", "accepted")],
    ]
    assert stories[1].origin["replay_of"] == first.batch_id
    assert [s.run_id for s in explain(ledger, store, PIPELINE, row_id=row_id(4), run_ids=["replay-1"])] == ["replay-1"]


def test_what_is_not_there_is_not_made_up(world: tuple[Ledger, Store]) -> None:
    assert explain(*world, PIPELINE, subject="B-99") == []
    assert explain(*world, PIPELINE, row_id="biopsies~a1b2c3d4/0/99") == []
    assert explain(*world, "another", subject="B-0") == []
    assert explain(*world, PIPELINE, subject="B-0", run_ids=["another"]) == []


def test_one_question_at_a_time(world: tuple[Ledger, Store]) -> None:
    for question in ({}, {"row_id": "a", "subject": "b"}):
        with pytest.raises(SpecError, match="either a row id or a subject"):
            explain(*world, PIPELINE, **question)
