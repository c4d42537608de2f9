"""A disk that is full, in earnest: the kernel refuses to make a file longer (EFBIG), in the store and in the ledger.

Where this process may mount one, on a disk of a megabyte, too, with no room left on it (ENOSPC).
"""

from __future__ import annotations

import errno
import json
import random
import resource
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from airflow_ai_provider.core.batch import BatchRef
from airflow_ai_provider.core.ingest.contract import AcceptAll
from airflow_ai_provider.core.ingest.data_docs import PAGE, write_data_docs
from airflow_ai_provider.core.ingest.flow import IngestRun, ingest
from airflow_ai_provider.core.ingest.suite import load_suite
from airflow_ai_provider.core.ledger import Ledger
from airflow_ai_provider.core.ledger_sql import open_ledger
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.errors import LedgerUnavailableError, SourceUnavailableError
from airflow_ai_provider.testing import MemoryLedger, MemorySource, RuleValidator

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


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A disk of a megabyte, mounted there."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], check=True, capture_output=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def may_mount() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        try:
            with small_disk(Path(folder)):
                return True
        except (OSError, subprocess.CalledProcessError):
            return False


def fill(disk: Path, free: int) -> Path:
    """Leave so many bytes."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            assert error.errno == errno.ENOSPC
        file.truncate(file.tell() - free)
    return ballast


if may_mount():  # elsewhere the tests above, with the kernel's other way to refuse, are what there is
    RULES = RuleValidator(lambda row: "out_of_range: odd" if row["n"] % 2 else None, {"n": "int64"})

    def take_on(disk: Path, ledger: Ledger) -> BatchRef:
        return ingest(MemorySource({0: ROWS}), RULES, Store(str(disk / "store")), ledger, RUN)

    @pytest.mark.parametrize("share", [0, 0.15, 0.3, 0.45, 0.6])
    def test_no_room_for_parts_or_quarantine_or_manifest_lands_nothing(tmp_path: Path, share: float) -> None:
        ledger, whole = MemoryLedger(), take_on(tmp_path / "large", MemoryLedger())
        needed = sum(path.stat().st_size for path in files(tmp_path / "large"))
        with small_disk(tmp_path / "disk") as disk:
            for _ in range(2):
                ballast = fill(disk, int(needed * share))
                with pytest.raises(
                    SourceUnavailableError, match="No space left on device.*has room; the retry does it"
                ):
                    take_on(disk, ledger)
                assert not list(disk.rglob("manifest.json"))
                assert not [path for path in disk.rglob("*.aside") if path.stat().st_size]
                held = ledger.claim_of("p", "k")
                assert held is not None
                assert held.state == "claimed"
                ballast.unlink()
            ref = take_on(disk, ledger)
            assert ref.digest == whole.digest
            assert ref.counts == {"read": len(ROWS), "accepted": len(ROWS) // 2, "quarantined": len(ROWS) // 2}

    def test_no_room_for_data_docs_leaves_the_batch_whole(tmp_path: Path) -> None:
        suite = load_suite({"name": "s", "expectations": []})
        with small_disk(tmp_path / "disk") as disk:
            ref, store = take_on(disk, MemoryLedger()), Store(str(disk / "store"))
            ballast = fill(disk, 0)
            with pytest.raises(SourceUnavailableError, match=f"did not take .*{PAGE}.*No space left"):
                write_data_docs(store, ref, suite)
            assert sum(part.num_rows for part in store.read(ref)) == len(ROWS)
            assert not list(disk.rglob(PAGE))
            ballast.unlink()
            assert Path(write_data_docs(store, ref, suite)).stat().st_size > 1000

    def test_no_room_for_the_ledger_claims_nothing(tmp_path: Path) -> None:
        with small_disk(tmp_path / "disk") as disk:
            ledger = open_ledger(f"sqlite:///{disk}/ledger.db")
            ballast = fill(disk, 0)
            with pytest.raises(LedgerUnavailableError, match="full"):
                take_on(tmp_path / "large", ledger)
            assert not list((tmp_path / "large").rglob("*.parquet"))
            ballast.unlink()
            assert ledger.claim_of("p", "k") is None
            assert take_on(tmp_path / "large", ledger).counts["accepted"] == len(ROWS) // 2
