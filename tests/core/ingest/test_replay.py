"""Replay: mended rows land under their own ids, once, and again with the same bytes."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from airflow_ai_provider.core.batch import ACCEPTED, QUARANTINE, ROW_ID, BatchRef
from airflow_ai_provider.core.ingest import replay
from airflow_ai_provider.core.ingest.contract import AcceptAll, Validator
from airflow_ai_provider.core.ingest.correction import export_rows, read_corrections
from airflow_ai_provider.core.ingest.files import FileReader
from airflow_ai_provider.core.ingest.flow import IngestRun, ingest
from airflow_ai_provider.core.ingest.quarantine import find_quarantines, summarise
from airflow_ai_provider.core.ingest.replay import land_replay, prepare_replay, replay_quarantine
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.errors import BatchRejectedError, SpanConflictError, SpecError
from airflow_ai_provider.testing import MemoryLedger, MemorySource, RuleValidator
from tests.core.ingest.cutting import cut_ingest
from tests.core.ingest.test_flow import Crash, Seams, crashing_store, world

POSITIVE = RuleValidator(lambda row: None if (row["x"] or 0) >= 0 else f"out_of_range: x={row['x']}", {"id": "int64", "x": "float64"})  # noqa: E501  # fmt: skip
ROWS = [b'{"id":1,"x":1}', b'{"id":2,"x":-1,"s":"two"}', b"{broken", None, b'{"id":"five","x":5}']


@pytest.fixture(params=[1, 3], ids=["whole", "cut"])
def landed(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Store, MemoryLedger, BatchRef]:
    """A batch of five rows, landed by one task, or in shards."""
    store, ledger = Store(str(tmp_path)), MemoryLedger()
    source = MemorySource({0: ROWS}, key="id")
    run = IngestRun("p", "r", "k")
    return store, ledger, cut_ingest(source, POSITIVE, store, ledger, run, shards=request.param)


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


@pytest.mark.parametrize("before", [True, False])
def test_a_crash_at_any_seam_of_a_replay_loses_and_doubles_nothing(tmp_path: Path, before: bool) -> None:
    """Whichever run comes next lands the same batch, and the rows are claimed once."""
    corrections = {row_id(1): {"x": 2}, row_id(4): {"id": 5, "x": -5}}

    def landed_in(root: Path) -> tuple[Store, MemoryLedger, BatchRef]:
        store, ledger = Store(str(root)), MemoryLedger()
        return store, ledger, ingest(MemorySource({0: ROWS}), POSITIVE, store, ledger, IngestRun("p", "r", "k"))

    store, ledger, ref = landed_in(tmp_path / "whole")
    replay_quarantine(store, ledger, POSITIVE, ref, corrections=corrections, pipeline="p")
    whole, at, seams = world(tmp_path / "whole"), 0, Seams(0, before)
    while at == 0 or at <= seams.count:  # until the replay has no such call any more
        at += 1
        root, seams = tmp_path / str(at), Seams(at, before)
        store, ledger, ref = landed_in(root)
        dying = crashing_store(root, seams), seams.wrap(ledger)
        try:
            replay_quarantine(*dying, POSITIVE, ref, corrections=corrections, pipeline="p")
        except Crash:
            pass
        else:
            assert at > seams.count
        first, second = (
            replay_quarantine(store, ledger, POSITIVE, ref, corrections=corrections, pipeline="p", run_id=run)
            for run in ("r2", "r3")
        )
        assert first == second
        assert first.counts == {"read": 2, "accepted": 1, "quarantined": 1}
        assert set(world(root)) == set(whole)
        rows = {
            name: data for name, data in world(root).items() if name.endswith(".parquet")
        }  # manifests name the root
        assert rows == {name: whole[name] for name in rows}
        assert [claim.state for claim in ledger.claims("p")] == ["landed", "landed"]
    assert at > 10, "the crash went through every seam"


def test_two_who_replay_one_row_otherwise_at_one_moment_do_not_both_land(
    landed: tuple[Store, MemoryLedger, BatchRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, ledger, ref = landed
    both = [prepare_replay(store, ref, pipeline="p", corrections={row_id(1): {"x": x}}).batch_id for x in (2, 3)]
    monkeypatch.setattr(replay, "demand_free", lambda *_: None)  # as if both had looked before either claimed
    first = land_replay(store, ledger, POSITIVE, both[0], pipeline="p", run_id="r1")
    with pytest.raises(SpanConflictError):
        land_replay(store, ledger, POSITIVE, both[1], pipeline="p", run_id="r2")
    assert land_replay(store, ledger, POSITIVE, both[0], pipeline="p", run_id="r3") == first


@pytest.mark.parametrize("name", ["absent", "../batch/x", "", "a/b", ".."])
def test_a_conf_cannot_name_what_is_no_replay(landed: tuple[Store, MemoryLedger, BatchRef], name: str) -> None:
    store, ledger, _ = landed
    with pytest.raises(SpecError, match="there is no replay"):
        land_replay(store, ledger, POSITIVE, name, pipeline="p", run_id="r")


def test_what_waits_is_counted_without_what_was_replayed(landed: tuple[Store, MemoryLedger, BatchRef]) -> None:
    store, ledger, ref = landed
    start = datetime(2026, 11, 22, tzinfo=UTC)
    nothing = summarise([], store, start)
    assert (nothing.rows, nothing.oldest, str(nothing)) == (0, None, "in quarantine waits no row")
    (quarantine,) = find_quarantines(ledger, "p")
    assert quarantine.claim.updated_at is not None
    now = quarantine.claim.updated_at + timedelta(days=3, hours=4)
    waiting = summarise([quarantine], store, now)
    assert (waiting.rows, waiting.batches, waiting.oldest) == (4, 1, timedelta(days=3, hours=4))
    assert str(waiting).startswith("in quarantine wait 4 rows of 1 batches, the oldest for 3 days, 4:00:00: ")
    replay_quarantine(store, ledger, POSITIVE, ref, pipeline="p", corrections={row_id(1): {"x": -2}, row_id(2): {"id": 3, "x": 1}})  # noqa: E501  # fmt: skip
    found = find_quarantines(ledger, "p")
    assert [(q.row_count, q.waiting) for q in found] == [(4, 2), (1, 1)]
    assert dict(summarise(found, store, now).reasons) == {"tombstone": 1, "wrong_type": 1, "out_of_range": 1}
    assert [q.ref for q in find_quarantines(ledger, "p", "r")] == [ref]
    shutil.rmtree(Path(store.root) / "p" / "batch" / ref.batch_id)  # old batches may be removed
    assert found[0].reasons(store) is None
    assert dict(summarise(found, store, now).reasons) == {"out_of_range": 1}


def test_lines_that_are_no_corrections_are_named(tmp_path: Path) -> None:
    path = tmp_path / "mended.jsonl"
    for text, told in [
        ('{"row_id": "a", "row": {}}\n{broken\n', "line 2"),
        ('{"row_id": "a", "row": {}}\n{"row": {}}\n', "line 2: has no 'row_id'"),
        ('{"row_id": "a", "row": {}}\n\n{"row_id": "a", "row": {}}\n', "line 3: row a stands there twice"),
        ('{"row_id": "a", "row": [1]}', "line 1: row must be an object"),
        ("", "cannot be read"),
    ]:
        path.write_text(text)
        with pytest.raises(SpecError, match=told):
            read_corrections(path)
    path.write_text('{"row_id": "a", "row": {"x": 1}, "reasons": []}\n{"row_id": "b", "row": null}\n')
    assert read_corrections(path).whole == {"a": {"x": 1}}


# --- a quarantine of many parts ---

TWICE = RuleValidator(lambda row: None if (row["x"] or 0) >= 0 else f"out_of_range: x={row['x']}", {"id": "int64", "x": "float64"}, unique="id")  # noqa: E501  # fmt: skip


def cut_batch(folder: Path) -> tuple[Store, MemoryLedger, BatchRef]:
    """Sixty rows of two topic partitions in five shards: every tenth is broken or negative, and two ids came twice."""
    payloads = [json.dumps({"id": n, "x": -1 if n % 20 == 3 else 1}).encode() for n in range(60)]
    payloads[13], payloads[33], payloads[53] = b"{broken", b"\xff", b'{"id": 8, "x": 1}'
    payloads[59] = b'{"id": 31, "x": 1}'
    store, ledger = Store(str(folder)), MemoryLedger()
    source = MemorySource({0: payloads[:30], 1: payloads[30:]}, key="id", chunk=4)
    return store, ledger, cut_ingest(source, TWICE, store, ledger, IngestRun("p", "r", "k"), shards=5)


def place(number: int) -> str:
    return f"rows~memory-1/{number // 30}/{number % 30}"


def test_rows_of_all_parts_are_told_exported_edited_and_replayed(tmp_path: Path) -> None:
    store, ledger, ref = cut_batch(tmp_path / "store")
    wrong = {3: "out_of_range", 8: "not_unique", 13: "broken_json", 23: "out_of_range", 31: "not_unique"}
    wrong |= {33: "broken_json", 43: "out_of_range", 53: "not_unique", 59: "not_unique"}
    assert ref.counts == {"read": 60, "accepted": 51, "quarantined": 9}
    assert len(store.manifest(ref).table(QUARANTINE)) == 5, "every shard has its own"
    (quarantine,) = find_quarantines(ledger, "p")
    assert quarantine.reasons(store) == {"not_unique": 4, "out_of_range": 3, "broken_json": 2}
    told = {row[ROW_ID]: row["_reasons"][0].partition(":")[0] for row in quarantine.rows(store)}
    assert told == {place(number): code for number, code in wrong.items()}
    assert all(quarantine.may_hold(row_id) for row_id in told)
    assert not quarantine.may_hold("rows~memory-1/1/30")

    lines = [json.loads(line) for line in export_rows(quarantine.rows(store))]
    file = tmp_path / "mended.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    assert len(read_corrections(file).row_ids) == 7, "unedited they are what they were; two payloads are no object"
    for line in lines:
        number = next(n for n in wrong if place(n) == line["row_id"])
        line["row"] = {"id": 100 + number, "x": -5 if number in (23, 33) else 1}
    file.write_text("\n".join(map(json.dumps, lines)))
    again = replay_quarantine(store, ledger, TWICE, ref, pipeline="p", corrections=read_corrections(file))
    assert again.counts == {"read": 9, "accepted": 7, "quarantined": 2}
    before, claims = world(tmp_path), ledger.claims("p")
    assert replay_quarantine(store, ledger, TWICE, ref, pipeline="p", corrections=read_corrections(file)) == again
    assert (world(tmp_path), ledger.claims("p")) == (before, claims), "a second time changes nothing"
    assert {row["_row_id"] for part in store.read(again, ACCEPTED) for row in part.to_pylist()} == {
        place(number) for number in wrong if number not in (23, 33)
    }


def test_what_a_replay_rejects_is_replayed_from_there_and_nowhere_else(tmp_path: Path) -> None:
    store, ledger, ref = cut_batch(tmp_path)
    first = replay_quarantine(store, ledger, TWICE, ref, lambda row: {"id": 8, "x": row.get("x", -2)}, pipeline="p")
    # all nine have one id now: as a batch of their own they are doubles of each other
    assert first.counts == {"read": 9, "accepted": 0, "quarantined": 9}
    with pytest.raises(SpanConflictError, match="new batch's quarantine"):
        replay_quarantine(store, ledger, TWICE, ref, pipeline="p", corrections={place(3): {"x": 1}})
    corrections = {place(n): {"id": 100 + n, "x": 1} for n in (3, 33, 59)}
    second = replay_quarantine(store, ledger, TWICE, first, pipeline="p", corrections=corrections)
    assert second.counts == {"read": 3, "accepted": 3, "quarantined": 0}
    assert replay_quarantine(store, ledger, TWICE, first, pipeline="p", corrections=corrections) == second
    assert store.manifest(second).facts["replay_of"] == first.to_dict()
    waiting = {q.ref.batch_id: q.waiting for q in find_quarantines(ledger, "p")}
    assert waiting == {ref.batch_id: 0, first.batch_id: 6}
    with pytest.raises(SpecError, match="not in the quarantine"):
        replay_quarantine(store, ledger, TWICE, first, pipeline="p", corrections={place(4): {"x": 1}})
