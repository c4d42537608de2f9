"""Avro by hypothesis: any schema and value as fastavro reads them; any bytes the same verdict by column and by row."""

from __future__ import annotations

import copy
import io
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import fastavro
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from airflow_ai_provider.core.ingest.encoded.avro.block import CHUNK
from airflow_ai_provider.core.ingest.encoded.avro.decoder import AvroBodies, AvroDecoder
from airflow_ai_provider.core.ingest.encoded.avro.schema import parse
from airflow_ai_provider.core.ingest.encoded.wire import Bodies, _spread_out
from airflow_ai_provider.testing.registry import MemorySchemas

DAY = timedelta(days=1)
LEAVES: dict[str, tuple[Any, st.SearchStrategy[Any]]] = {
    "boolean": ("boolean", st.booleans()),
    "int": ("int", st.integers(-(2**31), 2**31 - 1) | st.integers(-70, 70)),
    "long": ("long", st.integers(-(2**63), 2**63 - 1) | st.integers(-70, 70)),
    "float": ("float", st.floats(width=32)),
    "double": ("double", st.floats()),
    "bytes": ("bytes", st.binary(max_size=90)),
    "string": ("string", st.text(max_size=70)),
    "date": ({"type": "int", "logicalType": "date"}, st.dates()),
    "millis": (
        {"type": "long", "logicalType": "timestamp-millis"},
        st.datetimes(timezones=st.just(UTC)).map(lambda t: t.replace(microsecond=t.microsecond // 1000 * 1000)),
    ),
    "micros": ({"type": "long", "logicalType": "timestamp-micros"}, st.datetimes(timezones=st.just(UTC))),
    "clock": ({"type": "long", "logicalType": "time-micros"}, st.times()),
    "decimal": (
        {"type": "bytes", "logicalType": "decimal", "precision": 20, "scale": 3},
        st.integers(-(10**20) + 1, 10**20 - 1).map(lambda n: Decimal(n).scaleb(-3)),
    ),
    "uuid": ({"type": "string", "logicalType": "uuid"}, st.uuids().map(str)),
}


@st.composite
def schemas(draw: st.DrawFn, depth: int = 2) -> tuple[Any, st.SearchStrategy[Any]]:
    """A schema, and its values as Python has them."""
    kinds = [*LEAVES, "enum", "fixed", *(["nullable", "record", "list", "map", "union"] if depth else [])]
    kind = draw(st.sampled_from(kinds))
    if kind in LEAVES:
        return LEAVES[kind]
    if kind == "enum":
        symbols = [f"S{i}" for i in range(draw(st.integers(1, 80)))]
        return {"type": "enum", "name": "", "symbols": symbols}, st.sampled_from(symbols)
    if kind == "fixed":
        size = draw(st.integers(1, 9))
        return {"type": "fixed", "name": "", "size": size}, st.binary(min_size=size, max_size=size)
    if kind == "record":
        return draw(records(depth - 1))
    if kind == "union":
        some = draw(st.lists(st.sampled_from(["boolean", "int", "string"]), min_size=2, max_size=3, unique=True))
        return ["null", *some], st.none() | st.one_of(*(LEAVES[k][1] for k in some))
    schema, values = draw(schemas(depth - 1))
    if kind == "list":
        return {"type": "array", "items": schema}, st.lists(values, max_size=4)
    if kind == "map":
        return {"type": "map", "values": schema}, st.dictionaries(st.text(max_size=5), values, max_size=3)
    if isinstance(schema, list):
        return schema, values
    return (["null", schema] if draw(st.booleans()) else [schema, "null"]), st.none() | values


@st.composite
def records(draw: st.DrawFn, depth: int = 2) -> tuple[Any, st.SearchStrategy[Any]]:
    parts = draw(st.lists(schemas(depth), min_size=1, max_size=4))
    fields = [{"name": f"f{i}", "type": copy.deepcopy(schema)} for i, (schema, _) in enumerate(parts)]
    schema = {"type": "record", "name": "", "fields": fields}
    name_types(schema, itertools.count())
    return schema, st.fixed_dictionaries({f"f{i}": values for i, (_, values) in enumerate(parts)})


def name_types(schema: Any, numbers: Iterator[int]) -> None:
    """Give each named type a name of its own."""
    for part in schema if isinstance(schema, list) else [schema]:
        if isinstance(part, dict):
            if part["type"] in ("record", "enum", "fixed"):
                part["name"] = f"N{next(numbers)}"
            for inner in (part.get("items"), part.get("values"), *(f["type"] for f in part.get("fields", ()))):
                name_types(inner, numbers)


@st.composite
def rows(draw: st.DrawFn) -> tuple[Any, list[Any]]:
    schema, values = draw(records())
    return schema, draw(st.lists(values, min_size=1, max_size=5))


def encode(schema: Any, value: Any) -> bytes:
    sink = io.BytesIO()
    fastavro.schemaless_writer(sink, fastavro.parse_schema(json.loads(json.dumps(schema))), value)
    return sink.getvalue()


def decode(schema: Any, bodies: Sequence[bytes], by_column: bool = True) -> tuple[pa.Table, list[int], dict[int, str]]:
    data, starts, ends = _spread_out(pa.array(bodies, pa.binary()))
    found = AvroBodies(parse(json.dumps(schema)), None, 100, by_column=by_column).decode(Bodies(data, starts, ends))
    table = pa.table(dict(found.columns))
    table.validate(full=True)
    return table, found.good.tolist(), dict(found.faults)


def same(ours: Any, theirs: Any) -> bool:
    """Compare a value of ours with fastavro's, over the shapes in which Arrow shows maps and unions."""
    if isinstance(theirs, dict) and isinstance(ours, list):
        return len(ours) == len(theirs) and all(same(v, theirs[k]) for k, v in ours)
    if isinstance(theirs, dict):
        return isinstance(ours, dict) and ours.keys() == theirs.keys() and all(same(ours[k], theirs[k]) for k in ours)
    if isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    if isinstance(ours, dict):
        given = [v for v in ours.values() if v is not None]
        return len(given) == 1 and same(given[0], theirs) and type(given[0]) is type(theirs)
    if isinstance(theirs, float):
        return (math.isnan(ours) and math.isnan(theirs)) or (
            ours == theirs and math.copysign(1, ours) == math.copysign(1, theirs)
        )
    if isinstance(theirs, UUID):  # ours keeps the letters as they were written, theirs shows small ones
        return UUID(ours) == theirs
    return bool(ours == theirs or str(ours) == str(theirs))


def agree(schema: Any, bodies: Sequence[bytes]) -> tuple[pa.Table, list[int], dict[int, str]]:
    fast, slow = decode(schema, bodies), decode(schema, bodies, by_column=False)
    assert repr(fast[0].to_pylist()) == repr(slow[0].to_pylist())
    assert fast[0].schema == slow[0].schema
    assert fast[1:] == slow[1:]
    assert sorted([*fast[1], *fast[2]]) == list(range(len(bodies)))
    return fast


@given(rows())
@settings(max_examples=150, deadline=None)
def test_values_are_fastavros(case: tuple[Any, list[Any]]) -> None:
    schema, values = case
    bodies = [encode(schema, value) for value in values]
    table, good, faults = agree(schema, bodies)
    assert (good, faults) == (list(range(len(bodies))), {})
    parsed = fastavro.parse_schema(json.loads(json.dumps(schema)))
    for ours, body in zip(table.to_pylist(), bodies, strict=True):
        assert same(ours, fastavro.schemaless_reader(io.BytesIO(body), parsed))


@st.composite
def spoiled(draw: st.DrawFn) -> tuple[Any, bytes, bytes]:
    """A schema, a good body of it, and another one in which something was changed."""
    schema, values = draw(records())
    good, evil = encode(schema, draw(values)), bytearray(encode(schema, draw(values)))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(evil)))
        what = draw(st.sampled_from(["set", "insert", "cut", "remove", "flip"]))
        if what == "insert":
            evil[at:at] = draw(st.binary(min_size=1, max_size=11) | st.sampled_from([b"\x80" * 9, b"\xff" * 9 + b"\1"]))
        elif what == "cut":
            del evil[at:]
        elif what == "remove":
            del evil[at : at + draw(st.integers(1, 4))]
        elif at < len(evil):
            evil[at] = draw(st.integers(0, 255)) if what == "set" else evil[at] ^ 0x80
    return schema, good, bytes(evil)


