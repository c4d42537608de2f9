"""The four verbs in a row over the fakes, every row accounted for, and each outcome explained back to its offset."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from airflow_ai_provider.core.act.flow import ActRun, act
from airflow_ai_provider.core.act.value import HttpAction, Undo
from airflow_ai_provider.core.batch import Pin
from airflow_ai_provider.core.decide.flow import decide
from airflow_ai_provider.core.decide.policy import Fallback, Policy
from airflow_ai_provider.core.decide.review import apply_answers, read_questions
from airflow_ai_provider.core.infer.flow import infer
from airflow_ai_provider.core.ingest.flow import IngestRun, ingest
from airflow_ai_provider.core.pipeline.explain import explain
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.testing import ArithmeticEngine, MemoryLedger, MemorySource, RuleValidator, ScriptedSender

SUMS = [4.0, -4.0, 0.4, 0.2, -0.1, 0.05, float("nan")]
PIN = Pin("sum", "1", "champion", "sha256:0", {}, "onnx", {}, {"classes": ["low", "high"]})
POLICY = Policy(0.95, 0.54, fallback=Fallback("x > 0", "high", "low"))


@pytest.fixture
def world(tmp_path: Path) -> dict[str, Any]:
    payloads = [json.dumps({"id": f"S-{i}", "x": x}).replace("NaN", "null").encode() for i, x in enumerate(SUMS)]
    store, ledger, sender = Store(str(tmp_path)), MemoryLedger(), ScriptedSender()
    validator = RuleValidator(lambda row: None, {"id": "string", "x": "float64"})
    source = MemorySource({0: [*payloads, b"{broken"]}, name="sums", key="id")
    batch = ingest(source, validator, store, ledger, IngestRun("p", "run-1", "run-1/ingest", max_rejected=None))
    scored = infer(batch, PIN, store, ArithmeticEngine(["x"]), pipeline="p")
    routes, facts = decide(scored, POLICY, store, pipeline="p")
    ledger.decided("p", "run-1", facts)
    questions = read_questions(store, routes["review"], columns=["x"])
    answers = dict(zip(questions.rows, ["low", "hold"], strict=False))
    reviewed, records = apply_answers(store, routes["review"], questions, answers, pipeline="p")
    ledger.reviewed("p", "run-1", [record | {"responder": "anna", "at": "now"} for record in records])
    action = HttpAction("ticket", "/tickets", json='{"about": "{{ row.id }}", "is": "{{ row.decision }}"}', undo=Undo())
    rows = [routes["act"], reviewed.only("reviewed"), routes["fallback"]]
    outcomes = act(rows, action, store, ledger, sender, ActRun("p", "run-1", step=0, muted=False))
    return {
        "batch": batch,
        "scored": scored,
        "routes": routes,
        "reviewed": reviewed,
        "outcomes": outcomes,
        "sender": sender,
        "ledger": ledger,
        "store": store,
    }


def test_no_row_is_lost_between_the_verbs(world: dict[str, Any]) -> None:
    assert dict(world["batch"].counts) == {"read": 8, "accepted": 7, "quarantined": 1}
    assert dict(world["scored"].counts) == {"accepted": 7, "predicted": 6, "failed": 1}
    assert dict(world["routes"]["act"].counts) == {"predicted": 6, "act": 2, "review": 2, "fallback": 2, "hold": 0}
    assert dict(world["reviewed"].counts) == {"review": 2, "answered": 1, "hold": 1}
    assert world["outcomes"].counts["rows"] == world["outcomes"].counts["done"] == 5


def test_what_was_decided_is_what_was_sent(world: dict[str, Any]) -> None:
    sent = {body["about"]: body["is"] for body in (_body(request) for request in world["sender"].requests)}
    assert sent == {"S-0": "high", "S-1": "low", "S-3": "low", "S-4": "low", "S-5": "high"}


def _body(request: Any) -> dict[str, str]:
    return json.loads(request.body) if isinstance(request.body, str | bytes) else request.body


def test_each_outcome_is_explained_back_to_its_offset(world: dict[str, Any]) -> None:
    def told(subject: str) -> Any:
        (story,) = explain(world["ledger"], world["store"], "p", subject=subject)
        return story

    assert told("S-0").decision["route"] == "act"
    assert told("S-4").decision["decided_by"] == "rule"
    assert (told("S-3").review["before"], told("S-3").review["after"]) == ("high", "low")
    assert told("S-2").actions == ()
    assert told("S-2").review["after"] == "hold"
    assert told("S-6").fate.startswith("failed in the model")
    assert [entry.state for entry in told("S-5").actions] == ["done"]
    assert told("S-5").origin["offset"] == 5
    assert told("S-5").model["version"] == "1"
