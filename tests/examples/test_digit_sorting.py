"""Digit sorting through ``dag.test()``: files instead of messages, torch instead of ONNX, the same verbs."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
import yaml

from include.data import write_digits
from tests.examples.conftest import PROJECT, World

pytestmark = [pytest.mark.slow, pytest.mark.integration]

DAG, AT = "digit_sorting", "2026-05-01T10:00:00+00:00"
ROUTES = ("act", "review", "fallback", "hold")


@pytest.fixture(scope="module")
def labels(world: World) -> dict[str, str]:
    """The network registered, the scans in a folder; file name → digit."""
    world.python("include.models.train_digits", world.registry)
    write_digits(world.folder / "scans", world.folder / "digits.json")
    found: dict[str, str] = json.loads((world.folder / "digits.json").read_text())
    return found


@pytest.fixture(scope="module")
def ran(world: World, labels: dict[str, str]) -> dict[str, Any]:
    """The first run; the person reads the scans well."""
    return world.run(DAG, at=AT, answers=labels)


def test_every_scan_is_sorted_once(world: World, ran: dict[str, Any], labels: dict[str, str]) -> None:
    assert ran["state"] == "success"
    assert ran["outputs"]["ingest"]["counts"] == {"read": 899, "accepted": 899, "quarantined": 0}
    routed = [row for route in ROUTES for row in world.rows(ran["outputs"]["decide"][route], route)]
    assert Counter(row["path"] for row in routed) == Counter(list(labels))


def test_what_is_sorted_without_a_person_is_sorted_right(
    world: World, ran: dict[str, Any], labels: dict[str, str]
) -> None:
    acted = world.rows(ran["outputs"]["decide"]["act"], "act")
    assert len(acted) > 600
    assert sum(row["prediction"] == labels[row["path"]] for row in acted) / len(acted) > 0.98


def test_what_a_person_sorts_is_what_the_person_said(world: World, ran: dict[str, Any], labels: dict[str, str]) -> None:
    reviewed = world.rows(ran["outputs"]["review"], "reviewed")
    assert {row["path"] for row in reviewed} == set(ran["asked"].values())
    assert all(row["decision"] == labels[row["path"]] for row in reviewed)
    assert any(row["decision"] != row["prediction"] for row in reviewed)


def test_a_tray_for_each_scan_that_is_decided(world: World, ran: dict[str, Any]) -> None:
    counts = ran["outputs"]["decide"]["act"]["counts"]
    assert counts["review"] > 0
    assert counts["hold"] > 0
    assert world.states(DAG) == {("ticket", "done"): counts["act"] + counts["review"]}
    scans = [ticket for ticket in world.ask("tickets") if ticket["subject"].startswith("scan-")]
    assert len(scans) == counts["act"] + counts["review"]


def test_a_clear_changes_no_byte_and_sorts_nothing_twice(
    world: World, ran: dict[str, Any], labels: dict[str, str]
) -> None:
    before = world.bytes_of_all_batches(), world.effects(DAG), world.ask("effects")
    again = world.run(DAG, at=AT, answers=labels)
    assert again["tasks"] == ran["tasks"]
    assert (world.bytes_of_all_batches(), world.effects(DAG), world.ask("effects")) == before


def test_new_scans_are_all_that_a_later_run_takes(world: World, ran: dict[str, Any]) -> None:
    scans = world.folder / "scans"
    (scans / "scan-9999.png").write_bytes((scans / "scan-0000.png").read_bytes())
    (scans / "scan-9998.png").write_bytes(b"no picture at all")
    later = world.run(DAG, at="2026-05-01T11:00:00+00:00")
    counts = later["outputs"]["ingest"]["counts"]
    assert counts["read"] == 2
    assert counts["accepted"] + counts["quarantined"] == 2
    assert world.states(DAG).total() == later["outputs"]["decide"]["act"]["counts"]["act"] + len(
        world.rows(ran["outputs"]["decide"]["act"], "act") + world.rows(ran["outputs"]["review"], "reviewed")
    )


def test_mapped_over_several_tasks_it_predicts_the_same(
    world: World, ran: dict[str, Any], labels: dict[str, str]
) -> None:
    data = yaml.safe_load((PROJECT / "dags" / "pipelines" / f"{DAG}.yaml").read_text(encoding="utf-8"))
    del data["act"], data["review"]
    data["infer"] |= {"shards": 3, "pool": "default_pool"}
    folder, file = world.own_dags, world.own_dags / "sharded.py"
    (folder / "sharded_sorting.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    file.write_text(
        "# a DAG file\nfrom airflow_ai_provider import load_pipelines\n"
        f"globals().update(load_pipelines({str(folder)!r}))\n",
        encoding="utf-8",
    )
    sharded = world.run("sharded_sorting", file=str(file), at=AT)
    assert sharded["tasks"]["infer_shard"] == sharded["tasks"]["infer"] == "success"
    assert sharded["outputs"]["ingest"]["counts"]["accepted"] > 0
    first, second = (world.rows(run["outputs"]["infer"], "predictions") for run in (ran, sharded))
    named = {row["_row_id"]: row for row in second}
    assert len(named) == len(second) >= len(first)
    assert [named[row["_row_id"]] for row in first] == first