@given(spoiled())
@settings(max_examples=400, deadline=None)
def test_a_spoiled_body_has_one_verdict_and_moves_nobody(case: tuple[Any, bytes, bytes]) -> None:
    schema, good, evil = case
    alone, _, faults = agree(schema, [evil])
    fine, _, _ = agree(schema, [good])
    table, _, found = agree(schema, [good, evil, good, good])
    assert found == ({1: faults[0]} if faults else {})
    expected = [fine, fine, fine] if faults else [fine, alone, fine, fine]
    assert repr(table.to_pylist()) == repr([row for part in expected for row in part.to_pylist()])


@given(spoiled())
@settings(max_examples=200, deadline=None)
def test_what_is_accepted_fastavro_reads_the_same(case: tuple[Any, bytes, bytes]) -> None:
    """An independent reader: stricter we may be, but never of another opinion about a value."""
    schema, _, evil = case
    table, _, faults = agree(schema, [evil])
    if not faults:
        parsed = fastavro.parse_schema(json.loads(json.dumps(schema)))
        assert same(table.to_pylist()[0], fastavro.schemaless_reader(io.BytesIO(evil), parsed))


@given(records(), st.lists(st.binary(max_size=60), min_size=1, max_size=6))
@settings(max_examples=200, deadline=None)
def test_any_bytes_at_all(case: tuple[Any, Any], bodies: list[bytes]) -> None:
    agree(case[0], bodies)


