"""``airflow ai quarantine`` and ``airflow ai claims``: from a rejected row to its replay; a claim given up by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from airflow_ai_provider.core.batch import ACCEPTED, BatchRef, Slice, Span
from airflow_ai_provider.core.ingest.flow import IngestRun, ingest
from airflow_ai_provider.core.ingest.replay import land_replay, replay_quarantine
from airflow_ai_provider.core.ledger import Ledger
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.testing import MemorySource, RuleValidator
from tests.core.ingest.cutting import cut_ingest

RULES = RuleValidator(lambda row: None if (row["x"] or 0) >= 0 else f"out_of_range: x={row['x']}", {"id": "int64", "x": "float64"})  # noqa: E501  # fmt: skip
ROWS = [b'{"id":1,"x":1}', b'{"id":2,"x":-1,"s":"two"}', b'{"id": "\x1b[2J\xff"}', None, b'{"id":"five","x":5}']


@pytest.fixture(params=[1, 3], ids=["whole", "cut"])
def batch(stored: tuple[Store, Ledger], request: pytest.FixtureRequest) -> BatchRef:
    """Five rows of pipeline ``p``: one accepted, four that wait; landed by one task, or in shards."""
    source, run = MemorySource({0: ROWS}, key="id"), IngestRun("p", "run-1", "run-1/ingest/-1")
    return cut_ingest(source, RULES, *stored, run, shards=request.param)


def row_id(offset: int) -> str:
    return f"rows~memory-1/0/{offset}"


def test_list_counts_what_waits_by_reason(ai: Any, batch: BatchRef) -> None:
    status, out, err = ai("quarantine", "list")
    assert status == 0
    header, line = out.splitlines()
    assert header.split() == ["pipeline", "batch", "run", "age", "waiting", "replayed", "dismissed", "reasons"]
    assert line.split()[:3] == ["p", batch.batch_id, "run-1"]
    assert "4" in line
    assert "wrong_type 1" in line
    assert "4 rows in 1 batch; the oldest for" in err
    found = json.loads(ai("quarantine", "list", "--pipeline", "p", "--run", "run-1", "--format", "json")[1])
    assert found["reasons"] == {"broken_json": 1, "out_of_range": 1, "tombstone": 1, "wrong_type": 1}
    assert json.loads(ai("quarantine", "list", "--stage", "validate", "--format", "json")[1])["waiting"] == 1
    assert json.loads(ai("quarantine", "list", "--reason", "tombstone", "--format", "json")[1])["waiting"] == 1
    for nothing in (["--pipeline", "q"], ["--run", "x"], ["--older-than", "1h"], ["--reason", "x"]):
        assert ai("quarantine", "list", *nothing)[:2] == (0, "")
    assert ai("quarantine", "list", "--older-than", "soon")[0] == 1


def test_dismissed_rows_wait_no_more_and_rest_where_they_are(
    ai: Any, batch: BatchRef, stored: tuple[Store, Ledger]
) -> None:
    where, before = (
        ("quarantine", "dismiss", batch.batch_id),
        sorted(Path(batch.uri.removeprefix("file://")).rglob("*")),
    )
    assert ai(*where, "--reason", "tombstone", "--why", "  ")[0] == 1
    status, _, err = ai(*where, "--row", "rows~nothing/0/1", "--why", "x")
    assert (status, "not in the quarantine" in err) == (1, True)
    status, _, err = ai(*where, "--reason", "tombstone", "--why", "deleted, INC-417", "--who", "mira")
    assert (status, "1 row dismissed" in err) == (0, True)
    assert "0 rows dismissed" in ai(*where, "--reason", "tombstone", "--why", "again", "--who", "otto")[2]
    assert "1 row dismissed" in ai(*where, "--row", row_id(1), "--why", "a test")[2]
    found = json.loads(ai("quarantine", "list", "--format", "json")[1])
    assert (found["waiting"], found["replayed"], found["dismissed"]) == (2, 0, 2)
    assert found["reasons"] == {"broken_json": 1, "wrong_type": 1}
    assert json.loads(ai("quarantine", "list", "--stage", "decode", "--format", "json")[1])["waiting"] == 2
    shown = ai("quarantine", "show", batch.batch_id)[1]
    assert row_id(3) not in shown
    assert "2  dismissed" in shown
    assert "(dismissed by mira: deleted, INC-417)" in ai("quarantine", "show", batch.batch_id, "--all")[1]
    assert "(dismissed by mira" in ai("quarantine", "show", batch.batch_id, "--row", row_id(3))[1]
    assert len(ai("quarantine", "export", batch.batch_id)[1].splitlines()) == 2
    assert len(ai("quarantine", "export", batch.batch_id, "--all")[1].splitlines()) == 4
    assert sorted(Path(batch.uri.removeprefix("file://")).rglob("*")) == before, "evidence is never deleted"
    assert "2 rows dismissed" in ai(*where, "--why", "all the rest")[2]
    assert ai("quarantine", "list")[1] == ""
    assert json.loads(ai("quarantine", "list", "--all", "--format", "json")[1])["dismissed"] == 4
    store, ledger = stored
    landed = replay_quarantine(store, ledger, RULES, batch, pipeline="p", corrections={row_id(1): {"x": 1}})
    assert landed.counts["accepted"] == 1, "a dismissed row can be replayed all the same"
    (found,) = [json.loads(line) for line in ai("quarantine", "list", "--all", "--format", "json")[1].splitlines()]
    assert (found["waiting"], found["replayed"], found["dismissed"]) == (0, 1, 3)


def test_show_prints_rows_that_cannot_drive_the_terminal(ai: Any, batch: BatchRef) -> None:
    status, out, _ = ai("quarantine", "show", batch.uri)
    assert status == 0
    assert "accepted 1, quarantined 4, read 5" in out
    assert "run run-1, memory:rows, landed " in out
    assert f"{row_id(2)}  decode: broken_json: " in out
    assert f"0x{ROWS[2].hex()}" in out  # type: ignore[union-attr]
    assert "\x1b" not in out
    assert ai("quarantine", "show", batch.batch_id)[1].splitlines()[2:] == out.splitlines()[2:]
    assert row_id(2) not in ai("quarantine", "show", batch.batch_id, "--reason", "tombstone")[1]
    rows = [json.loads(line) for line in ai("quarantine", "show", batch.batch_id, "--format", "json")[1].splitlines()]
    assert [set(row["_payload"]) for row in rows if isinstance(row["_payload"], dict)] == [{"base64"}]
    assert ai("quarantine", "show", batch.batch_id, "--row", row_id(1))[1].count("rows~memory-1") == 1


def test_show_reads_a_batch_that_the_ledger_does_not_know(ai: Any, stored: tuple[Store, Ledger]) -> None:
    from airflow_ai_provider.testing import MemoryLedger

    source = MemorySource({0: ROWS})
    ref = ingest(source, RULES, stored[0], MemoryLedger(), IngestRun("p", "run-1", "run-1/ingest/-1"))
    assert "quarantined 4" in ai("quarantine", "show", ref.uri)[1]
    assert ai("quarantine", "show", ref.batch_id)[0] == 1


def test_what_is_not_there_is_named(ai: Any, batch: BatchRef) -> None:
    status, _, err = ai("quarantine", "show", "absent", "--pipeline", "p")
    assert (status, "there is no batch 'absent' of pipeline 'p'" in err) == (1, True)
    assert "--pipeline" in ai("quarantine", "show", "absent")[2]


def test_rows_are_exported_edited_and_replayed_once(
    ai: Any, batch: BatchRef, stored: tuple[Store, Ledger], tmp_path: Path
) -> None:
    file = tmp_path / "mended.jsonl"
    status, out, err = ai("quarantine", "export", batch.batch_id, "--output", str(file))
    assert (status, out) == (0, "")
    assert f"quarantine replay {batch.batch_id} --pipeline p --corrections {file}" in err
    assert ai("quarantine", "export", batch.batch_id, "--output", str(file))[0] == 1  # what was edited is kept
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["row"] for line in lines] == [{"id": 2, "x": -1, "s": "two"}, None, None, {"id": "five", "x": 5}]
    assert set(lines[1]["payload"]) == {"base64"}
    assert lines[0]["origin"]["offset"] == 1
    del lines[0]["row"]["s"]  # a whole row is taken as it stands: a field may go
    lines[0]["row"]["x"], lines[3]["row"]["id"] = 2, 5
    file.write_text("\n".join(map(json.dumps, lines)))
    status, out, err = ai("quarantine", "replay", batch.batch_id, "--corrections", str(file), "--no-trigger")
    assert status == 0
    assert "2 mended rows stored as replay" in err
    replay_id = json.loads(out.partition("--conf '")[2].rpartition("'")[0])["replay"]
    assert f"--run-id replay__{replay_id}" in out
    store, ledger = stored
    new = land_replay(store, ledger, RULES, replay_id, pipeline="p", run_id="run-2")
    landed = [row for part in store.read(new, ACCEPTED) for row in part.to_pylist()]
    assert [(row["_row_id"], row["id"], row["x"]) for row in landed] == [(row_id(1), 2, 2.0), (row_id(4), 5, 5.0)]
    assert "s" not in landed[0] or landed[0]["s"] is None

    again = ai("quarantine", "replay", batch.batch_id, "--corrections", str(file), "--no-trigger")
    assert (again[0], again[1]) == (0, out)  # the same corrections are the same replay
    lines[0]["row"]["x"] = 3
    file.write_text("\n".join(map(json.dumps, lines)))
    status, _, err = ai("quarantine", "replay", batch.batch_id, "--corrections", str(file), "--no-trigger")
    assert (status, f"{row_id(1)} (landed in batch {new.batch_id})" in err) == (1, True)

    shown = ai("quarantine", "show", batch.batch_id)[1]
    assert f"2  replayed into {new.batch_id} by run run-2" in shown
    assert f"{row_id(1)}  validate: out_of_range: x=-1.0  (replayed into {new.batch_id})" in shown
    found = json.loads(ai("quarantine", "list", "--format", "json")[1])
    assert (found["waiting"], found["replayed"], set(found["reasons"])) == (2, 2, {"broken_json", "tombstone"})
    assert row_id(1) not in ai("quarantine", "export", batch.batch_id)[1]
    assert row_id(1) in ai("quarantine", "export", batch.batch_id, "--all")[1]


def test_a_function_mends_the_rows_of_a_reason(
    ai: Any, batch: BatchRef, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mending.py").write_text("def flip(row):\n    return {**row, 'x': abs(row.get('x', 0))}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    words = ("quarantine", "replay", batch.batch_id, "--no-trigger", "--fix")
    status, _, err = ai(*words, "mending:flip", "--reason", "out_of_range")
    assert (status, "1 mended row stored" in err) == (0, True)
    for wrong in ("mending:absent", "absent:flip", "mending", "json:__doc__"):
        assert ai(*words, wrong)[0] == 1
    assert ai(*words, "mending:flip", "--corrections", "x.json")[0] == 1
    assert ai("quarantine", "replay", batch.batch_id)[0] == 1


@pytest.fixture
def stuck(stored: tuple[Store, Ledger]) -> Ledger:
    """Two claims that did not land; a later run went on behind the first in topic partition 0."""
    _, ledger = stored
    ledger.claim("p", "run-1/ingest/-1", Span("kafka:t", "", (Slice("0", 0, 5), Slice("1", 0, 9))), "run-1")
    ledger.claim("p", "run-2/ingest/-1", Span("kafka:t", "", (Slice("0", 5, 8),)), "run-2")
    return ledger


def test_claims_are_listed_and_released_with_their_consequences(ai: Any, stuck: Ledger) -> None:
    status, out, err = ai("claims", "list")
    assert (status, "2 claims not landed" in err) == (0, True)
    assert "0[0:5] 1[0:9]" in out
    assert json.loads(ai("claims", "list", "--format", "json")[1].splitlines()[0])["run_key"] == "run-1/ingest/-1"
    assert ai("claims", "list", "--older-than", "1h")[1] == ai("claims", "list", "--pipeline", "q")[1] == ""
    status, _, err = ai("claims", "release", "run-1/ingest/-1", "--pipeline", "p")
    assert (status, "give --yes" in err) == (1, True)  # nobody to ask: nothing is done
    assert len(stuck.claims("p")) == 2
    status, out, err = ai("claims", "release", "run-1/ingest/-1", "--pipeline", "p", "--yes")
    assert (status, out) == (0, "released run-1/ingest/-1\n")
    assert "topic partition 0: no cursor comes back" in err
    assert "The next run takes its rows of the topic partitions that no later run" in err
    assert [claim.run_id for claim in stuck.claims("p")] == ["run-2"]
    assert "no cursor" not in ai("claims", "release", "run-2/ingest/-1", "--pipeline", "p", "--yes")[2]


def test_what_cannot_be_released_is_said(ai: Any, batch: BatchRef) -> None:
    assert "has landed batch" in ai("claims", "release", "run-1/ingest/-1", "--pipeline", "p", "--yes")[2]
    assert "holds no claim" in ai("claims", "release", "run-9/ingest/-1", "--pipeline", "p", "--yes")[2]
    assert batch.batch_id and "landed" in ai("claims", "list", "--all")[1]
