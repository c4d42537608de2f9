"""Ingest for arbitrary bytes: rows conserved, ids unique and stable, same bytes again, both decoding paths equal."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
from hypothesis import example, given, settings
from hypothesis import strategies as st

from airflow_ai_provider.core.batch import ACCEPTED, QUARANTINE
from airflow_ai_provider.core.ingest import json_rows
from airflow_ai_provider.core.ingest.block import cut
from airflow_ai_provider.core.ingest.decode import RowDecoder
from airflow_ai_provider.core.ingest.flow import IngestRun, ingest
from airflow_ai_provider.core.ingest.json_rows import JsonRows
from airflow_ai_provider.core.ingest.kafka_span import cap
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.testing import MemoryLedger, MemorySource, RuleValidator

SCHEMA = {"i": "int64", "f": "float64", "s": "string", "b": "bool", "t": "timestamp", "j": "json"}
NAMES = st.sampled_from([*SCHEMA, "z", "_row_id", ""])
SCALARS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5)
VALUES = st.recursive(
    SCALARS | st.datetimes().map(str),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
JSON = st.dictionaries(NAMES, VALUES, max_size=6).map(lambda fields: json.dumps(fields).encode())
NEARLY_JSON = st.tuples(JSON, st.integers(0, 60), st.binary(max_size=2)).map(
    lambda t: t[0][: t[1]] + t[2] + t[0][t[1] :]
)
DOUBLED = st.tuples(JSON, JSON).map(lambda t: t[0][:-1] + (b"," if len(t[0]) > 2 and len(t[1]) > 2 else b"") + t[1][1:])
PAYLOADS = st.lists(st.none() | st.binary(max_size=30) | JSON | NEARLY_JSON | DOUBLED, max_size=12)


def world(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def negative(row: dict[str, Any]) -> str | None:
    return "out_of_range: i" if (row["i"] or 0) < 0 else None


@settings(max_examples=60, deadline=None)
@given(st.lists(PAYLOADS, min_size=1, max_size=3), st.booleans(), st.integers(1, 5))
def test_every_payload_lands_once_with_its_bytes(topic: list[list[bytes | None]], typed: bool, chunk: int) -> None:
    rules = RuleValidator(negative, SCHEMA if typed else {"i": "int64"}, unique="s" if typed else None)
    given_bytes = {f"rows~memory-1/{p}/{o}": row for p, rows in enumerate(topic) for o, row in enumerate(rows)}
    with tempfile.TemporaryDirectory() as folder:
        worlds = []
        for number in range(2):
            root = Path(folder) / str(number)
            source = MemorySource(dict(enumerate(topic)), chunk=chunk + 3 * number)
            store = Store(str(root))
            ref = ingest(source, rules, store, MemoryLedger(), IngestRun("p", "r", "k"))
            worlds.append(world(root))
        assert worlds[0] == worlds[1]
        accepted = [i for t in store.read(ref, ACCEPTED) for i in t["_row_id"].to_pylist()]
        rejected = [row for t in store.read(ref, QUARANTINE) for row in t.to_pylist()]
    ids = accepted + [row["_row_id"] for row in rejected]
    assert ref.counts["read"] == len(ids) == len(given_bytes)
    assert set(ids) == set(given_bytes)
    assert all(row["_payload"] == given_bytes[row["_row_id"]] and row["_reasons"] for row in rejected)


GOOD = b'{"i":1,"f":0.5,"s":"x","b":true,"t":"2020-01-01T00:00:00Z"}'
EVIL: list[bytes | None] = [
    *(b"null", b"", b" ", b"[]", b"{}", b'{"i":1}{"i":2}', b'{"i":1},{"i":2', b'"s":"y"}', b'{"i":1}\x00'),
    *(b'{"i":9223372036854775808}', b'{"i":1.0}', b'{"i":"1"}', b'{"i":1,"i":2}', b'{"i":-0}', b'{"f":NaN}'),
    *(b'{"s":"\\ud800"}', b'{"s":"\xff"}', b'{"s":"\xc0\xaf"}', b'{"s":1}', b'{"z":"\xff"}', b'{"f":1e999}'),
    *(b'{"t":"0001-01-01T00:00:00+23:00"}', b'{"t":"2020-01-01 00:00:00"}', b'{"_row_id":"x"}', b'{"j":{"a":[1]}}'),
    *(b'{"z":' + b"[" * 200 + b"]" * 200 + b"}", b"\xef\xbb\xbf{}", None),
]


@settings(max_examples=200, deadline=None)
@given(PAYLOADS | st.lists(st.sampled_from([GOOD, *EVIL]), max_size=12), st.integers(1, 5))
@example([given_one for evil in EVIL for given_one in (GOOD, evil)] + [GOOD], 7)
def test_the_fast_path_decides_as_the_slow_one(payloads: list[bytes | None], chunk: int) -> None:
    for schema in (SCHEMA, {"i": "int64", "s": "string"}, {n: t for n, t in SCHEMA.items() if t != "json"}):
        rows = JsonRows(schema)
        with mock.patch.object(json_rows, "ROWS", chunk):
            fast = rows.decode(payloads)
        shifted = pa.array([b"before", *payloads], pa.binary()).slice(
            1
        )  # a column need not begin at its buffer's start
        again, slow = rows.decode(shifted), rows.decode_slowly(payloads)
        assert (again.extras, again.faults) == (slow.extras, slow.faults)
        assert all(repr(again.columns[n].to_pylist()) == repr(slow.columns[n].to_pylist()) for n in schema)
        assert (fast.extras, fast.faults) == (slow.extras, slow.faults)
        assert [repr(c.to_pylist()) for c in fast.columns.values()] == [
            repr(c.to_pylist()) for c in slow.columns.values()
        ]
        assert len(fast.extras) + len(fast.faults) == len(payloads)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from("abc"), VALUES, max_size=3), max_size=6))
def test_values_without_a_declared_type_come_back_as_they_were(rows: list[dict[str, Any]]) -> None:
    payloads = [json.dumps(row).encode() for row in rows]
    table = pa.table({"_row_id": [str(i) for i in range(len(rows))], "_payload": pa.array(payloads, pa.binary())})
    decoder = RowDecoder({}, "json")
    accepted = decoder.decode(table).accepted
    kinds = decoder.columns
    for row in accepted.to_pylist():
        given_row = json.loads(payloads[int(row["_row_id"])])
        for name, value in given_row.items():
            found = json.loads(row[name]) if kinds[name] == "json" and row[name] is not None else row[name]
            assert found == value or (isinstance(value, int) and found == float(value))


@given(st.lists(st.integers(0, 9), max_size=30), st.lists(st.integers(1, 7), min_size=1), st.integers(1, 6))
def test_blocks_do_not_depend_on_chunks(sizes: list[int], chunks: list[int], row_count: int) -> None:
    table = pa.table({"n": list(range(len(sizes))), "_payload": pa.array([b"x" * s for s in sizes], pa.binary())})
    pieces, at = [], 0
    while at < len(sizes):
        size = chunks[len(pieces) % len(chunks)]
        pieces.append(table.slice(at, size))
        at += size
    whole = [b["n"].to_pylist() for b in cut([table], row_count, 12)]
    assert [b["n"].to_pylist() for b in cut(pieces, row_count, 12)] == whole
    assert [n for block in whole for n in block] == list(range(len(sizes)))


@given(st.dictionaries(st.integers(0, 5), st.integers(1, 20), min_size=1), st.integers(1, 50))
def test_a_cap_is_kept_and_nobody_starves(sizes: dict[int, int], limit: int) -> None:
    bounds = {p: (3, 3 + size) for p, size in sizes.items()}
    capped = cap(bounds, limit)
    taken = {p: end - first for p, (first, end) in capped.items()}
    assert sum(taken.values()) == min(limit, sum(sizes.values()))
    assert all(first == 3 and end <= bounds[p][1] for p, (first, end) in capped.items())
    assert limit < len(sizes) or set(taken) == set(sizes)