@given(st.lists(st.none() | st.binary(max_size=20), max_size=8))
@settings(max_examples=100, deadline=None)
def test_any_payloads_at_all(payloads: list[bytes | None]) -> None:
    held = MemorySchemas()
    held.add("rows-value", '"bytes"')
    block = AvroDecoder(held).decode(payloads)
    assert sorted([*block.good.tolist(), *block.faults]) == list(range(len(payloads)))


def test_more_rows_than_one_chunk_with_a_bad_one_at_each_edge() -> None:
    schema = {
        "type": "record",
        "name": "R",
        "fields": [{"name": "i", "type": "int"}, {"name": "o", "type": ["null", "string"]}],
    }
    count = 2 * CHUNK + 5
    values = [{"i": i, "o": str(i) if i % 3 else None} for i in range(count)]
    bodies = [encode(schema, v) for v in values]
    bad = [0, CHUNK - 1, CHUNK, 2 * CHUNK - 1, 2 * CHUNK, count - 1]
    for i in bad:
        bodies[i] = bodies[i][:-1] + (b"\xff" if i % 2 else b"")
    table, good, faults = decode(schema, bodies)
    assert sorted(faults) == bad
    assert table.to_pylist() == [values[i] for i in good]
    assert len(good) == count - len(bad)


def test_times_of_all_the_calendar() -> None:
    """Its first and its last moment, which other ways of counting lose."""
    schema = {
        "type": "record",
        "name": "R",
        "fields": [
            {"name": "d", "type": {"type": "int", "logicalType": "date"}},
            {"name": "t", "type": {"type": "long", "logicalType": "timestamp-micros"}},
            {"name": "c", "type": {"type": "int", "logicalType": "time-millis"}},
        ],
    }
    ends = [
        {"d": date.min, "t": datetime.min.replace(tzinfo=UTC), "c": time.min},
        {"d": date.max, "t": datetime.max.replace(tzinfo=UTC), "c": time(23, 59, 59, 999000)},
    ]
    assert agree(schema, [encode(schema, v) for v in ends])[0].to_pylist() == ends
