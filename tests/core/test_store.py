"""The store: whole batches or none, the same bytes for the same rows, corrupt bytes found."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest

from airflow_ai_provider.core.batch import BatchRef
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.errors import CorruptBatchError, RowMismatchError, SourceUnavailableError

ROWS = pa.table({"_row_id": ["a", "b", "c"], "n": [1, None, 3], "text": ["é", "", None]})
COUNTS = {"read": 4, "accepted": 3, "quarantined": 1}


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store") if request.param == "local" else f"memory://{tmp_path.name}")


def land(store: Store, rows: pa.Table = ROWS, batch_id: str = "orders-1") -> BatchRef:
    writer = store.open_batch("p", "batch", batch_id)
    writer.write("accepted", rows.slice(0, 2))
    writer.write("accepted", rows.slice(2))
    writer.write("quarantine", rows.slice(0, 1))
    return writer.land(COUNTS, {"key": "_row_id"})


def test_a_batch_comes_back_as_it_was(store: Store) -> None:
    ref = land(store)
    assert pa.concat_tables(store.read(ref.only("accepted"))).equals(ROWS)
    assert [t.num_rows for t in store.read(ref)] == [2, 1, 1]
    assert [t.num_rows for t in store.read(ref, "quarantine")] == [1]
    assert next(store.read(ref, columns=["n"])).column_names == ["n"]
    manifest = store.manifest(ref)
    assert manifest.counts == ref.counts == COUNTS
    assert [p.path for p in manifest.parts] == [
        "accepted/00000.parquet",
        "accepted/00001.parquet",
        "quarantine/00000.parquet",
    ]
    assert store.find("p", "batch", "orders-1") == ref
    assert store.find("p", "batch", "orders-2") is None


def test_the_same_rows_give_the_same_bytes_however_they_lie_in_memory(store: Store) -> None:
    first = land(store)
    chunked = pa.concat_tables([ROWS.slice(n, 1) for n in range(3)]).replace_schema_metadata({"pandas": "{}"})
    assert land(store, chunked) == first
    assert land(store, ROWS.slice(0, 3)) == first


def test_a_batch_without_its_manifest_is_not_there(store: Store) -> None:
    writer = store.open_batch("p", "batch", "half")
    writer.write("accepted", ROWS)
    assert store.find("p", "batch", "half") is None
    with pytest.raises(RowMismatchError):
        writer.land({"read": 9, "accepted": 3, "quarantined": 0}, {})
    assert store.find("p", "batch", "half") is None


def test_a_second_try_may_keep_whole_parts_of_the_first(store: Store) -> None:
    whole = land(store)
    first = store.open_batch("p", "batch", "orders-1")
    part = first.write("accepted", ROWS.slice(0, 2), 0)
    second = store.open_batch("p", "batch", "orders-1")
    second.write("quarantine", ROWS.slice(0, 1), 0)
    second.write("accepted", ROWS.slice(2), 1)
    second.keep(part)
    assert second.land(COUNTS, {"key": "_row_id"}) == whole


@pytest.mark.parametrize("harm", ["gone", "flipped", "shorter", "empty", "other batch's"])
def test_harm_to_a_part_is_found(tmp_path: Path, harm: str) -> None:
    store = Store(str(tmp_path))
    ref = land(store)
    _harm(
        tmp_path / "p/batch/orders-1/accepted/00000.parquet",
        harm,
        tmp_path / "p/batch/orders-1/quarantine/00000.parquet",
    )
    with pytest.raises(
        CorruptBatchError, match=r"accepted/00000.parquet of batch orders-1 .* [Cc]lear the task"
    ) as caught:
        list(store.read(ref))
    assert caught.value.path == "accepted/00000.parquet"
    assert [t.num_rows for t in store.read(ref, "quarantine")] == [1]


@pytest.mark.parametrize("harm", ["gone", "flipped", "shorter", "empty", "other batch's"])
def test_harm_to_a_manifest_is_found(tmp_path: Path, harm: str) -> None:
    store = Store(str(tmp_path))
    ref = land(store)
    land(store, ROWS.slice(0, 3).drop_columns("text"), "orders-2")
    _harm(tmp_path / "p/batch/orders-1/manifest.json", harm, tmp_path / "p/batch/orders-2/manifest.json")
    with pytest.raises(CorruptBatchError, match="manifest of batch orders-1"):
        store.manifest(ref)


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b'{"schema_version": 9}', b'{"schema_version": 1}', b"\xff\xfe"])
def test_a_manifest_that_cannot_be_read_is_corrupt_not_absent(tmp_path: Path, text: bytes) -> None:
    store = Store(str(tmp_path))
    land(store)
    (tmp_path / "p/batch/orders-1/manifest.json").write_bytes(text)
    with pytest.raises(CorruptBatchError):
        store.find("p", "batch", "orders-1")


def _harm(path: Path, harm: str, other: Path) -> None:
    data = path.read_bytes()
    if harm == "gone":
        path.unlink()
    else:
        flipped = data[:20] + bytes([data[20] ^ 1]) + data[21:]
        path.write_bytes(
            {"flipped": flipped, "shorter": data[:-1], "empty": b"", "other batch's": other.read_bytes()}[harm]
        )


def test_a_reference_into_another_store_is_refused(tmp_path: Path) -> None:
    ref = land(Store(str(tmp_path / "one")))
    with pytest.raises(CorruptBatchError, match="does not lie in the store at .* Use the same ai_store connection"):
        Store(str(tmp_path / "on")).manifest(ref)


def test_a_store_that_does_not_take_or_give_is_transient(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SourceUnavailableError, match="did not take p/batch/orders-1/accepted"):
        land(Store(str(tmp_path / "file")))
    folder = tmp_path / "store/p/batch/x/manifest.json"
    folder.mkdir(parents=True)
    with pytest.raises(SourceUnavailableError, match="did not give"):
        Store(str(tmp_path / "store")).find("p", "batch", "x")


def test_a_full_disk_leaves_the_old_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(str(tmp_path))
    ref = land(store)

    def full(path: str, value: bytes, **_: Any) -> None:
        Path(path).write_bytes(value[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store._fs, "pipe_file", full)
    with pytest.raises(SourceUnavailableError, match="has room"):
        land(store)
    monkeypatch.undo()
    assert pa.concat_tables(store.read(ref.only("accepted"))).equals(ROWS)


KILLED = textwrap.dedent(
    """
    import os, signal, sys
    import pyarrow as pa
    from airflow_ai_provider.core.store import Store

    store, step, count = Store(sys.argv[1]), int(sys.argv[2]), [0]

    def dying(name, work):
        def run(*args, **kwargs):
            if count[0] == step and name == "pipe_file":   # half a file, then the power goes
                work(args[0], args[1][: len(args[1]) // 2])
            if count[0] == step:
                os.kill(os.getpid(), signal.SIGKILL)
            count[0] += 1
            return work(*args, **kwargs)
        return run

    for name in ("makedirs", "pipe_file", "mv"):
        setattr(store._fs, name, dying(name, getattr(store._fs, name)))
    rows = pa.table({"_row_id": ["a", "b", "c"], "n": [1, None, 3], "text": ["é", "", None]})
    writer = store.open_batch("p", "batch", "orders-1")
    writer.write("accepted", rows.slice(0, 2)); writer.write("accepted", rows.slice(2))
    writer.write("quarantine", rows.slice(0, 1))
    writer.land({"read": 4, "accepted": 3, "quarantined": 1}, {"key": "_row_id"})
    print(count[0])
    """
)


def test_a_writer_killed_at_any_step_leaves_a_whole_batch_or_none(tmp_path: Path) -> None:
    """SIGKILL in a real process, half a file written: afterwards no batch, and writing again gives the same bytes."""

    def write(folder: Path, step: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", KILLED, str(folder), str(step)], capture_output=True, text=True, check=False
        )

    count = int(write(tmp_path / "whole", -1).stdout)
    whole = Store(str(tmp_path / "whole")).find("p", "batch", "orders-1")
    assert whole and count == 12
    for step in (0, 1, 2, 4, 5, 8, 10, 11):
        folder = tmp_path / str(step)
        assert write(folder, step).returncode == -9
        store = Store(str(folder))
        assert store.find("p", "batch", "orders-1") is None, step
        again = land(store)
        assert again.digest == whole.digest
        assert pa.concat_tables(store.read(again.only("accepted"))).equals(ROWS)


def test_two_writers_of_the_same_batch_do_not_harm_each_other(tmp_path: Path) -> None:
    """A zombie and its successor write the same parts at the same moment."""
    rows = pa.table({"_row_id": [str(n) for n in range(20_000)]})
    failures: list[BaseException] = []

    def write() -> None:
        try:
            for number in range(12):
                writer = Store(str(tmp_path)).open_batch("p", "batch", f"b-{number}")
                writer.write("accepted", rows)
                writer.land({"read": 20_000, "accepted": 20_000}, {})
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    store = Store(str(tmp_path))
    for number in range(12):
        ref = store.find("p", "batch", f"b-{number}")
        assert ref and next(store.read(ref)).num_rows == 20_000
    assert not list(tmp_path.rglob("*.aside"))


def test_options_of_the_file_system_are_written_nowhere(tmp_path: Path) -> None:
    store = Store(f"memory://{tmp_path.name}", {"key": "hunter2"})
    ref = land(store)
    memory = fsspec.filesystem("memory")
    stored = [memory.cat_file(path).decode("latin1") for path in memory.find("/")]
    assert not [t for t in (repr(store), str(ref), *stored) if "hunter2" in t]


def test_of_several_who_create_a_file_the_first_wins_and_all_are_told(store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        told = set(pool.map(lambda i: store.create_bytes("p/choice.json", b"%d" % i * 1000), range(40)))
    assert told == {store.read_bytes("p/choice.json")} and len(told.pop()) >= 1000
    assert store.create_bytes("p/choice.json", b"late") != b"late"
