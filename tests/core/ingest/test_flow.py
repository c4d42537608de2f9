"""The eight steps of ingest: what lands, what a retry does, and what every possible crash leaves behind."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from airflow_ai_provider.core.batch import ACCEPTED, QUARANTINE, BatchRef
from airflow_ai_provider.core.ingest.contract import AcceptAll
from airflow_ai_provider.core.ingest.flow import IngestRun, ingest
from airflow_ai_provider.core.ingest.limit import Limit
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.errors import (
    BatchRejectedError,
    CorruptBatchError,
    SourceError,
    SourceUnavailableError,
    SpanConflictError,
    SpecError,
)
from airflow_ai_provider.testing import MemoryLedger, MemorySource, RuleValidator
from tests.core.ingest.cutting import cut_ingest


def payload(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def source(**changes: Any) -> MemorySource:
    rows = {
        0: [payload(id=i, x=i / 2) for i in range(10)] + [b"{broken", None],
        1: [payload(id=100 + i, x=float(i)) for i in range(8)] + [payload(id=107, x=1.5)],
    }
    return MemorySource(rows, key="id", chunk=3, **changes)


def not_five(row: dict[str, Any]) -> str | None:
    return f"out_of_range: id={row['id']}" if row["id"] == 5 else None


RULES = {
    "accept all": AcceptAll(),
    "row rules": RuleValidator(not_five),
    "batch rules": RuleValidator(not_five, unique="id"),
}
RUN = IngestRun("p", "run-1", "run-1/ingest")


def rows_of(store: Store, ref: BatchRef, table: str) -> list[dict[str, Any]]:
    return [row for part in store.read(ref, table) for row in part.to_pylist()]


def world(root: Path) -> dict[str, bytes]:
    """Every stored file; what a killed writer left aside is no file of any batch."""
    files = (p for p in root.rglob("*") if p.is_file() and p.suffix != ".aside")
    return {str(p.relative_to(root)): p.read_bytes() for p in files}


def test_every_row_lands_once_in_one_of_the_two_tables(tmp_path: Path) -> None:
    store, ledger, topic = Store(str(tmp_path)), MemoryLedger(), source()
    ref = ingest(topic, RULES["batch rules"], store, ledger, RUN)
    assert ref.counts == {"read": 21, "accepted": 16, "quarantined": 5}
    accepted, rejected = rows_of(store, ref, ACCEPTED), rows_of(store, ref, QUARANTINE)
    assert [r["id"] for r in accepted] == [0, 1, 2, 3, 4, 6, 7, 8, 9, *range(100, 107)]
    assert accepted[0]["_row_id"] == "rows~memory-1/0/0"
    reason_of_broken = "broken_json: JSON is malformed: object keys must be strings (byte 1)"
    assert {r["_row_id"]: (r["_stage"], r["_reasons"], r["_payload"]) for r in rejected} == {
        "rows~memory-1/0/5": ("validate", ["out_of_range: id=5"], payload(id=5, x=2.5)),
        "rows~memory-1/0/10": ("decode", [reason_of_broken], b"{broken"),
        "rows~memory-1/0/11": ("decode", ["tombstone: the record has no payload"], None),
        "rows~memory-1/1/7": ("validate", ["not_unique: id occurs more than once"], payload(id=107, x=7.0)),
        "rows~memory-1/1/8": ("validate", ["not_unique: id occurs more than once"], payload(id=107, x=1.5)),
    }
    facts = store.manifest(ref).facts
    assert facts["reasons"] == {"broken_json": 1, "not_unique": 2, "out_of_range": 1, "tombstone": 1}
    assert (facts["key"], facts["columns"]) == ("id", {"id": "int64", "x": "float64"})
    assert topic.is_closed
    assert topic.committed == {"0": 12, "1": 9}


def test_a_landed_claim_gives_the_batch_back_without_touching_the_source(tmp_path: Path) -> None:
    store, ledger = Store(str(tmp_path)), MemoryLedger()
    first = ingest(source(), AcceptAll(), store, ledger, RUN)
    gone = source()
    gone.is_down = True
    assert ingest(gone, AcceptAll(), store, ledger, RUN) == first
    assert gone.rows_read == 0
    assert gone.is_closed


def test_the_next_run_takes_what_came_since(tmp_path: Path) -> None:
    store, ledger, topic = Store(str(tmp_path)), MemoryLedger(), source()
    ingest(topic, AcceptAll(), store, ledger, RUN)
    topic.add(1, payload(id=200, x=0.0))
    topic.add(7, payload(id=201, x=0.0))
    ref = ingest(topic, AcceptAll(), store, ledger, IngestRun("p", "run-2", "run-2/ingest"))
    assert [r["_row_id"] for r in rows_of(store, ref, ACCEPTED)] == ["rows~memory-1/1/9", "rows~memory-1/7/0"]


def test_row_limit_caps_each_run_until_all_is_taken_once(tmp_path: Path) -> None:
    store, ledger, topic = Store(str(tmp_path)), MemoryLedger(), source()
    seen: list[str] = []
    for number in range(4):
        run = IngestRun("p", f"r{number}", f"r{number}/ingest", limit=Limit(rows=8))
        ref = ingest(topic, AcceptAll(), store, ledger, run)
        assert ref.counts["read"] == (8, 8, 5, 0)[number]
        seen += [r["_row_id"] for t in (ACCEPTED, QUARANTINE) for r in rows_of(store, ref, t)]
    assert len(seen) == len(set(seen)) == 21


def test_an_empty_span_lands_an_empty_batch_and_claims_nothing(tmp_path: Path) -> None:
    store, ledger = Store(str(tmp_path)), MemoryLedger()
    topic = MemorySource({0: []})
    ref = ingest(topic, AcceptAll(), store, ledger, RUN)
    other = ingest(topic, AcceptAll(), store, ledger, IngestRun("p", "run-2", "run-2/ingest"))
    assert ref.counts == other.counts == {"read": 0, "accepted": 0, "quarantined": 0}
    assert store.manifest(ref).parts == store.manifest(other).parts == ()
    assert ledger.claim_of("p", RUN.run_key) is None
    topic.add(0, payload(id=1))
    assert ingest(topic, AcceptAll(), store, ledger, RUN).counts["read"] == 1


@pytest.mark.parametrize(
    ("limit", "passes"), [(5, True), (4, False), (0.25, True), (0.2, False), (None, True), (0, False)]
)
def test_max_rejected_is_a_share_or_a_count(tmp_path: Path, limit: float | int | None, passes: bool) -> None:
    store, ledger, topic = Store(str(tmp_path)), MemoryLedger(), source()
    run = IngestRun("p", "run-1", "run-1/ingest", max_rejected=limit)
    if passes:
        assert ingest(topic, RULES["batch rules"], store, ledger, run).counts["quarantined"] == 5
        return
    with pytest.raises(BatchRejectedError, match=r"5 of 21 rows.*Top reasons: .*not_unique 2.*quarantine") as caught:
        ingest(topic, RULES["batch rules"], store, ledger, run)
    assert caught.value.reasons == {"broken_json": 1, "not_unique": 2, "out_of_range": 1, "tombstone": 1}
    assert not list(tmp_path.rglob("manifest.json"))
    assert list(tmp_path.rglob("quarantine/*.parquet")), "the rejected rows are there to look at"
    claim = ledger.claim_of("p", run.run_key)
    assert claim is not None
    assert claim.state == "claimed"
    assert topic.committed == {}
    again = ingest(source(), AcceptAll(), store, ledger, run if limit else RUN)
    assert again.counts["read"] == 21, "mended rules take the same rows"


def test_a_whole_batch_rule_refuses_the_batch(tmp_path: Path) -> None:
    store, ledger = Store(str(tmp_path)), MemoryLedger()
    whole = RuleValidator(whole=lambda table: [f"row_count={table.num_rows}"])
    with pytest.raises(BatchRejectedError, match="row_count=19") as caught:
        ingest(source(), whole, store, ledger, RUN)
    assert caught.value.failures == ["row_count=19"]
    assert not list(tmp_path.rglob("manifest.json"))


NOON = datetime(2020, 1, 1, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    "changes",
    [
        {"max_rejected": True},
        {"max_rejected": -1},
        {"max_rejected": 1.5},
        {"window": (NOON.replace(tzinfo=None), NOON.replace(tzinfo=None))},
        {"window": (NOON, NOON.replace(hour=11))},
    ],
)
def test_what_a_run_cannot_ask_is_refused_on_creation(changes: dict[str, Any]) -> None:
    with pytest.raises(SpecError):
        IngestRun("p", "r", "k", **changes)


def test_a_topic_made_anew_and_rows_deleted_before_a_retry_are_errors(tmp_path: Path) -> None:
    store, ledger, topic = Store(str(tmp_path)), MemoryLedger(), source()
    with pytest.raises(BatchRejectedError):
        ingest(topic, RULES["row rules"], store, ledger, IngestRun("p", "run-1", RUN.run_key, max_rejected=0))
    topic.delete_before(1, 3)
    with pytest.raises(SourceError, match="rows/1 offsets 0 to 2"):
        ingest(topic, AcceptAll(), store, ledger, RUN)
    topic.make_anew("memory-2", {0: [payload(id=1)] * 30, 1: [payload(id=1)] * 30})
    with pytest.raises(SourceError, match="made anew"):
        ingest(topic, AcceptAll(), store, ledger, RUN)


def test_two_runs_cannot_take_the_same_rows(tmp_path: Path) -> None:
    store, ledger, topic = Store(str(tmp_path)), MemoryLedger(), source()
    span = topic.plan({}, {}, None, 4)
    ledger.claim("p", "other/ingest", span, "other")
    ledger_without_memory = MemoryLedger()
    ledger_without_memory.claim("p", "other/ingest", span, "other")
    ledger_without_memory.position = lambda *_: {}  # type: ignore[method-assign]  # planned before the other claimed
    with pytest.raises(SpanConflictError, match="other"):
        ingest(topic, AcceptAll(), store, ledger_without_memory, RUN)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("lost", ["manifest.json", "*.judged.parquet", "quarantine/*", "accepted/*"])
def test_a_batch_whose_files_were_lost_is_read_into_the_same_bytes(tmp_path: Path, lost: str, shards: int) -> None:
    def land() -> BatchRef:
        return cut_ingest(source(), RULES["batch rules"], store, ledger, RUN, shards=shards)

    store, ledger = Store(str(tmp_path)), MemoryLedger()
    first = land()
    before = world(tmp_path)
    gone, *others = sorted(tmp_path.rglob(lost))
    gone.unlink()
    for path in others[:1]:
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptBatchError, match="(?i)clear the task that wrote it"):
        list(store.read(first))
    assert land() == first
    assert world(tmp_path) == before
    assert store.is_whole(first)


def test_how_the_source_chunks_its_rows_changes_no_byte(tmp_path: Path) -> None:
    worlds = []
    for chunk in (1, 4, 1000):
        root = tmp_path / str(chunk)
        topic = source()
        topic._chunk = chunk
        ingest(topic, RULES["batch rules"], Store(str(root)), MemoryLedger(), RUN)
        worlds.append(world(root))
    assert worlds[0] == worlds[1] == worlds[2]


def test_progress_speaks_at_the_end_and_logs_by_default(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines: list[str] = []
    ingest(source(), RULES["row rules"], Store(str(tmp_path)), MemoryLedger(), RUN, progress=lines.append)
    assert "read 21 rows" in lines[-2]
    assert "21 read, 18 accepted, 3 quarantined" in lines[-1]
    with caplog.at_level(logging.INFO):
        ingest(MemorySource({0: [b"{}"]}), AcceptAll(), Store(str(tmp_path / "b")), MemoryLedger(), RUN)
    assert "read 1 rows" in caplog.text
    assert gc.isenabled()


class Crash(BaseException):
    """The process dies here: nothing but a test catches it."""


class Seams:
    """Wrap objects so that the n-th call on any of them dies, before or after it did its work."""

    def __init__(self, at: int, before: bool) -> None:
        self.at, self.before, self.count = at, before, 0

    def wrap(self, inner: Any) -> Any:
        return _Wrapped(inner, self)

    def call(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        dies = self.count == self.at
        if dies and self.before:
            raise Crash
        try:
            return method(*args, **kwargs)
        finally:
            if dies:
                raise Crash


class _Wrapped:
    def __init__(self, inner: Any, seams: Seams) -> None:
        self._inner, self._seams = inner, seams

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if not callable(value) or name in ("close",):
            return value
        if name == "read":
            return lambda *args: self._each(value(*args))
        return lambda *args, **kwargs: self._seams.call(value, *args, **kwargs)

    def _each(self, tables: Iterator[Any]) -> Iterator[Any]:
        for table in tables:
            yield self._seams.call(lambda found=table: found)


def crashing_store(root: Path, seams: Seams) -> Store:
    """A store whose file system dies: between writing aside and moving too."""
    store = Store(str(root))
    store._fs = seams.wrap(store._fs)
    return store


@pytest.mark.parametrize("rules", sorted(RULES))
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_a_crash_at_any_seam_loses_and_doubles_nothing(tmp_path: Path, rules: str, before: bool) -> None:
    expected_root = tmp_path / "expected"
    clean = MemoryLedger()
    expected = ingest(source(), RULES[rules], Store(str(expected_root)), clean, RUN)
    at, seams = 0, Seams(0, before)
    while at == 0 or at <= seams.count:  # until the run has no such call any more
        at += 1
        root, ledger, topic, seams = tmp_path / f"{at}", MemoryLedger(), source(), Seams(at, before)
        try:
            ingest(seams.wrap(topic), RULES[rules], crashing_store(root, seams), seams.wrap(ledger), RUN)
        except Crash:
            assert topic.is_closed
        else:
            assert at > seams.count
        # rows that come meanwhile belong to the next run, not to the retry
        topic.add(0, payload(id=900, x=1.0))
        ref = ingest(topic, RULES[rules], Store(str(root)), ledger, RUN)
        claim = ledger.claim_of("p", RUN.run_key)
        assert claim is not None
        if len(claim.span.slices) == 2 and claim.span.slices[0].end == 12:
            assert ref.digest == expected.digest
            assert world(root) == world(expected_root)
        else:  # it died before it claimed: the retry planned anew, with the newer row
            assert ref.counts["read"] == 22
        after = ingest(topic, RULES[rules], Store(str(root)), ledger, IngestRun("p", "run-2", "run-2/ingest"))
        assert ref.counts["read"] + after.counts["read"] == 22
    assert at > 15, "the crash went through every seam"


def test_a_source_that_goes_down_in_mid_read_is_read_again(tmp_path: Path) -> None:
    store, ledger, topic = Store(str(tmp_path)), MemoryLedger(), source()
    read = topic.read

    def failing(span: Any) -> Iterator[Any]:
        for number, table in enumerate(read(span)):
            if number == 2:
                raise SourceUnavailableError("gone")
            yield table

    topic.read = failing  # type: ignore[method-assign]
    with pytest.raises(SourceUnavailableError):
        ingest(topic, AcceptAll(), store, ledger, RUN)
    assert not list(tmp_path.rglob("manifest.json"))
    topic.read = read  # type: ignore[method-assign]
    assert ingest(topic, AcceptAll(), store, ledger, RUN).counts["read"] == 21
