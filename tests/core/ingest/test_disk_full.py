"""A disk that is full, in earnest: the kernel refuses to make a file longer (EFBIG), in the store and in the ledger."""

from __future__ import annotations

import json
import random
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from airflow_ai_provider.core.batch import BatchRef
from airflow_ai_provider.core.ingest.contract import AcceptAll
from airflow_ai_provider.core.ingest.flow import IngestRun, ingest
from airflow_ai_provider.core.ledger import Ledger
from airflow_ai_provider.core.ledger_sql import open_ledger
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.errors import LedgerUnavailableError, SourceUnavailableError
from airflow_ai_provider.testing import MemoryLedger, MemorySource

RUN = IngestRun("p", "r", "k")
_CHANCE = random.Random(1)
ROWS: list[bytes | None] = [json.dumps({"n": n, "text": _CHANCE.randbytes(40).hex()}).encode() for n in range(2000)]


@contextmanager
def full_disk(longest_file: int = 0) -> Iterator[None]:
    """No file of this process may become longer than that."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (longest_file, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def take(folder: Path, ledger: Ledger) -> BatchRef:
    return ingest(MemorySource({0: ROWS}), AcceptAll(), Store(str(folder)), ledger, RUN)


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size]


def test_a_full_store_lands_nothing_leaves_nothing_and_passes_when_there_is_room(tmp_path: Path) -> None:
    ledger, folder = MemoryLedger(), tmp_path / "store"
    for _ in range(3):
        with (
            full_disk(20_000),
            pytest.raises(SourceUnavailableError, match="has room; the retry does it again") as told,
        ):
            take(folder, ledger)
        assert "File too large" in str(told.value)
        assert str(folder) in str(told.value)
        assert files(folder) == [], "each try on a full disk would leave another piece there"
        held = ledger.claim_of("p", "k")
        assert held is not None
        assert held.state == "claimed"
    ref = take(folder, ledger)
    assert ref.counts["accepted"] == len(ROWS)
    assert ref.digest == take(tmp_path / "still", MemoryLedger()).digest


def test_a_full_ledger_says_so_and_the_retry_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, folder = f"sqlite:///{tmp_path}/ledger.db", tmp_path / "store"
    with full_disk(), pytest.raises(LedgerUnavailableError, match="ledger.db did not answer: .*(full|disk)"):
        take(folder, open_ledger(url))
    ledger = open_ledger(url)
    with full_disk(), pytest.raises(LedgerUnavailableError, match="ledger.db did not answer: .*(full|disk)"):
        take(folder, ledger)
    assert ledger.claim_of("p", "k") is None
    assert files(folder) == []
    landed = ledger.landed

    def land_on_a_full_disk(*args: Any) -> None:
        with full_disk():
            landed(*args)

    monkeypatch.setattr(ledger, "landed", land_on_a_full_disk)
    with pytest.raises(LedgerUnavailableError):
        take(folder, ledger)
    monkeypatch.undo()
    held = ledger.claim_of("p", "k")
    assert held is not None
    assert held.state == "claimed", "the batch is there, and the ledger does not know it yet"
    before = {path: path.stat().st_mtime_ns for path in files(folder)}
    ref = take(folder, ledger)
    held = ledger.claim_of("p", "k")
    assert held is not None
    assert (held.state, held.ref) == ("landed", ref)
    after = {path: path.stat().st_mtime_ns for path in files(folder)}
    assert after.items() <= before.items(), "nothing is written twice"
