"""Files that want to do harm: mutated, lying, endless, inflated. None ends a task for good, none shifts a row."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import random
import tracemalloc
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from airflow_ai_provider.core.batch import ACCEPTED, QUARANTINE
from airflow_ai_provider.core.ingest import contain, file_rows
from airflow_ai_provider.core.ingest.contain import MARKER
from airflow_ai_provider.core.ingest.file_rows import image_format
from airflow_ai_provider.core.ingest.files import FileReader
from airflow_ai_provider.core.ingest.flow import IngestRun, ingest
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.errors import SourceError, SpecError
from airflow_ai_provider.testing import MemoryLedger, RuleValidator

SCHEMA = {"id": "int64", "name": "string"}
ROWS = [{"id": n, "name": f"sample {n * 7919 % 1000}"} for n in range(60)]
Rows = list[dict[str, Any]]


def land(folder: Path, *, died: bool = False) -> tuple[Rows, Rows]:
    store, reader = Store(f"{folder}-store"), FileReader(str(folder))
    if died:
        batch = reader.plan({}, {}, None, None).batch_id
        store.write_bytes(f"p/batch/{batch}/{MARKER}", b"")
    ref = ingest(reader, RuleValidator(schema=SCHEMA), store, MemoryLedger(), IngestRun("p", "r", "k"))
    accepted, rejected = ([r for t in store.read(ref, name) for r in t.to_pylist()] for name in (ACCEPTED, QUARANTINE))
    ids = [row["_row_id"] for row in accepted + rejected]
    assert len(set(ids)) == len(ids) == ref.counts["read"]
    return accepted, rejected


def parquet(table: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, write_page_checksum=True, **options)
    return sink.getvalue()


def mutate(data: bytes, chance: random.Random, first: int, end: int) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 8))):
        at = chance.randrange(first, min(end, len(changed)))
        how = chance.randrange(4)
        if how == 0:
            changed[at] = chance.choice((0, 10, 13, 34, 44, 92, 123, 127, 128, 255, chance.randrange(256)))
        elif how == 1:
            changed[at] ^= 1 << chance.randrange(8)
        elif how == 2:
            del changed[at : at + chance.choice((1, 2, 30))]
        else:
            changed[at:at] = chance.choice((b'"', b"\n", b"\x00", b"\xff\xfe", b",", bytes(40)))
    return bytes(changed)


def test_lines_beside_a_mutated_one_are_whole_in_the_batch_or_in_quarantine(tmp_path: Path) -> None:
    lines = {
        "csv": [f"{row['id']},{row['name']}".encode() for row in ROWS],
        "jsonl": [b'{"id":%d,"name":"%s"}' % (row["id"], row["name"].encode()) for row in ROWS],
    }
    for suffix, head in (("csv", b"id,name\n"), ("jsonl", b"")):
        folder, chance = tmp_path / suffix, random.Random(1)
        folder.mkdir()
        whole = head + b"\n".join(lines[suffix]) + b"\n"
        for number in range(300):
            (folder / f"{number:03d}.{suffix}").write_bytes(mutate(whole, chance, len(head), len(whole)))
        accepted, rejected = land(folder)
        values: dict[str, set[Any]] = defaultdict(set)
        payloads: dict[str, bytes] = defaultdict(bytes)
        for row in accepted:
            values[row["_file"]].add((row["id"], row["name"]))
        for row in rejected:
            payloads[row["_file"]] += row["_payload"] + b"\n"
        for path in sorted(folder.iterdir()):
            kept = set(path.read_bytes().split(b"\n"))
            for line, row in zip(lines[suffix], ROWS, strict=True):
                if line in kept:
                    assert (row["id"], row["name"]) in values[path.name] or line in payloads[path.name], (path, line)


def test_a_mutated_parquet_file_gives_its_rows_or_none(tmp_path: Path) -> None:
    table, chance = pa.Table.from_pylist(ROWS), random.Random(2)
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(400):
        options = {"compression": chance.choice(("zstd", "snappy", "none")), "use_dictionary": number % 2 == 0}
        data = parquet(table, row_group_size=20, **options)
        footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
        # checksums stand for pages, not for the footer: names and types in it may change unseen
        first, end = (4, footer) if number % 4 else (footer, len(data))
        (folder / f"{number:03d}.parquet").write_bytes(mutate(data, chance, first, end))
    accepted, rejected = land(folder)
    wrong = [r for r in accepted if int(r["_file"][:3]) % 4 and {n: r[n] for n in SCHEMA} != ROWS[r["_row"]]]
    assert wrong == []
    codes = {row["_reasons"][0].partition(":")[0] for row in rejected}
    assert codes <= {"broken_parquet", "wrong_type", "missing_field"}, codes
    assert len(accepted) > 3000, "a broken row group does not take the others with it"


def test_a_parquet_file_that_lies_about_itself_is_a_row_at_fault(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    pq.write_table(pa.table([[1], [2]], names=["id", "id"]), folder / "a.parquet")
    pq.write_table(pa.table({f"c{n}": [1] for n in range(10_001)}), folder / "b.parquet")
    not_utf8 = pa.array([b"\xff\xfe"]).view(pa.string())
    pq.write_table(pa.table({"id": [1], "name": not_utf8}), folder / "c.parquet")
    pq.write_table(pa.table({"id": [3], "name": ["good"]}), folder / "d.parquet")
    accepted, rejected = land(folder)
    assert [row["id"] for row in accepted] == [3]
    told = {row["_file"]: row["_reasons"][0] for row in rejected}
    assert "names ['id'] twice" in told["a.parquet"]
    assert "10001 columns; 10000 are read at the most" in told["b.parquet"]
    assert "UTF" in told["c.parquet"]


def test_a_large_row_group_is_not_held_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_rows, "_HELD", 1_000_000)
    monkeypatch.setattr(file_rows, "_ROWS", 10_000)
    folder = tmp_path / "in"
    folder.mkdir()
    pq.write_table(pa.table({"id": pa.array(range(300_000), pa.int64())}), folder / "a.parquet")
    held: list[int] = []
    for table in FileReader(str(folder)).read(FileReader(str(folder)).plan({}, {}, None, None)):
        held.append(pa.total_allocated_bytes())
        assert table["id"].to_pylist() == table["_row"].to_pylist()
    assert max(held) - min(held) < 20_000_000


def test_a_header_of_a_million_columns_and_a_line_without_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = tmp_path / "wide"
    wide.mkdir()
    (wide / "a.csv").write_bytes(b",".join(b"c%d" % n for n in range(1_000_000)) + b"\n")
    with pytest.raises(SourceError, match="names 1000000 columns; 10000 are read at the most"):
        land(wide)
    monkeypatch.setattr(file_rows, "_MAX_LINE", 100_000)
    monkeypatch.setattr(file_rows, "CHUNK", 30_000)
    for suffix, head in (("csv", b"id,name\n"), ("jsonl", b"")):
        folder = tmp_path / suffix
        folder.mkdir()
        first, last = ROWS[0], ROWS[1]
        lines = [
            f'{{"id":{row["id"]},"name":"{row["name"]}"}}' if suffix == "jsonl" else f"{row['id']},{row['name']}"
            for row in (first, last)
        ]
        endless = b'{"id":5,"name":"' if suffix == "jsonl" else b"5,"
        data = head + lines[0].encode() + b"\n" + endless + b"x" * 1_000_000 + b"\n" + lines[1].encode()
        (folder / f"a.{suffix}").write_bytes(data)
        accepted, rejected = land(folder)
        assert [(row["_row"], row["id"]) for row in accepted] == [(0, 0), (2, 1)]
        assert len(rejected[0]["_payload"]) <= 130_000
        assert rejected[0]["_payload"].startswith(endless + b"xxx")


def test_an_endless_quoted_field_takes_no_more_than_a_payload_may_have(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.csv").write_bytes(b'id,name\n1,a\n2,"open' + (b"\n3," + b"b" * 10_000) * 2_000)
    accepted, rejected = land(folder)
    assert accepted[0]["id"] == 1
    assert rejected[0]["_reasons"][0].startswith("broken_csv")
    assert len(rejected[0]["_payload"]) < 17 * 1024 * 1024
    assert {row["name"] for row in accepted[1:]} == {"b" * 10_000}


def test_a_file_that_ends_the_process_is_named_by_the_retry_and_the_others_land(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contain, "_FILE_MEMORY", 300 << 20)
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.parquet").write_bytes(parquet(pa.table({"id": [1], "name": ["a"]})))
    inflated = pa.array(["x" * 120_000_000])  # 2 GB in all: Arrow's allocator holds 1 GB of addresses from the start
    bomb = pa.table({"id": [2], **{f"name{n}": inflated for n in range(17)}})
    (folder / "b.parquet").write_bytes(parquet(bomb, compression="zstd", use_dictionary=False, write_statistics=False))
    (folder / "c.parquet").write_bytes(parquet(pa.table({"id": [3], "name": ["c"]})))
    assert (folder / "b.parquet").stat().st_size < 1_000_000
    accepted, rejected = land(folder, died=True)
    assert [row["id"] for row in accepted] == [1, 3]
    assert [(row["_file"], row["_row"], row["_payload"]) for row in rejected] == [("b.parquet", 0, None)]
    assert "decoder_crashed: a process that read only this file" in rejected[0]["_reasons"][0]
    assert not list(tmp_path.rglob(MARKER))


def test_a_mutated_image_is_its_own_bytes_in_the_batch_or_in_quarantine(tmp_path: Path) -> None:
    chance, folder = random.Random(3), tmp_path / "in"
    folder.mkdir()
    for number in range(300):
        kind = chance.choice(("png", "jpeg", "gif", "webp", "bmp", "tiff"))
        image = io.BytesIO()
        Image.frombytes("RGB", (8, 8), chance.randbytes(192)).save(image, kind)
        whole = image.getvalue()
        data = mutate(whole, chance, *((0, 12) if number % 2 else (12, len(whole))))  # the first bytes say what it is
        (folder / f"{number:03d}.{kind}").write_bytes(data)
    accepted, rejected = land(folder)
    assert len(accepted) + len(rejected) == 300
    assert min(len(accepted), len(rejected)) > 20, "both kinds of end are met"
    for row in accepted:
        assert row["bytes"] == (folder / row["_file"]).read_bytes()
        assert row["size"] == len(row["bytes"])
        assert row["format"] == image_format(row["bytes"])
    for row in rejected:
        assert row["_payload"] == (folder / row["_file"]).read_bytes()
        assert row["_reasons"][0].startswith("broken_image: ")


def test_an_image_that_is_too_large_is_a_row_at_fault_and_is_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_rows, "_MAX_IMAGE", 1_000_000)
    monkeypatch.setattr(file_rows, "CHUNK", 100_000)
    folder = tmp_path / "in"
    folder.mkdir()
    head = b"\x89PNG\r\n\x1a\n"
    (folder / "a.png").write_bytes(head + bytes(999_992))
    (folder / "b.png.zst").write_bytes(pa.compress(head + bytes(200_000_000), "zstd", asbytes=True))
    assert (folder / "b.png.zst").stat().st_size < 20_000
    tracemalloc.start()
    accepted, rejected = land(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000_000
    assert [(row["_file"], row["size"]) for row in accepted] == [("a.png", 1_000_000)]
    told = [(row["_file"], row["_payload"], row["_reasons"]) for row in rejected]
    assert told == [("b.png.zst", None, ["broken_image: 200000008 bytes; 1000000 are read at the most"])]


PACK: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "zst": lambda data: pa.compress(data, "zstd", asbytes=True),
}


@pytest.mark.parametrize("suffix", PACK)
def test_a_mutated_compressed_file_holds_what_it_held_or_is_an_error_that_names_it(tmp_path: Path, suffix: str) -> None:
    """zstd as Arrow writes it has no checksum: such a file may hold other rows then, and each of them has its place."""
    chance, folder = random.Random(4), tmp_path / "in"
    folder.mkdir()
    lines = b"".join(b'{"id":%d,"name":"%s"}\n' % (row["id"], row["name"].encode()) for row in ROWS)
    whole = PACK[suffix](lines)
    refused = 0
    for number in range(250):
        file = folder / f"{number:03d}.jsonl.{suffix}"
        # ten bytes are gzip's header, whose times and flags no checksum covers
        file.write_bytes(mutate(whole, chance, 0, 10 if number % 3 == 0 else len(whole)))
        try:
            FileReader(str(file)).plan({}, {}, None, None)
        except SourceError as error:
            assert error.path == file.name
            assert f"{file.name} is no whole" in str(error)
            file.unlink()
            refused += 1
    assert refused > 100
    (folder / f"whole.jsonl.{suffix}").write_bytes(whole)
    left = {file.name for file in folder.iterdir()}
    accepted, rejected = land(folder)
    if suffix != "zst":
        assert rejected == []
        assert Counter(row["_file"] for row in accepted) == dict.fromkeys(left, len(ROWS))
        assert all({n: row[n] for n in SCHEMA} == ROWS[row["_row"]] for row in accepted)


def test_a_compression_that_is_not_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(b'{"id":1}\n'))
    with pytest.raises(SpecError, match=r"\['xz'\]; format='auto' wants one of"):
        FileReader(str(tmp_path)).plan({}, {}, None, None)
