"""Replay: mended rows land under their own ids, once, and again with the same bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from airflow_ai_provider.core.batch import ACCEPTED, QUARANTINE, BatchRef
from airflow_ai_provider.core.ingest.contract import AcceptAll, Validator
from airflow_ai_provider.core.ingest.correction import read_corrections
from airflow_ai_provider.core.ingest.files import FileReader
from airflow_ai_provider.core.ingest.flow import IngestRun, ingest
from airflow_ai_provider.core.ingest.replay import replay_quarantine
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.errors import BatchRejectedError, SpanConflictError, SpecError
from airflow_ai_provider.testing import MemoryLedger, MemorySource, RuleValidator

POSITIVE = RuleValidator(lambda row: None if (row["x"] or 0) >= 0 else f"out_of_range: x={row['x']}", {"id": "int64", "x": "float64"})  # noqa: E501  # fmt: skip
ROWS = [b'{"id":1,"x":1}', b'{"id":2,"x":-1,"s":"two"}', b"{broken", None, b'{"id":"five","x":5}']


@pytest.fixture
def landed(tmp_path: Path) -> tuple[Store, MemoryLedger, BatchRef]:
    store, ledger = Store(str(tmp_path)), MemoryLedger()
    source = MemorySource({0: ROWS}, key="id")
    return store, ledger, ingest(source, POSITIVE, store, ledger, IngestRun("p", "r", "k"))


def rows(store: Store, ref: BatchRef, table: str) -> dict[str, dict[str, Any]]:
    return {row["_row_id"].rpartition("/")[2]: row for part in store.read(ref, table) for row in part.to_pylist()}


def row_id(offset: int) -> str:
    return f"rows~memory-1/0/{offset}"


def test_corrected_rows_land_under_their_own_ids(landed: tuple[Store, MemoryLedger, BatchRef], tmp_path: Path) -> None:
    store, ledger, ref = landed
    corrections = {row_id(1): {"x": 2}, row_id(2): {"id": 3, "x": 3}, row_id(4): {"id": 5, "x": -5}}
    new = replay_quarantine(store, ledger, POSITIVE, ref, corrections=corrections, pipeline="p")
    assert new.counts == {"read": 3, "accepted": 2, "quarantined": 1}
    accepted = rows(store, new, ACCEPTED)
    assert [(k, r["id"], r["x"], r["s"], r["_offset"]) for k, r in accepted.items()] == [
        ("1", 2, 2.0, "two", 1),
        ("2", 3, 3.0, None, 2),
    ]
    assert rows(store, new, QUARANTINE)["4"]["_reasons"] == ["out_of_range: x=-5.0"]
    manifest = store.manifest(new)
    assert manifest.facts["replay_of"] == ref.to_dict()
    assert manifest.facts["key"] == "id"
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.*")}
    assert replay_quarantine(store, ledger, POSITIVE, ref, corrections=corrections, pipeline="p") == new
    assert {p: p.read_bytes() for p in tmp_path.rglob("*.*")} == before
    again = replay_quarantine(store, ledger, POSITIVE, new, corrections={row_id(4): {"x": 5}}, pipeline="p")
    assert rows(store, again, ACCEPTED)["4"]["id"] == 5


def test_a_fix_sees_every_row_and_may_leave_it(landed: tuple[Store, MemoryLedger, BatchRef]) -> None:
    store, ledger, ref = landed
    seen = []

    def fix(fields: dict[str, Any]) -> dict[str, Any] | None:
        seen.append(dict(fields))
        return {**fields, "x": abs(fields["x"])} if isinstance(fields.get("id"), int) else None

    new = replay_quarantine(store, ledger, POSITIVE, ref, fix, pipeline="p")
    assert sorted(map(json.dumps, seen)) == ['{"id": "five", "x": 5}', '{"id": 2, "x": -1, "s": "two"}', "{}", "{}"]
    assert list(rows(store, new, ACCEPTED)) == ["1"]
    nothing = replay_quarantine(store, ledger, POSITIVE, ref, lambda fields: None, pipeline="p")
    assert nothing.counts == {"read": 0, "accepted": 0, "quarantined": 0}


def test_a_row_is_replayed_once(landed: tuple[Store, MemoryLedger, BatchRef]) -> None:
    store, ledger, ref = landed
    replay_quarantine(store, ledger, POSITIVE, ref, corrections={row_id(1): {"x": 2}}, pipeline="p")
    with pytest.raises(SpanConflictError):
        replay_quarantine(store, ledger, POSITIVE, ref, corrections={row_id(1): {"x": 3}}, pipeline="p")
    both = {row_id(1): {"x": 3}, row_id(4): {"id": 5}}
    with pytest.raises(SpanConflictError):
        replay_quarantine(store, ledger, POSITIVE, ref, corrections=both, pipeline="p")


def test_a_refused_replay_may_be_tried_with_other_corrections(landed: tuple[Store, MemoryLedger, BatchRef]) -> None:
    store, ledger, ref = landed
    refusing = RuleValidator(whole=lambda table: ["too few rows"] if table.num_rows < 2 else [])
    with pytest.raises(BatchRejectedError, match="too few rows"):
        replay_quarantine(store, ledger, refusing, ref, corrections={row_id(1): {"x": 2}}, pipeline="p")
    two = {row_id(1): {"x": 2}, row_id(4): {"id": 5}}
    assert replay_quarantine(store, ledger, refusing, ref, corrections=two, pipeline="p").counts["accepted"] == 2


def test_what_cannot_be_replayed_is_named(landed: tuple[Store, MemoryLedger, BatchRef], tmp_path: Path) -> None:
    store, ledger, ref = landed
    with pytest.raises(SpecError, match="rows~memory-1/0/0, rows~memory-1/0/99"):
        replay_quarantine(store, ledger, POSITIVE, ref, corrections={row_id(99): {}, row_id(0): {}}, pipeline="p")
    with pytest.raises(SpecError, match="nothing to replay"):
        replay_quarantine(store, ledger, POSITIVE, ref, pipeline="p")
    with pytest.raises(SpecError, match="cannot be written as JSON"):
        replay_quarantine(store, ledger, POSITIVE, ref, lambda fields: {"x": float("nan")}, pipeline="p")
    path = tmp_path / "corrections.json"
    with pytest.raises(SpecError, match="cannot be read"):
        read_corrections(path)
    path.write_text("[1]")
    with pytest.raises(SpecError, match="object of objects"):
        read_corrections(path)
    path.write_text(json.dumps({row_id(1): {"x": 2}}))
    new = replay_quarantine(store, ledger, POSITIVE, ref, corrections=read_corrections(path), pipeline="p")
    assert new.counts["accepted"] == 1


@pytest.mark.parametrize("rules", [AcceptAll(), RuleValidator(unique="id")])
def test_a_csv_row_is_mended_by_its_columns(tmp_path: Path, rules: Validator) -> None:
    (tmp_path / "a.csv").write_bytes(b"id,name,x\n1,a,1.5\nzwei,b,2\n3,c\n")
    store, ledger = Store(str(tmp_path / "store")), MemoryLedger()
    typed = RuleValidator(schema={"id": "int64", "x": "float64"})
    ref = ingest(FileReader(str(tmp_path / "a.csv")), typed, store, ledger, IngestRun("p", "r", "k"))
    broken = rows(store, ref, QUARANTINE)
    # cells of a quarantined CSV row are texts: the corrected fields need their types
    corrections = {
        broken["1"]["_row_id"]: {"id": 2, "x": 2},
        broken["2"]["_row_id"]: {"id": 3, "name": "c", "x": 3.5},
    }
    new = replay_quarantine(store, ledger, rules, ref, corrections=corrections, pipeline="p")
    assert [(r["id"], r["name"], r["x"], r["_file"]) for r in rows(store, new, ACCEPTED).values()] == [
        (2, "b", 2.0, "a.csv"),
        (3, "c", 3.5, "a.csv"),
    ]
