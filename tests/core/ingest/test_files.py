"""Files: each format's rows, what is at fault in them, and files that were taken or have changed."""

from __future__ import annotations

import bz2
import gzip
import os
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from airflow_ai_provider.core.batch import ACCEPTED, QUARANTINE
from airflow_ai_provider.core.ingest.contract import AcceptAll
from airflow_ai_provider.core.ingest.files import FileReader
from airflow_ai_provider.core.ingest.flow import IngestRun, ingest
from airflow_ai_provider.core.ingest.limit import Limits
from airflow_ai_provider.core.ingest.source import FileSource, open_source
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.errors import SourceError, SourceUnavailableError, SpecError
from airflow_ai_provider.testing import MemoryLedger, RuleValidator

PNG = b"\x89PNG\r\n\x1a\n" + b"0" * 20


def land(reader: FileReader, root: Path, **schema: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    store = Store(str(root / "store"))
    rules = RuleValidator(schema=schema) if schema else AcceptAll()
    ref = ingest(reader, rules, store, MemoryLedger(), IngestRun("p", "r", "k"))
    accepted, rejected = ([r for t in store.read(ref, name) for r in t.to_pylist()] for name in (ACCEPTED, QUARANTINE))
    assert ref.counts["read"] == len(accepted) + len(rejected)
    return accepted, rejected


def write(folder: Path, **files: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name.replace("_dot_", ".")).write_bytes(data)
    return folder


def test_json_lines(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "in", b_dot_jsonl=b'{"a":3}', a_dot_jsonl=b'{"a":1}\r\n\n{"a":2\n\xff\n{"a":"\\u2028"}\n{"a":4}\n'
    )
    accepted, rejected = land(FileReader(str(folder)), tmp_path, a="int64")
    assert [(r["_file"], r["_row"], r["a"]) for r in accepted] == [
        ("a.jsonl", 0, 1),
        ("a.jsonl", 5, 4),
        ("b.jsonl", 0, 3),
    ]
    assert [r["_payload"] for r in rejected] == [b'{"a":2', b"\xff", b'{"a":"\\u2028"}']
    ids = [r["_row_id"] for r in accepted + rejected]
    assert len(set(ids)) == 6
    assert accepted[0]["_row_id"].startswith("a.jsonl~")
    assert accepted[0]["_row_id"].endswith("/0")


def test_csv(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "in",
        a_dot_csv=b'\xef\xbb\xbfid,name,x\r\n1,"two\nlines, one cell",1.5\r\n\r\n2,,2\n3,x\n"4"4,x,1\n5,\xff,1\n'
        b'x,y,1\n6,"open,1\n7,z,1\n',
    )
    accepted, rejected = land(FileReader(str(folder / "a.csv"), key="id"), tmp_path, id="int64")
    assert [(r["_row"], r["id"], r["name"], r["x"]) for r in accepted] == [
        (0, 1, "two\nlines, one cell", 1.5),
        (2, 2, None, 2.0),
    ]
    told = {r["_row"]: (r["_reasons"][0].partition(":")[0], r["_payload"]) for r in rejected}
    assert told == {
        3: ("broken_csv", b"3,x"),
        4: ("broken_csv", b'"4"4,x,1'),
        5: ("broken_csv", b"5,\xff,1"),
        6: ("wrong_type", b'{"id":"x","name":"y","x":"1"}'),
        7: ("broken_csv", b'6,"open,1\n7,z,1'),
    }


@pytest.mark.parametrize("header", [b"a,a\n1,2\n", b"a,\n1,2\n", b"\xff\n1\n", b'"a\n'])
def test_a_header_that_is_none_is_an_error(tmp_path: Path, header: bytes) -> None:
    folder = write(tmp_path / "in", a_dot_csv=header)
    with pytest.raises(SourceError, match=r"a\.csv: its first line cannot be the header"):
        land(FileReader(str(folder)), tmp_path)


def test_parquet(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    table = pa.table(
        {"a": pa.array([1, None], pa.int32()), "s": pa.array(["x", "y"]).dictionary_encode(), "_row_id": ["p", "q"]}
    )
    pq.write_table(table, folder / "a.parquet")
    (folder / "b.parquet").write_bytes(b"PAR1 is not all it takes PAR1")
    pq.write_table(pa.table({"a": ["no", None], "more": [1, 2]}), folder / "c.parquet")
    accepted, rejected = land(FileReader(str(folder)), tmp_path)
    assert [(r["_file"], r["a"], r["s"], r["_extra"]) for r in accepted] == [
        ("a.parquet", 1, "x", '{"_row_id":"p"}'),
        ("a.parquet", None, "y", '{"_row_id":"q"}'),
        ("c.parquet", None, None, '{"more":2}'),
    ]
    assert [(r["_file"], r["_reasons"][0].partition(":")[0]) for r in rejected] == [
        ("b.parquet", "broken_parquet"),
        ("c.parquet", "wrong_type"),
    ]
    assert rejected[1]["_payload"] == b'{"a":"no","more":1}'


def test_a_corrupt_row_group_is_one_row_at_fault(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    pq.write_table(pa.table({"a": list(range(1000))}), folder / "a.parquet", row_group_size=500, compression="zstd")
    data = bytearray((folder / "a.parquet").read_bytes())
    data[20:200] = b"\xff" * 180
    (folder / "a.parquet").write_bytes(data)
    accepted, rejected = land(FileReader(str(folder)), tmp_path)
    assert [r["_row"] for r in accepted] == list(range(500, 1000))
    assert [r["a"] for r in accepted] == list(range(500, 1000))
    assert "row group 0, 500 rows" in rejected[0]["_reasons"][0]


def test_images(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "in", a_dot_png=PNG, b_dot_jpg=b"\xff\xd8\xff" + b"1" * 9, c_dot_png=b"not an image", d_dot_webp=b""
    )
    accepted, rejected = land(FileReader(str(folder)), tmp_path)
    assert [(r["path"], r["bytes"], r["size"], r["format"]) for r in accepted] == [
        ("a.png", PNG, 28, "png"),
        ("b.jpg", b"\xff\xd8\xff111111111", 12, "jpeg"),
    ]
    assert [(r["_payload"], r["_reasons"][0].partition(":")[0]) for r in rejected] == [
        (b"not an image", "broken_image"),
        (b"", "broken_image"),
    ]
    rules = RuleValidator(lambda row: "out_of_range: size" if row["size"] > 20 else None)
    store = Store(str(tmp_path / "other"))
    ref = ingest(FileReader(str(folder)), rules, store, MemoryLedger(), IngestRun("p", "r", "k"))
    assert store.manifest(ref).facts["reasons"] == {"broken_image": 2, "out_of_range": 1}
    payloads = [p for t in store.read(ref, QUARANTINE) for p in t["_payload"].to_pylist()]
    assert PNG in payloads, "a rejected image keeps its bytes"


def test_a_file_is_taken_once_and_other_bytes_under_its_path_are_an_error(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", a_dot_jsonl=b'{"a":1}\n')
    store, ledger = Store(str(tmp_path / "store")), MemoryLedger()
    pattern = str(folder / "*.jsonl")
    assert ingest(FileReader(pattern), AcceptAll(), store, ledger, IngestRun("p", "1", "1")).counts["read"] == 1
    assert ingest(FileReader(pattern), AcceptAll(), store, ledger, IngestRun("p", "2", "2")).counts["read"] == 0
    write(folder, b_dot_jsonl=b'{"a":2}\n{"a":3}')
    assert ingest(FileReader(pattern), AcceptAll(), store, ledger, IngestRun("p", "3", "3")).counts["read"] == 2
    write(folder, a_dot_jsonl=b'{"a":9}\n')
    with pytest.raises(SourceError, match=r"a\.jsonl .* was taken before with other bytes") as caught:
        ingest(FileReader(pattern), AcceptAll(), store, ledger, IngestRun("p", "4", "4"))
    assert caught.value.taken != caught.value.found


def aged(path: str, **options: Any) -> FileReader:
    """A reader whose clock is an hour ahead: what the test has just written has settled."""
    return FileReader(path, now_ns=lambda: time.time_ns() + 3600 * 10**9, **options)


def count_reads(reader: FileReader) -> list[str]:
    opened: list[str] = []
    inner = reader._open

    def spy(path: str) -> Any:
        opened.append(path)
        return inner(path)

    reader._open = spy  # type: ignore[method-assign]
    return opened


def test_of_a_thousand_files_only_the_new_one_is_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", **{f"{n:04d}_dot_jsonl": b'{"a":%d}\n' % n for n in range(999)})
    store, ledger = Store(str(tmp_path / "store")), MemoryLedger()

    def take(run: str, **options: Any) -> tuple[int, list[str]]:
        reader = aged(str(folder), **options)
        reads = count_reads(reader)
        return ingest(reader, AcceptAll(), store, ledger, IngestRun("p", run, run)).counts["read"], reads

    assert take("1")[0] == 999
    assert take("2") == (0, [])
    write(folder, new_dot_jsonl=b'{"a":1}\n')
    assert take("3") == (1, ["new.jsonl", "new.jsonl"]), "once for its digest, once for its rows"
    os.utime(folder / "0007.jsonl")
    assert take("4") == (0, ["0007.jsonl"]), "the same bytes at another time"
    assert take("5") == (0, [])
    assert len(take("6", verify="always")[1]) == 1000
    was = (folder / "0008.jsonl").stat()
    write(folder, **{"0008_dot_jsonl": b'{"a":9}\n'})
    os.utime(folder / "0008.jsonl", ns=(was.st_atime_ns, was.st_mtime_ns))
    with pytest.raises(SourceError, match=r"0008\.jsonl .* was taken before with other bytes"):
        take("7")
    with pytest.raises(SourceError, match=r"0008\.jsonl .* was taken before with other bytes"):
        take("8")


def test_a_file_that_waits_for_its_turn_is_not_read_at_each_run(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", **{f"{n}_dot_jsonl": b"{}\n" * 10 for n in range(9)})
    ledger, store, reads = MemoryLedger(), Store(str(tmp_path / "store")), 0
    for run in range(9):
        reader = aged(str(folder))
        opened = count_reads(reader)
        asked = IngestRun("p", str(run), str(run), limit=Limits(bytes=30).read(datetime.now(UTC)))
        assert ingest(reader, AcceptAll(), store, ledger, asked).counts["read"] == 10
        reads += len(opened)
    assert reads == 18


def test_a_file_that_has_only_just_changed_is_read_again(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", a_dot_jsonl=b"{}\n")
    ledger, store = MemoryLedger(), Store(str(tmp_path / "store"))
    for run in range(2):
        reader = FileReader(str(folder))
        opened = count_reads(reader)
        ingest(reader, AcceptAll(), store, ledger, IngestRun("p", str(run), str(run)))
        assert opened, "it may have changed twice within one tick of the disk's clock"


def test_row_limit_takes_whole_files_and_at_least_one(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", a_dot_jsonl=b"{}\n" * 5, b_dot_jsonl=b"{}\n" * 2, c_dot_jsonl=b"{}")
    for limit, files in (
        (1, ["a.jsonl"]),
        (6, ["a.jsonl"]),
        (7, ["a.jsonl", "b.jsonl"]),
        (8, ["a.jsonl", "b.jsonl", "c.jsonl"]),
    ):
        span = FileReader(str(folder)).plan({}, {}, None, limit)
        assert [s.partition for s in span.slices] == files
    assert span.facts == {"rows": 8}


@pytest.mark.parametrize("change", ["changed", "gone"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "a.png"])
def test_a_file_that_changed_since_it_was_planned_lands_nothing(tmp_path: Path, name: str, change: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    if name.endswith("parquet"):
        pq.write_table(pa.table({"a": [1]}), folder / name)
    else:
        (folder / name).write_bytes(PNG if name.endswith("png") else b'"a"\n1\n')
    reader = FileReader(str(folder))
    span = reader.plan({}, {}, None, None)
    if change == "gone":
        (folder / name).unlink()
    elif name.endswith("parquet"):
        pq.write_table(pa.table({"a": [2]}), folder / name)
    else:
        (folder / name).write_bytes((folder / name).read_bytes() + b"1\n")
    with pytest.raises(SourceError, match="any more" if change == "gone" else "has changed since it was planned"):
        list(reader.read(span))


def test_where_files_are_looked_for(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", a_dot_jsonl=b"{}", _SUCCESS=b"", _dot_hidden_dot_jsonl=b"{}")
    (folder / "deep").mkdir()
    (folder / "deep" / "b.jsonl").write_bytes(b"{}")
    paths = {
        str(folder): ["a.jsonl", "deep/b.jsonl"],
        str(folder / "*.jsonl"): ["a.jsonl"],
        str(folder / "a.jsonl"): ["a.jsonl"],
        f"file://{folder}": ["a.jsonl", "deep/b.jsonl"],
        f"file://{tmp_path}/*/deep/*.jsonl": ["in/deep/b.jsonl"],
    }
    for path, files in paths.items():
        reader = FileReader(path)
        span = reader.plan({}, {}, None, None)
        assert [s.partition for s in span.slices] == files, path
        assert sum(t.num_rows for t in reader.read(span)) == len(files)
    assert FileReader(str(folder)).name == "files:in"
    assert FileReader(str(folder / "a.jsonl")).name == "files:a"
    assert FileReader(str(folder / "*.jsonl")).name == "files:in"
    assert FileReader(str(folder), name="digits").name == "files:digits"
    with pytest.raises(SourceError, match="no file or folder"):
        FileReader(str(tmp_path / "nowhere")).plan({}, {}, None, None)
    assert FileReader(str(folder / "*.csv")).plan({}, {}, None, None).is_empty


def test_any_uri_that_fsspec_opens(tmp_path: Path) -> None:
    files = fsspec.filesystem("memory")
    files.pipe_file("/bucket-of-test/in/a.csv", b"a,b\n1,x\n")
    accepted, _ = land(FileReader("memory://bucket-of-test/in"), tmp_path)
    assert [(r["_file"], r["a"], r["b"]) for r in accepted] == [("a.csv", 1, "x")]


def test_formats_by_suffix_and_by_name(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", a_dot_jsonl=b'{"a":1}', b_dot_csv=b"a\n1\n")
    with pytest.raises(SpecError, match=r"\['csv', 'jsonl'\].*pattern"):
        FileReader(str(folder)).plan({}, {}, None, None)
    named = write(tmp_path / "named", rows_dot_txt=b'{"a":1}')
    with pytest.raises(SpecError, match="'txt'"):
        FileReader(str(named)).plan({}, {}, None, None)
    accepted, _ = land(FileReader(str(named), "jsonl"), tmp_path)
    assert accepted[0]["a"] == 1


def test_a_file_system_that_fails_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "in", a_dot_jsonl=b"{}")
    reader = FileReader(str(folder))
    span = reader.plan({}, {}, None, None)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OSError(5, os.strerror(5))

    monkeypatch.setattr(reader._fs, "open", fail)
    with pytest.raises(SourceUnavailableError, match="Input/output error"):
        list(reader.read(span))
    with pytest.raises(SourceUnavailableError, match="Input/output error"):
        reader.plan({}, {}, None, None)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_each_partition_is_taken_by_its_own_run_and_its_folders_are_columns(tmp_path: Path, suffix: str) -> None:
    value = FileSource(str(tmp_path / "in" / "day={partition}" / f"*.{suffix}"))
    for day in ("2026-11-01", "2026-11-02"):
        folder = tmp_path / "in" / f"day={day}"
        folder.mkdir(parents=True)
        (folder / "other.txt").write_bytes(b"not asked for")
        if suffix == "parquet":
            pq.write_table(pa.table({"a": [1, 2]}), folder / "1.parquet")
        else:
            (folder / f"1.{suffix}").write_bytes({"jsonl": b'{"a":1}\n{"a":2}\n', "csv": b"a\n1\n2\n"}[suffix])
    store, ledger = Store(str(tmp_path / "store")), MemoryLedger()

    def run(key: str, day: str) -> list[tuple[Any, ...]]:
        reader = open_source(replace(value, path=value.path_of(day, None)), folder=value.folder)
        assert reader.name == "files:in", "one source, whichever partition"
        ref = ingest(reader, AcceptAll(), store, ledger, IngestRun("p", key, key))
        return [(r["_file"], r["day"], r["a"]) for t in store.read(ref, ACCEPTED) for r in t.to_pylist()]

    second = [(f"day=2026-11-02/1.{suffix}", "2026-11-02", a) for a in (1, 2)]
    assert run("backfill-2", "2026-11-02") == second
    assert run("1", "2026-11-01") == [(f"day=2026-11-01/1.{suffix}", "2026-11-01", a) for a in (1, 2)]
    assert run("backfill-2", "2026-11-02") == second, "a clear has the same rows"
    assert run("again", "2026-11-02") == [], "another run of the same day takes nothing twice"
    assert run("3", "2026-11-03") == [], "a pattern that matches nothing yet is an empty batch"


def test_partition_columns_are_text_unless_declared_and_yield_to_the_files_own(tmp_path: Path) -> None:
    deep = tmp_path / "in" / "year=2026" / "kind=a%2Fb" / "gone=__HIVE_DEFAULT_PARTITION__" / "a=9"
    deep.mkdir(parents=True)
    (deep / "1.jsonl").write_bytes(b'{"a":1}\n{"a":2,"year":null}\n{nope\n')
    reader = FileReader(str(tmp_path / "in"))
    accepted, rejected = land(reader, tmp_path, a="int64", year="int64", kind="string")
    assert [(r["a"], r["year"], r["kind"], r["gone"]) for r in accepted] == [
        (1, 2026, "a/b", None),
        (2, 2026, "a/b", None),
    ]
    assert [r["_payload"] for r in rejected] == [b"{nope"]


PACK: dict[str, Any] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "zst": lambda data: pa.compress(data, "zstd", asbytes=True),
}


@pytest.mark.parametrize("suffix", PACK)
def test_compressed_files_are_what_they_hold(tmp_path: Path, suffix: str) -> None:
    lines = b"".join(b'{"a":%d}\n' % n for n in range(50_000))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / f"1.jsonl.{suffix}").write_bytes(PACK[suffix](lines))
    (tmp_path / "in" / f"2.ndjson.{suffix}").write_bytes(PACK[suffix](b'{"a":-1}') + PACK[suffix](b'\n{"a":-2}\n'))
    reader = FileReader(str(tmp_path / "in"))
    span = reader.plan({}, {}, None, None)
    assert span.facts == {"rows": 50_002}
    assert [s.end for s in span.slices] == [f.stat().st_size for f in sorted((tmp_path / "in").iterdir())]
    accepted, rejected = land(reader, tmp_path, a="int64")
    assert [row["a"] for row in accepted] == [*range(50_000), -1, -2]
    assert rejected == []
    (tmp_path / "in" / f"1.csv.{suffix}").write_bytes(PACK[suffix](b"a,b\n1,x\n"))
    assert land(FileReader(str(tmp_path / "in" / f"*.csv.{suffix}")), tmp_path / "csv")[0][0]["b"] == "x"


@pytest.mark.parametrize("suffix", PACK)
def test_a_compressed_file_that_is_cut_or_damaged_is_refused_before_a_row_is_claimed(
    tmp_path: Path, suffix: str
) -> None:
    whole = PACK[suffix](os.urandom(5000).hex().encode())
    folder = tmp_path / "in"
    folder.mkdir()
    damaged = [] if suffix == "zst" else [whole[:40] + b"\xff" * 200 + whole[240:]]  # this zstd has no checksum
    for broken in (whole[: len(whole) // 2], whole[:-1], b"not compressed at all", *damaged):
        (folder / f"1.jsonl.{suffix}").write_bytes(broken)
        with pytest.raises(SourceError, match="is no whole"):
            FileReader(str(folder)).plan({}, {}, None, None)


def test_a_file_of_no_bytes_is_taken_and_has_no_rows(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", a_dot_jsonl=b"", b_dot_jsonl=b'{"a":1}')
    store, ledger = Store(str(tmp_path / "store")), MemoryLedger()
    assert ingest(FileReader(str(folder)), AcceptAll(), store, ledger, IngestRun("p", "1", "1")).counts["read"] == 1
    for name in ("csv", "parquet"):
        empty = write(tmp_path / name, **{f"a_dot_{name}": b""})
        assert land(FileReader(str(empty)), tmp_path / f"{name}-store") == ([], []), name


def test_a_file_that_grows_while_it_is_read_lands_nothing(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", a_dot_jsonl=b'{"a":"%s"}\n' % (b"x" * 2000) * 20_000)
    reader = FileReader(str(folder))
    span = reader.plan({}, {}, None, None)
    tables = reader.read(span)
    next(tables)
    with (folder / "a.jsonl").open("ab") as file:
        file.write(b'{"a":2}\n')
    with pytest.raises(SourceError, match="has changed since it was planned"):
        list(tables)
