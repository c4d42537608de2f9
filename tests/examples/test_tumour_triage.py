"""Tumour triage through ``dag.test()``, with a real answer to its review: every count against the truth."""

from __future__ import annotations

import json
import sqlite3
import sys
from collections import Counter
from typing import Any

import pytest

from airflow_ai_provider.core.ingest.correction import export_rows
from airflow_ai_provider.core.ingest.quarantine import find_quarantines
from airflow_ai_provider.core.ledger_sql import open_ledger
from airflow_ai_provider.core.pipeline.explain import explain
from include.data import biopsy_records
from tests.examples.conftest import World

pytestmark = [pytest.mark.slow, pytest.mark.integration]

DAG, AT = "tumour_triage", "2026-05-01T10:00:00+00:00"
ROUTES = ("act", "review", "fallback", "hold")
_MOVE_ALIAS = """
import sys
from mlflow import MlflowClient
MlflowClient(sys.argv[1], sys.argv[1]).set_registered_model_alias("triage", "champion", sys.argv[2])
"""


@pytest.fixture(scope="module")
def labels(world: World) -> dict[str, str]:
    """Two versions of the model registered, the messages published; biopsy id → true class."""
    world.python("include.models.train_triage", world.registry)
    world.python("include.models.train_triage", world.registry, "--variant", "timid", "--alias", "")
    truth, labels = str(world.folder / "truth.json"), str(world.folder / "labels.json")
    world.python("include.messages", world.kafka, "--truth", truth, "--labels", labels)
    found: dict[str, str] = json.loads((world.folder / "labels.json").read_text())
    return found


@pytest.fixture(scope="module")
def answers(labels: dict[str, str]) -> dict[str, str]:
    """What the person says: the truth, but of every biopsy whose number ends in 7 nothing."""
    return {biopsy: "hold" if biopsy.endswith("7") else label for biopsy, label in labels.items()}


@pytest.fixture(scope="module")
def ran(world: World, answers: dict[str, str]) -> dict[str, Any]:
    """The first run. While it waits for its review, the alias is moved to the other version."""
    move = [sys.executable, "-c", _MOVE_ALIAS, world.registry, "2"]
    return world.run(DAG, at=AT, answers=answers, first=move)


def test_the_run_succeeds_with_every_task(ran: dict[str, Any]) -> None:
    assert ran["state"] == "success"
    assert set(ran["tasks"].values()) == {"success"}


def test_every_spoiled_message_is_quarantined_for_what_was_done_to_it(world: World, ran: dict[str, Any]) -> None:
    batch = ran["outputs"]["ingest"]
    truth = json.loads((world.folder / "truth.json").read_text())["spoiled"]
    found = world.rows(batch, "quarantine")
    assert {(r["_topic"], r["_partition"], r["_offset"]): r["_reasons"][0].partition(":")[0] for r in found} == {
        (s["topic"], s["partition"], s["offset"]): s["kind"] for s in truth
    }
    assert len(truth) == len(found) == 20
    assert batch["counts"] == {"read": 285, "accepted": 265, "quarantined": 20}


def test_every_accepted_row_is_on_exactly_one_route(world: World, ran: dict[str, Any]) -> None:
    accepted = [row["_row_id"] for row in world.rows(ran["outputs"]["ingest"], "accepted")]
    routed = [row["_row_id"] for route in ROUTES for row in world.rows(ran["outputs"]["decide"][route], route)]
    assert Counter(routed) == Counter(accepted)
    assert len(set(routed)) == 265


def test_confidence_is_worth_something(world: World, ran: dict[str, Any], labels: dict[str, str]) -> None:
    """The model is nearly always right where it acts, and asks where it is not."""
    right = {}
    for route in ("act", "review", "fallback"):
        rows = world.rows(ran["outputs"]["decide"][route], route)
        right[route] = sum(row["prediction"] == labels[row["biopsy_id"]] for row in rows) / len(rows)
    assert right["act"] > 0.98
    assert right["review"] < 0.95
    assert right["fallback"] < right["review"]


def test_the_form_shows_what_is_ambiguous_and_the_answers_become_rows(
    world: World, ran: dict[str, Any], answers: dict[str, str]
) -> None:
    asked = {row["biopsy_id"] for row in world.rows(ran["outputs"]["decide"]["review"], "review")}
    assert set(ran["asked"].values()) == asked
    reviewed = world.rows(ran["outputs"]["review"], "reviewed")
    assert {row["biopsy_id"]: row["decision"] for row in reviewed} == {
        biopsy: answers[biopsy] for biopsy in asked if answers[biopsy] != "hold"
    }
    assert {row["decided_by"] for row in reviewed} == {"person"}
    assert 0 < len(reviewed) < len(asked)


def test_tickets_stand_for_all_that_was_decided_but_what_was_undone(world: World, ran: dict[str, Any]) -> None:
    states, effects = world.states(DAG), world.effects(DAG)
    decided = {row["biopsy_id"] for route in ("act", "fallback") for row in _routed(world, ran, route)}
    decided |= {row["biopsy_id"] for row in world.rows(ran["outputs"]["review"], "reviewed")}
    assert {e.subject for e in effects if e.action == "ticket"} == decided
    refused = {e.subject for e in effects if e.action == "page" and e.state == "refused"}
    undone = {e.subject for e in effects if e.state == "compensated"}
    assert refused
    assert undone == refused
    assert states["ticket", "compensated"] == ran["outputs"]["undo"]["compensated"] == len(undone)
    tickets = world.ask("tickets")
    biopsies = [ticket["subject"] for ticket in tickets if ticket["subject"] in decided]
    assert Counter(biopsies) == Counter(decided - undone)


