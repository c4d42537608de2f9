"""Shards: every row in one of them, the same rows and columns however a batch is cut, and what each crash leaves."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_ai_provider.core.batch import ACCEPTED, QUARANTINE, BatchRef, Slice, Span
from airflow_ai_provider.core.ingest import flow
from airflow_ai_provider.core.ingest import shard as cutting
from airflow_ai_provider.core.ingest.block import cut
from airflow_ai_provider.core.ingest.contract import AcceptAll, Source, Validator
from airflow_ai_provider.core.ingest.encoded import source as encoded
from airflow_ai_provider.core.ingest.encoded.framed_json import FramedJsonSource
from airflow_ai_provider.core.ingest.encoded.source import open_encoded
from airflow_ai_provider.core.ingest.files import FileReader
from airflow_ai_provider.core.ingest.flow import Ingest, IngestRun, ingest, plan_shards
from airflow_ai_provider.core.ingest.shard import ShardRef, cut_span, shard_count
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.errors import (
    BatchRejectedError,
    CorruptBatchError,
    SourceUnavailableError,
    SpanConflictError,
    SpecError,
)
from airflow_ai_provider.testing import MemoryLedger, MemorySource, RuleValidator
from airflow_ai_provider.testing.registry import MemorySchemas
from tests.core.ingest.avro_rows import encode, framed
from tests.core.ingest.cutting import cut_ingest as cut_any
from tests.core.ingest.test_flow import RULES, Crash, Seams, crashing_store, payload, rows_of, source, world

RUN = IngestRun("p", "run-1", "run-1/plan")


@pytest.fixture(autouse=True)
def every_row_is_worth_a_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutting, "SMALLEST_ROWS", 1)
    monkeypatch.setattr(cutting, "SMALLEST_BYTES", 1)


def cut_ingest(
    topic: Any, rules: Validator, store: Store, ledger: Any, run: IngestRun = RUN, *, shards: int = 4
) -> BatchRef:
    return cut_any(topic, rules, store, ledger, run, shards=shards)


# --- cutting ---

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=12)


@given(SIZES, st.integers(2, 9))
def test_topic_partitions_are_cut_into_nearly_equal_stretches(sizes: list[int], of: int) -> None:
    span = Span("kafka:t", "id", tuple(sorted(Slice(str(p), 5, 5 + size) for p, size in enumerate(sizes))))
    pieces = cut_span(span, of)
    rows = [(int(s.partition), o) for piece in pieces for s in piece.slices for o in range(s.first, s.end)]
    assert rows == [(p, 5 + o) for p, size in enumerate(sizes) for o in range(size)]
    lengths = [sum(s.end - s.first for s in piece.slices) for piece in pieces]
    assert max(lengths) - min(lengths) <= 1
    assert len(pieces) == min(of, sum(sizes))


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.integers(1, 9))
def test_files_stay_whole_and_in_order(sizes: list[int], of: int) -> None:
    span = Span("files:f", "", tuple(Slice(f"{n:02d}", 0, size, "sha256:x") for n, size in enumerate(sizes)))
    pieces = cut_span(span, of)
    assert tuple(s for piece in pieces for s in piece.slices) == span.slices
    assert 1 <= len(pieces) <= of
    fair = sum(max(size, 1) for size in sizes) / of
    assert all(sum(s.end for s in piece.slices) <= fair + max(sizes) for piece in pieces)


def test_small_spans_are_not_worth_many_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    topic = Span("kafka:t", "", (Slice("0", 0, 25_000),))
    files = Span("files:t", "", (Slice("a", 0, 20 << 20, "sha256:x"),))
    assert [shard_count(topic, n) for n in (1, 2, 8)] == [1, 2, 2]
    assert [shard_count(files, n) for n in (1, 8)] == [1, 2]
    assert shard_count(Span("kafka:t", "", ()), 8) == 1
    for wrong in (0, 257):
        with pytest.raises(SpecError, match="1 to 256"):
            shard_count(topic, wrong)


# --- landing ---


@pytest.mark.parametrize("rules", sorted(RULES))
@pytest.mark.parametrize("shards", [2, 3, 7, 30])
def test_however_it_is_cut_the_batch_holds_the_same(tmp_path: Path, rules: str, shards: int) -> None:
    one, many = Store(str(tmp_path / "one")), Store(str(tmp_path / "many"))
    whole = ingest(source(), RULES[rules], one, MemoryLedger(), RUN)
    ledger, topic = MemoryLedger(), source()
    ref = cut_ingest(topic, RULES[rules], many, ledger, shards=shards)
    assert (ref.batch_id, ref.counts) == (whole.batch_id, whole.counts)
    assert many.manifest(ref).facts == one.manifest(whole).facts
    for table in (ACCEPTED, QUARANTINE):
        assert rows_of(many, ref, table) == rows_of(one, whole, table)
    claim = ledger.claim_of("p", RUN.run_key)
    assert claim is not None
    assert (claim.state, claim.ref) == ("landed", ref)
    assert topic.committed == {"0": 12, "1": 9}
    left = {Path(path).relative_to(f"p/batch/{ref.batch_id}").parts[0] for path in world(tmp_path / "many")}
    assert left == {"accepted", "quarantine", "manifest.json"}, "nothing is left of the marks"
    parts = {path for path in world(tmp_path / "many") if path.endswith(".parquet")}
    assert parts == {f"p/batch/{ref.batch_id}/{part.path}" for part in many.manifest(ref).parts}, (
        "nor of what was judged"
    )


def test_a_double_is_found_over_the_bounds_of_shards(tmp_path: Path) -> None:
    topic = MemorySource({0: [payload(id=n % 50, x=1.0) for n in range(60)]}, key="id", chunk=7)
    store = Store(str(tmp_path))
    ref = cut_ingest(topic, RuleValidator(unique="id"), store, MemoryLedger(), shards=6)
    assert ref.counts == {"read": 60, "accepted": 40, "quarantined": 20}
    assert [r["id"] for r in rows_of(store, ref, ACCEPTED)] == list(range(10, 50))
    assert [json.loads(r["_payload"])["id"] for r in rows_of(store, ref, QUARANTINE)] == [*range(10), *range(10)]
    assert store.manifest(ref).facts["reasons"] == {"not_unique": 20}


def test_all_shards_come_to_the_columns_of_the_batchs_first_rows(tmp_path: Path) -> None:
    rows: list[bytes | None] = [b"{broken", payload(a=1, b="x"), *(payload(a=n + 0.5, c=True) for n in range(20))]
    worlds = []
    for shards in (1, 5):
        store = Store(str(tmp_path / str(shards)))
        ref = cut_ingest(MemorySource({0: rows}), AcceptAll(), store, MemoryLedger(), shards=shards)
        worlds.append((store.manifest(ref).facts, rows_of(store, ref, ACCEPTED), rows_of(store, ref, QUARANTINE)))
    assert worlds[0] == worlds[1]
    assert worlds[0][0]["columns"].keys() == {"a", "b", "c"}


def test_the_first_shard_learns_the_columns_from_what_it_reads_anyway(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flow, "ROWS", 5)
    monkeypatch.setattr(flow, "cut", partial(cut, row_count=5))
    rows: list[bytes | None] = [b"{broken", *(payload(a=n, b=n % 2 == 0) for n in range(19)), payload(a=1.5, c=True)]
    topic, store = MemorySource({0: rows}, chunk=5), Store(str(tmp_path / "cut"))
    ref = cut_ingest(topic, AcceptAll(), store, MemoryLedger(), shards=2)
    assert topic.rows_read == len(rows), "no row was read twice"
    alone = Store(str(tmp_path / "alone"))
    whole = ingest(MemorySource({0: rows}, chunk=5), AcceptAll(), alone, MemoryLedger(), RUN)
    assert store.manifest(ref).facts == alone.manifest(whole).facts
    for table in (ACCEPTED, QUARANTINE):
        assert rows_of(store, ref, table) == rows_of(alone, whole, table)


class StandingSource(MemorySource):
    """Gives the batch's first rows, to the first who asks for them, only when it is told to."""

    def __init__(self, payloads: Mapping[int, Sequence[bytes | None]]) -> None:
        super().__init__(payloads, chunk=5)
        self.go, self.asked = Event(), Event()

    def read(self, span: Span) -> Iterator[pa.Table]:
        if span.slices[0].first == 0 and not self.asked.is_set():
            self.asked.set()
            assert self.go.wait(30)
        yield from super().read(span)


