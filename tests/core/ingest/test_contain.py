"""A payload that ends the process: the try dies, the next one quarantines it and lands the rest."""

from __future__ import annotations

import faulthandler
import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from airflow_ai_provider.core.batch import ACCEPTED, QUARANTINE, BatchRef
from airflow_ai_provider.core.ingest import taster
from airflow_ai_provider.core.ingest.contain import MARKER, Taster
from airflow_ai_provider.core.ingest.contract import AcceptAll, Source
from airflow_ai_provider.core.ingest.encoded.source import EncodedSource
from airflow_ai_provider.core.ingest.flow import IngestRun, ingest
from airflow_ai_provider.core.ledger_sql import open_ledger
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.errors import SourceUnavailableError
from airflow_ai_provider.testing import MemorySource
from tests.core.ingest.crashing import ArrowJsonDecoder, CrashingDecoder

RUN = IngestRun("p", "r", "k")


def take(source: Source, folder: Path) -> BatchRef:
    return ingest(source, AcceptAll(), Store(str(folder)), open_ledger(f"sqlite:///{folder}/ledger.db"), RUN)


def end_of(work: Callable[[], object]) -> int:
    """Do it in a fork; its exit code, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        faulthandler.disable()  # pytest's would print three hundred lines for a crash that is meant
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def rows(folder: Path, ref: BatchRef, table: str) -> list[dict[str, object]]:
    return [row for part in Store(str(folder)).read(ref, table) for row in part.to_pylist()]


def markers(folder: Path) -> list[Path]:
    return list(folder.rglob(MARKER))


def encoded(payloads: list[bytes | None], decoder: Callable[[], CrashingDecoder] = CrashingDecoder) -> EncodedSource:
    return EncodedSource(MemorySource({0: payloads, 1: [b"other"]}), decoder)


def test_a_payload_that_ends_the_process_ends_one_try(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    payloads = [b"good %d" % n for n in range(500)]
    payloads[7], payloads[8], payloads[400] = b"segv here", b"abort there", b"segv again"
    died = end_of(lambda: take(encoded(payloads), tmp_path))
    assert died == -signal.SIGSEGV
    assert len(markers(tmp_path)) == 1
    ref = take(encoded(payloads), tmp_path)
    assert "an earlier try of p/batch/" in caplog.text
    assert ref.counts == {"read": 501, "accepted": 498, "quarantined": 3}
    rejected = rows(tmp_path, ref, QUARANTINE)
    assert [(row["_offset"], row["_payload"]) for row in rejected] == [
        (7, b"segv here"),
        (8, b"abort there"),
        (400, b"segv again"),
    ]
    assert [str(row["_reasons"][0]).rpartition("; ")[2] for row in rejected] == [  # type: ignore[index]
        "it was ended by SIGSEGV",
        "it was ended by SIGABRT",
        "it was ended by SIGSEGV",
    ]
    assert Store(str(tmp_path)).manifest(ref).facts["reasons"] == {"decoder_crashed": 3}
    kept = [row["text"] for row in rows(tmp_path, ref, ACCEPTED)]
    assert kept == [*(f"good {n}" for n in range(500) if n not in (7, 8, 400)), "other"]
    assert markers(tmp_path) == []


def test_a_parser_that_crashes_in_earnest_is_contained(tmp_path: Path) -> None:
    payloads: list[bytes | None] = [b"null", b'{"a": 1}', None, b'{"a": 2}']
    assert end_of(lambda: take(encoded(payloads, ArrowJsonDecoder), tmp_path)) < 0
    ref = take(encoded([*payloads[:4]], ArrowJsonDecoder), tmp_path)
    told = {str(row["_payload"]): str(row["_reasons"][0]) for row in rows(tmp_path, ref, QUARANTINE)}  # type: ignore[index]
    assert told["b'null'"].startswith("decoder_crashed:")
    assert told["None"].startswith("tombstone:")


def test_a_try_that_was_killed_for_another_reason_gives_the_same_bytes(tmp_path: Path) -> None:
    """JSON: nothing is deadly, the batch is that of an undisturbed try."""

    class Killed(MemorySource):
        def read(self, span):  # type: ignore[no-untyped-def]
            yield from super().read(span)
            os.kill(os.getpid(), signal.SIGKILL)

    payloads: list[bytes | None] = [b'{"a": %d}' % n for n in range(100)] + [b"null", None, b'{"a": "x"}', b"{"]
    still, killed = tmp_path / "still", tmp_path / "killed"
    for folder in (still, killed):
        folder.mkdir()
    assert end_of(lambda: take(Killed({0: payloads}), killed)) == -signal.SIGKILL
    assert len(markers(killed)) == 1
    first, second = take(MemorySource({0: payloads}), still), take(MemorySource({0: payloads}), killed)
    assert first.digest == second.digest
    assert first.counts["quarantined"] == 3
    assert markers(tmp_path) == []


def test_an_error_that_can_be_told_leaves_no_marker(tmp_path: Path) -> None:
    source = MemorySource({0: [b"{}"]})
    take(source, tmp_path)
    source.add(0, b"{}")
    other = IngestRun("p", "r2", "k2")
    ledger = open_ledger(f"sqlite:///{tmp_path}/ledger.db")
    span = source.plan(ledger.position("p", source.name, source.identity()), {}, None, None)
    ledger.claim("p", "k2", span, "r2")
    source.is_down = True
    with pytest.raises(SourceUnavailableError):
        ingest(source, AcceptAll(), Store(str(tmp_path)), ledger, other)
    assert markers(tmp_path) == []


def test_a_payload_that_never_ends_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taster, "DEADLINE_S", 0.3)
    payloads = pa.array([b"good", b"hang", b"raise", b"good"], pa.binary())
    decoder = CrashingDecoder()
    found = taster.find_deadly(lambda some: decoder.decode(pa.chunked_array([some])), payloads)
    assert found == {1: "it was not through after 0 s"}


def test_a_taster_that_cannot_go_on_says_so() -> None:
    block = pa.table({"_payload": pa.array([b"{}"], pa.binary())})
    with Taster(print) as taster_process:
        assert taster_process.mark(block)["_fault"].to_pylist() == [None]
        taster_process._process.kill()
        with pytest.raises(SourceUnavailableError, match="exit code -9"):
            taster_process.mark(block)