def test_a_clear_with_the_alias_moved_changes_no_byte_and_sends_nothing(
    world: World, ran: dict[str, Any], answers: dict[str, str]
) -> None:
    before = world.bytes_of_all_batches(), world.effects(DAG), world.ask("effects")
    again = world.run(DAG, at=AT, answers=answers)
    assert again["run_id"] == ran["run_id"]
    assert again["tasks"] == ran["tasks"]
    assert again["outputs"]["pin"] == ran["outputs"]["pin"]
    assert again["outputs"]["pin"]["version"] == "1"
    assert {k: again["outputs"][k] for k in ("ingest", "infer", "decide", "review", "ticket", "page")} == {
        k: ran["outputs"][k] for k in ("ingest", "infer", "decide", "review", "ticket", "page")
    }
    assert (world.bytes_of_all_batches(), world.effects(DAG), world.ask("effects")) == before


def test_a_later_run_takes_the_new_champion_and_finds_nothing_to_do(world: World, ran: dict[str, Any]) -> None:
    effects = world.ask("effects")
    later = world.run(DAG, at="2026-05-01T11:00:00+00:00")
    assert later["state"] == "success"
    assert later["outputs"]["pin"]["version"] == "2"
    assert later["outputs"]["ingest"]["counts"]["read"] == 0
    assert world.ask("effects") == effects


def _routed(world: World, ran: dict[str, Any], route: str) -> list[dict[str, Any]]:
    return world.rows(ran["outputs"]["decide"][route], route)


@pytest.fixture(scope="module")
def replay(world: World, ran: dict[str, Any]) -> str:
    """The quarantined rows mended as a person does it, but for one that stays and one that is wrong again."""
    batch, file = ran["outputs"]["ingest"]["batch_id"], world.folder / "mended.jsonl"
    truth = {record["biopsy_id"]: record for record, _ in biopsy_records()}
    (quarantine,) = find_quarantines(open_ledger(world.ledger_url), DAG)
    lines = [json.loads(line) for line in export_rows(quarantine.rows(world.store))]
    assert len(lines) == 20
    for line in lines:  # broken JSON names no biopsy any more, but its key does
        line["row"] = dict(truth[line["origin"]["key"]])
    lines[0]["row"]["mean_radius"] = -1.0
    file.write_text("\n".join(map(json.dumps, lines[:-1])))
    said = world.python("airflow", "ai", "quarantine", "replay", batch, "--pipeline", DAG, "--corrections", str(file))
    assert "19 mended rows stored as replay" in said
    found = said.partition("stored as replay ")[2].partition(".\n")[0]
    with sqlite3.connect(world.folder / "airflow" / "airflow.db") as database:
        runs = database.execute("SELECT state FROM dag_run WHERE run_id = ?", (f"replay__{found}",)).fetchall()
    assert runs == [("queued",)]  # triggered; the scheduler would run it, here dag.test() does
    return found


def test_mended_rows_flow_through_the_same_dag_once(
    world: World, ran: dict[str, Any], replay: str, answers: dict[str, str]
) -> None:
    first, known = ran["outputs"]["ingest"], Counter(ticket["subject"] for ticket in world.ask("tickets"))
    mended = world.run(DAG, at="2026-05-01T12:00:00+00:00", answers=answers, conf={"replay": replay})
    batch = mended["outputs"]["ingest"]
    assert batch["counts"] == {"read": 19, "accepted": 18, "quarantined": 1}
    waited = {row["_row_id"] for row in world.rows(first, "quarantine")}
    accepted = {row["_row_id"]: row["biopsy_id"] for row in world.rows(batch, "accepted")}
    (again,) = world.rows(batch, "quarantine")
    assert {*accepted, again["_row_id"]} < waited
    assert again["_reasons"][0].startswith("out_of_range")
    routed = [row["_row_id"] for route in ROUTES for row in world.rows(mended["outputs"]["decide"][route], route)]
    assert sorted(routed) == sorted(accepted)
    tickets = Counter(ticket["subject"] for ticket in world.ask("tickets"))
    new = tickets - known
    assert set(new) <= set(accepted.values())
    assert new
    assert known <= tickets
    assert max(tickets[biopsy] for biopsy in new) == 1

    # a clear: the same batch, and nothing is sent again
    before = world.effects(DAG), world.ask("effects")
    same = world.run(DAG, at="2026-05-01T12:00:00+00:00", answers=answers, conf={"replay": replay})
    assert same["outputs"]["ingest"] == batch
    assert (world.effects(DAG), world.ask("effects")) == before

    ledger = open_ledger(world.ledger_url)
    held = {quarantine.ref.batch_id: quarantine for quarantine in find_quarantines(ledger, DAG)}
    old, new_one = held[first["batch_id"]], held[batch["batch_id"]]
    assert (old.waiting, len(old.replayed), new_one.waiting) == (1, 19, 1)
    one = next(row_id for row_id in accepted if row_id in {e.row_id for e in world.effects(DAG)})
    rested, decided = explain(ledger, world.store, DAG, row_id=one)
    assert [(r["batch"], r["became"]) for r in rested.replays] == [(batch["batch_id"], "accepted")]
    assert (decided.run_id, decided.origin["replay_of"]) == (mended["run_id"], first["batch_id"])
    assert decided.actions