@pytest.mark.parametrize("in_time", [True, False])
def test_a_shard_waits_a_moment_for_the_columns_that_the_first_one_is_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_time: bool
) -> None:
    monkeypatch.setattr(flow, "ROWS", 5)
    monkeypatch.setattr(flow, "cut", partial(cut, row_count=5))
    topic, ledger = StandingSource({0: [payload(a=n) for n in range(20)]}), MemoryLedger()
    refs = plan_shards(topic, ledger, RUN, 2)
    work = Ingest(topic, AcceptAll(), Store(str(tmp_path)), ledger, RUN)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(work.shard, refs[0])
        assert topic.asked.wait(30)
        second = threads.submit(work.shard, refs[1])
        if not in_time:
            second.result(30)
        topic.go.set()
        done = [first.result(30), second.result(30)]
    assert (topic.rows_read == 20) is in_time, "it looked for them itself only when it had waited"
    assert work.land(done).counts == {"read": 20, "accepted": 20, "quarantined": 0}


@pytest.mark.parametrize("kind", ["avro", "json"])
def test_a_shard_that_has_to_look_for_the_columns_tells_the_schemas_of_its_own_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(encoded, "cut", partial(cut, row_count=2))
    schemas = MemorySchemas()
    rows: list[bytes | None] = []
    for n in range(12):  # three rows of each schema, which are one and a half blocks
        extra = [{"name": f"only{n // 3}", "type": "int"}]
        schema = {"type": "record", "name": "R", "fields": [{"name": "a", "type": "int"}, *extra]}
        if n % 3 == 0:
            schemas.add("t-value", schema if kind == "avro" else {"title": str(n)}, kind.upper())
        row = {"a": n, f"only{n // 3}": n}
        rows.append(framed(n // 3 + 1, encode(schema, row) if kind == "avro" else json.dumps(row).encode()))

    def topic() -> Source:
        inner = MemorySource({0: rows}, chunk=2)
        return open_encoded(inner, "avro", schemas) if kind == "avro" else FramedJsonSource(inner, schemas)

    ledger, store = MemoryLedger(), Store(str(tmp_path / "cut"))
    refs = plan_shards(topic(), ledger, RUN, 2)
    work = Ingest(topic(), AcceptAll(), store, ledger, RUN)
    last = work.shard(refs[1])  # before the first one, which would have found them
    (mark,) = (tmp_path / "cut").rglob("*done.json")
    assert {3, 4} <= {schema["id"] for schema in json.loads(mark.read_text())["facts"]["schemas"]}
    ref = work.land([work.shard(refs[0]), last])
    alone = Store(str(tmp_path / "alone"))
    whole = ingest(topic(), AcceptAll(), alone, MemoryLedger(), RUN)
    assert store.manifest(ref).facts["schemas"] == alone.manifest(whole).facts["schemas"]
    assert rows_of(store, ref, ACCEPTED) == rows_of(alone, whole, ACCEPTED)


def test_typed_files_are_cut_too(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for n in range(6):
        columns = {"n": pa.array(range(n * 10, n * 10 + 10), pa.int32()), "when": pa.array([n] * 10, pa.date32())}
        pq.write_table(pa.table(columns), folder / f"{n}.parquet")
    refs = []
    for shards in (1, 3):
        store = Store(str(tmp_path / f"store-{shards}"))
        ref = cut_ingest(FileReader(str(folder)), RuleValidator(unique="n"), store, MemoryLedger(), shards=shards)
        refs.append((store.manifest(ref).facts, rows_of(store, ref, ACCEPTED)))
        assert len(store.manifest(ref).table(ACCEPTED)) == shards
    assert refs[0] == refs[1]
    assert [row["n"] for row in refs[0][1]] == list(range(60))


def test_an_empty_plan_is_one_shard_and_lands_an_empty_batch(tmp_path: Path) -> None:
    store, ledger, topic = Store(str(tmp_path)), MemoryLedger(), MemorySource({0: []})
    assert len(plan_shards(topic, ledger, RUN, 4)) == 1
    ref = cut_ingest(topic, AcceptAll(), store, ledger)
    assert ref == ingest(topic, AcceptAll(), store, ledger, RUN)
    assert ref.counts == {"read": 0, "accepted": 0, "quarantined": 0}
    assert ledger.claim_of("p", RUN.run_key) is None


def test_what_a_zombie_of_the_plan_claims_late_is_landed(tmp_path: Path) -> None:
    store, ledger, topic = Store(str(tmp_path)), MemoryLedger(), MemorySource({0: []}, key="id")
    topic.add(0, payload(id=1, x=1.0))
    real = ledger.position

    def position(*asked: str) -> Any:  # the zombie claims between our two questions: what we take is what it has taken
        ledger.position = real  # type: ignore[method-assign]
        plan_shards(topic, ledger, RUN, 2)
        return real(*asked)

    ledger.position = position  # type: ignore[method-assign]
    assert cut_ingest(topic, AcceptAll(), store, ledger).counts["read"] == 1


@pytest.mark.parametrize("landed", [False, True])
def test_a_zombie_of_the_plan_claims_nothing_once_its_successor_has_found_nothing(tmp_path: Path, landed: bool) -> None:
    store, ledger, topic = Store(str(tmp_path)), MemoryLedger(), MemorySource({0: []}, key="id")
    zombie, successor, clear = (replace(RUN, attempt=f"try-{n}") for n in (1, 2, 3))
    nothing = plan_shards(topic, ledger, successor, 2)
    work = Ingest(topic, AcceptAll(), store, ledger, RUN)
    empty = work.land(nothing) if landed else None
    topic.add(0, payload(id=1, x=1.0))
    with pytest.raises(SpanConflictError, match="too late to claim any"):
        plan_shards(topic, ledger, zombie, 2)
    assert work.land(nothing) == (empty or work.land(nothing))
    assert ledger.claims() == [], "the rows wait for the next run"
    cleared = cut_ingest(topic, AcceptAll(), store, ledger, clear)
    assert cleared.counts["read"] == 1, "or for a clear of this one"


def test_nothing_is_not_landed_over_a_claim(tmp_path: Path) -> None:
    store, ledger, topic = Store(str(tmp_path)), MemoryLedger(), MemorySource({0: []}, key="id")
    nothing = plan_shards(topic, ledger, RUN, 2)
    topic.add(0, payload(id=1, x=1.0))
    plan_shards(topic, ledger, RUN, 2)  # a zombie of the task that planned
    with pytest.raises(SpanConflictError, match="Clear that task, and those after it"):
        Ingest(topic, AcceptAll(), store, ledger, RUN).land(nothing)
    assert not list(tmp_path.rglob("manifest.json"))
    assert cut_ingest(topic, AcceptAll(), store, ledger).counts["read"] == 1


def test_max_rejected_counts_the_whole_batch_and_a_changed_suite_needs_the_shards_again(tmp_path: Path) -> None:
    store, ledger, topic = Store(str(tmp_path)), MemoryLedger(), source()
    refs = plan_shards(topic, ledger, RUN, 4)
    strict = Ingest(topic, RULES["batch rules"], store, ledger, replace(RUN, max_rejected=4))
    parts = [strict.shard(ref) for ref in refs]
    with pytest.raises(BatchRejectedError, match=r"5 of 21 rows.*clear the shards' tasks and this one"):
        strict.land(parts)
    assert not list(tmp_path.rglob("manifest.json"))
    with pytest.raises(CorruptBatchError, match=r"shard 1 of 4 .* under other expectations.*Clear the shards' tasks"):
        Ingest(topic, AcceptAll(), store, ledger, RUN).land(parts)
    read = topic.rows_read
    mild = Ingest(topic, RULES["batch rules"], store, ledger, RUN)
    assert mild.land(parts).counts["quarantined"] == 5
    assert topic.rows_read == read, "what the shards have made is used as it is"


def test_a_shard_is_missing_doubled_or_of_another_batch(tmp_path: Path) -> None:
    store, ledger, topic = Store(str(tmp_path)), MemoryLedger(), source()
    work = Ingest(topic, AcceptAll(), store, ledger, RUN)
    parts = [work.shard(ref) for ref in plan_shards(topic, ledger, RUN, 3)]
    for wrong in (parts[:2], [*parts, parts[0]], [parts[0], parts[0], parts[2]], []):
        with pytest.raises(CorruptBatchError, match="make no whole batch"):
            work.land(wrong)
    with pytest.raises(CorruptBatchError, match="no shard of this release"):
        ShardRef.from_dict({**parts[0].to_dict(), "schema_version": 2})
    ledger.release("p", RUN.run_key)
    for asked in (lambda: work.shard(parts[0]), lambda: work.land(parts)):
        with pytest.raises(SpanConflictError, match="released meanwhile"):
            asked()


def test_a_file_that_was_changed_after_its_mark_is_found_and_its_shard_done_again(tmp_path: Path) -> None:
    store, ledger, topic = Store(str(tmp_path)), MemoryLedger(), source()
    work = Ingest(topic, RULES["batch rules"], store, ledger, RUN)
    parts = [work.shard(ref) for ref in plan_shards(topic, ledger, RUN, 3)]
    evidence = next(iter(sorted(tmp_path.rglob("0001-of-0003-*.evidence"))))
    evidence.write_bytes(b"rot")
    with pytest.raises(CorruptBatchError, match="0001-of-0003.*evidence.*other bytes.*Clear the task"):
        work.land(parts)
    read = topic.rows_read
    assert [work.shard(part) for part in parts] == parts
    assert 0 < topic.rows_read - read < 21, "that shard alone, and the first rows"
    assert work.land(parts).counts["read"] == 21


def test_another_number_of_shards_doubles_nothing(tmp_path: Path) -> None:
    store, ledger, topic = Store(str(tmp_path)), MemoryLedger(), source()
    work = Ingest(topic, RULES["batch rules"], store, ledger, RUN)
    old = plan_shards(topic, ledger, RUN, 5)
    stale = [work.shard(ref) for ref in old[:3]]
    ref = cut_ingest(topic, RULES["batch rules"], store, ledger, shards=2)
    assert ref.counts == {"read": 21, "accepted": 16, "quarantined": 5}
    # zombies of the older cut end now, or are cleared: they find the batch landed and touch nothing
    before = world(tmp_path)
    assert [work.shard(ref) for ref in old] == list(old)
    assert work.land(old) == ref
    assert cut_ingest(topic, RULES["batch rules"], store, ledger, shards=9) == ref
    assert work.land([*stale, *old[3:]]) == ref
    assert world(tmp_path) == before
    ids = [r["_row_id"] for t in (ACCEPTED, QUARANTINE) for r in rows_of(store, ref, t)]
    assert len(ids) == len(set(ids)) == 21


def test_the_same_span_landed_by_another_run_is_that_batch(tmp_path: Path) -> None:
    store, ledger, topic = Store(str(tmp_path)), MemoryLedger(), source()
    first = ingest(topic, AcceptAll(), store, ledger, RUN)
    ledger.position = lambda *_: {}  # type: ignore[method-assign]  # as a window does: it asks for the same rows
    again = replace(RUN, run_id="run-2", run_key="run-2/plan")
    assert cut_ingest(topic, AcceptAll(), store, ledger, again) == first


def test_a_zombie_that_ends_after_its_successor_has_landed_finds_that_batch(tmp_path: Path) -> None:
    store, ledger, topic = Store(str(tmp_path)), MemoryLedger(), source()
    work = Ingest(topic, RULES["batch rules"], store, ledger, RUN)
    parts = [work.shard(ref) for ref in plan_shards(topic, ledger, RUN, 2)]
    claim, find = ledger.claim_of("p", RUN.run_key), store.find
    landed = work.land(parts)
    ledger.claim_of = lambda *_: claim  # type: ignore[method-assign]  # what the zombie had seen before that
    seen: list[BatchRef | None] = [None]
    store.find = lambda *asked: seen.pop() if seen else find(*asked)  # type: ignore[method-assign]
    assert work.land(parts) == landed


def test_a_killed_shard_is_done_alone(tmp_path: Path) -> None:
    store, ledger, topic = Store(str(tmp_path)), MemoryLedger(), source()
    work = Ingest(topic, AcceptAll(), store, ledger, RUN)
    refs = plan_shards(topic, ledger, RUN, 3)
    parts = [work.shard(refs[0]), work.shard(refs[2])]
    topic.is_down = True
    with pytest.raises(SourceUnavailableError):
        work.shard(refs[1])
    assert [work.shard(refs[0]), work.shard(refs[2])] == parts, "those that are done need no source"
    topic.is_down, topic.rows_read = False, 0
    assert work.land([*parts, work.shard(refs[1])]).counts["read"] == 21
    assert topic.rows_read <= 7 + 3


@pytest.mark.parametrize(("rules", "before"), [("accept all", False), ("batch rules", True), ("batch rules", False)])
def test_a_crash_at_any_seam_of_any_task_loses_and_doubles_nothing(tmp_path: Path, rules: str, before: bool) -> None:
    expected_root = tmp_path / "expected"
    expected = cut_ingest(source(), RULES[rules], Store(str(expected_root)), MemoryLedger(), shards=2)
    at, seams = 0, Seams(0, before)
    while at == 0 or at <= seams.count:
        at += 1
        root, ledger, topic, seams = tmp_path / f"{at}", MemoryLedger(), source(), Seams(at, before)
        try:
            cut_ingest(seams.wrap(topic), RULES[rules], crashing_store(root, seams), seams.wrap(ledger), shards=2)
        except Crash:
            pass
        else:
            assert at > seams.count
        claimed = ledger.claim_of("p", RUN.run_key) is not None
        topic.add(0, payload(id=900, x=1.0))
        ref = cut_ingest(topic, RULES[rules], Store(str(root)), ledger, shards=2)
        if claimed:
            assert ref.digest == expected.digest
            assert world(root) == world(expected_root)
        after = cut_ingest(topic, RULES[rules], Store(str(root)), ledger, IngestRun("p", "run-2", "run-2/plan"))
        assert ref.counts["read"] + after.counts["read"] == 22
    assert at > 40, "the crash went through every seam"
