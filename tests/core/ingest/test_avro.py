"""Avro in the wire format: values, each strictness with its reason, headers, mixed schemas."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, date, datetime, time
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest

from airflow_ai_provider.core.ingest.encoded.avro.decoder import AvroDecoder
from airflow_ai_provider.core.ingest.encoded.avro.schema import MAX_SCHEMA_NODES, SchemaFaultError, parse
from airflow_ai_provider.errors import RegistryUnavailableError
from airflow_ai_provider.testing.registry import MemorySchemas
from tests.core.ingest.avro_rows import Json, both_ways, decode, encode, framed, record


def test_every_type_has_its_value() -> None:
    schema = record(
        ("s", "string"),
        ("b", "bytes"),
        ("i", "int"),
        ("l", "long"),
        ("f", "float"),
        ("d", "double"),
        ("t", "boolean"),
        ("n", "null"),
        ("e", {"type": "enum", "name": "Colour", "symbols": ["red", "blue"]}),
        ("x", {"type": "fixed", "name": "Two", "size": 2}),
        ("o", ["null", "string"]),
        ("u", ["int", "null", "string"]),
        ("r", record(("a", "int"), ("b", ["null", "double"]), name="Inner")),
        ("day", {"type": "int", "logicalType": "date"}),
        ("at", {"type": "long", "logicalType": "timestamp-millis"}),
        ("us", {"type": "long", "logicalType": "timestamp-micros"}),
        ("local", {"type": "long", "logicalType": "local-timestamp-millis"}),
        ("clock", {"type": "int", "logicalType": "time-millis"}),
        ("sum", {"type": "bytes", "logicalType": "decimal", "precision": 9, "scale": 2}),
        ("id", {"type": "string", "logicalType": "uuid"}),
    )
    at = datetime(2026, 11, 22, 8, 30, 0, 123000, UTC)
    value = {
        "s": "é\0", "b": b"\xff", "i": -(2**31), "l": 2**63 - 1, "f": 1.5, "d": -0.0, "t": True, "n": None,
        "e": "blue", "x": b"ab", "o": None, "u": "text", "r": {"a": 7, "b": None}, "day": date(2026, 2, 28), "at": at,
        "us": at, "local": at.replace(tzinfo=None), "clock": time(1, 2, 3), "sum": Decimal("-12345.67"),
        "id": "12345678-1234-1234-1234-1234567890ab",
    }  # fmt: skip
    rows, faults = both_ways(schema, [encode(schema, value)] * 3)
    assert not faults
    assert rows == [{**value, "u": {"int": None, "string": "text"}}] * 3
    assert str(rows[0]["d"]) == "-0.0"


def test_lists_and_maps_and_recursion() -> None:
    schema = record(
        ("list", {"type": "array", "items": ["null", "int"]}),
        ("map", {"type": "map", "values": "double"}),
        ("tree", record(("v", "int"), ("next", ["null", "Node"]), name="Node")),
    )
    value = {"list": [1, None, 3], "map": {"a": 1.0, "b": 2.0}, "tree": {"v": 1, "next": {"v": 2, "next": None}}}
    rows, faults = both_ways(schema, [encode(schema, value)])
    assert not faults
    assert rows[0]["list"] == [1, None, 3]
    assert rows[0]["map"] == [("a", 1.0), ("b", 2.0)]
    assert rows[0]["tree"] == {"v": 1, "next": '{"v":2,"next":null}'}
    # a list in blocks that say how long they are, as other writers cut them
    body = b"\x01\x04\x02\x02" + b"\x00" + b"\x00" + b"\x02" + b"\x00"
    rows, faults = both_ways(schema, [body])
    assert (rows[0]["list"], faults) == ([1], {})


def test_a_schema_of_one_value_gives_the_column_value() -> None:
    assert decode('"long"', [b"\x02", b"\x04"]).rows.to_pylist() == [{"value": 1}, {"value": 2}]
    assert decode({"type": "array", "items": "string"}, [b"\x02\x02a\x00"]).rows.to_pylist() == [{"value": ["a"]}]


STRING = record(("s", "string"), ("i", "int"))
EVIL: list[tuple[str, Any, bytes, str]] = [
    ("nothing", STRING, b"", "s: a number is cut"),
    ("cut", STRING, b"\x06ab", "s: 3 bytes, 2 are left"),
    ("one byte more", STRING, b"\x02a\x02!", "1 bytes are left after the last field"),
    ("a gigabyte declared", STRING, b"\xfe\xff\xff\xff\x0f", "bytes, 0 are left"),
    ("a length of 2^62", STRING, b"\xfe\xff\xff\xff\xff\xff\xff\xff\x7f", "are left"),
    ("a negative length", STRING, b"\x01\x02", "s: length -1"),
    ("overlong utf-8", STRING, b"\x04\xc0\x80\x02", "s: text is not UTF-8"),
    ("a surrogate", STRING, b"\x06\xed\xa0\x80\x02", "s: text is not UTF-8"),
    ("a number with needless bytes", STRING, b"\x02a\x80\x00", "i: a number with needless bytes"),
    ("eleven bytes", STRING, b"\x02a" + b"\x80" * 10 + b"\x00", "i: a number of more than ten bytes"),
    ("ten bytes over 64 bits", record(("l", "long")), b"\xff" * 9 + b"\x02", "l: a number of more than 64 bits"),
    ("an int over 32 bits", STRING, b"\x02a\x80\x80\x80\x80\x10", "i: a number of more than 32 bits"),
    ("boolean 2", record(("t", "boolean")), b"\x02", "t: byte 2 is no boolean"),
    ("enum -1", record(("e", {"type": "enum", "name": "E", "symbols": ["a"]})), b"\x01", "e: number -1 of 1 symbols"),
    ("enum 1 of 1", record(("e", {"type": "enum", "name": "E", "symbols": ["a"]})), b"\x02", "e: number 1 of 1"),
    ("union -1", record(("u", ["null", "int"])), b"\x01\x02", "u: number -1 of 2 types"),
    ("union 2 of 2", record(("u", ["null", "int"])), b"\x04\x02", "u: number 2 of 2 types"),
    ("wide union -2", record(("u", ["null", "int", "string"])), b"\x03\x02", "u: number -2 of 3 types"),
    (
        "a decimal beyond its precision",
        record(("d", {"type": "bytes", "logicalType": "decimal", "precision": 3})),
        b"\x04\x03\xe8",
        "d: 2 bytes are no decimal(3,0)",
    ),
    (
        "a decimal of no bytes",
        record(("d", {"type": "bytes", "logicalType": "decimal", "precision": 3})),
        b"\x00",
        "d: 0 bytes are no decimal(3,0)",
    ),
    ("year 10000", record(("d", {"type": "int", "logicalType": "date"})), b"\xfa\x89\xe6\x02", "is no date"),
    (
        "a time past midnight",
        record(("c", {"type": "int", "logicalType": "time-millis"})),
        encode("int", 86_400_000),
        "c: 86400000 is no time-millis",
    ),
    (
        "a timestamp past the calendar",
        record(("t", {"type": "long", "logicalType": "timestamp-millis"})),
        encode("long", 2**60),
        "is no timestamp-millis",
    ),
    ("no uuid", record(("g", {"type": "string", "logicalType": "uuid"})), b"\x02a", "g: 'a' is no uuid"),
    (
        "a key twice",
        record(("m", {"type": "map", "values": "int"})),
        b"\x04\x02a\x02\x02a\x04\x00",
        "m: a map has the key 'a' twice",
    ),
    (
        "a block that lies about its size",
        record(("a", {"type": "array", "items": "int"})),
        b"\x01\x04\x02\x00",
        "a: a block ends -1 bytes from where it says",
    ),
    (
        "a list of 2^40 nulls in seven bytes",
        record(("a", {"type": "array", "items": "null"})),
        encode("long", 2**40) + b"\0",
        "a: more than 10000 items of no size",
    ),
    (
        "nested 200 deep",
        record(("v", "int"), ("next", ["null", "Row"])),
        b"\x02\x02" * 200 + b"\x02\x00",
        "nested too deeply",
    ),
    (
        "nested 10 000 deep, which kills other readers",
        record(("v", "int"), ("next", ["null", "Row"])),
        b"\x02\x02" * 10_000 + b"\x02\x00",
        "nested too deeply",
    ),
]


@pytest.mark.parametrize(("schema", "body", "reason"), [case[1:] for case in EVIL], ids=[case[0] for case in EVIL])
def test_an_evil_body_is_rejected_alone_and_between_good_ones(schema: Json, body: bytes, reason: str) -> None:
    good = encode(schema, _some(schema))
    alone = both_ways(schema, [body])
    assert alone[0] == []
    assert reason in alone[1][0]
    assert alone[1][0].startswith("broken_avro: ")
    rows, faults = both_ways(schema, [good, body, good, good, body])
    assert faults == {1: alone[1][0], 4: alone[1][0]}
    assert rows == both_ways(schema, [good])[0] * 3


def _some(schema: Json) -> Json:
    """A good row of any of the schemas above."""
    values = {"s": "x" * 80, "i": -70000, "l": 2**62, "t": False, "e": "a", "u": None, "c": time(1), "v": 1}
    values |= {"t": False, "g": "12345678-1234-1234-1234-1234567890ab", "m": {"a": 1, "b": 2}, "a": [], "next": None}
    row = {f["name"]: values.get(f["name"]) for f in schema["fields"]}
    logical = {f["name"]: f["type"].get("logicalType") for f in schema["fields"] if isinstance(f["type"], dict)}
    for name, kind in logical.items():
        row |= {"decimal": {name: Decimal(-999)}, "date": {name: date(1, 1, 1)}}.get(kind, {})
        row |= {name: datetime(9999, 12, 31, tzinfo=UTC)} if kind == "timestamp-millis" else {}
    return row


def test_a_process_of_its_own_survives_what_kills_other_readers() -> None:
    """The worst bodies, on the way that users take, in a child whose death would be seen."""
    code = (
        "from tests.core.ingest.test_avro import EVIL, decode\n"
        "for name, schema, body, reason in EVIL:\n"
        "    assert decode(schema, [body]).faults, name\n"
        "print('alive')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "alive"), done.stderr


def test_headers() -> None:
    schemas = MemorySchemas()
    number = schemas.add("rows-value", STRING)
    other = schemas.add("rows-key", 'syntax = "proto3";', kind="PROTOBUF")
    broken = schemas.add("broken-value", "{")
    body = encode(STRING, {"s": "a", "i": 1})
    payloads = [
        framed(number, body), None, b"", b"\0\0\0\0", b"\x01" + framed(number, body)[1:], framed(99, body),
        framed(-1, body), framed(other, body), framed(broken, body), framed(number, b"\x02a" + b"x" * 100),
        framed(number, body),
    ]  # fmt: skip
    block = AvroDecoder(schemas, max_bytes=60).decode(payloads)
    assert block.good.tolist() == [0, 10]
    assert block.rows.to_pylist() == [{"s": "a", "i": 1}] * 2
    assert [block.faults[i] for i in range(1, 10)] == [
        "tombstone: the record has no payload",
        "broken_avro: 0 bytes are too few for the header of five",
        "broken_avro: 4 bytes are too few for the header of five",
        "broken_avro: the first byte is 0x01, not the format's 0x00",
        "unknown_schema: the registry has no schema 99",
        "unknown_schema: the registry has no schema -1",
        "unknown_schema: schema 2 (rows-key version 1) is PROTOBUF, the topic's format is AVRO",
        block.faults[8],
        "broken_avro: 107 bytes; at most 60 are read",
    ]
    assert block.faults[8].startswith(
        "unknown_schema: schema 3 (broken-value version 1) cannot be used: it is not JSON"
    )
    assert block.schema_ids.to_pylist() == [1, None, None, None, None, 99, -1, 2, 3, None, 1]
    assert sorted(schemas.asked) == [1, 2, 3, 99]


def test_each_schema_is_asked_for_once_and_named_in_the_facts() -> None:
    schemas = MemorySchemas()
    number = schemas.add("rows-value", STRING)
    decoder = AvroDecoder(schemas)
    for _ in range(3):
        decoder.decode([framed(number, encode(STRING, {"s": "a", "i": 1})), framed(7, b""), framed(7, b"")])
    assert sorted(schemas.asked) == [1, 7]
    assert decoder.facts == [{"id": 1, "type": "AVRO", "subject": "rows-value", "version": 1}]


def test_a_registry_that_is_down_is_an_error_of_the_run() -> None:
    schemas = MemorySchemas()
    schemas.is_down = True
    with pytest.raises(RegistryUnavailableError):
        AvroDecoder(schemas).decode([framed(1, b"")])


def test_tables_get_values_ids_and_faults_beside_them() -> None:
    schemas = MemorySchemas()
    number = schemas.add("rows-value", STRING)
    payloads = pa.array([b"?", framed(number, encode(STRING, {"s": "a", "i": 1})), None], pa.binary())
    table = pa.table({"_row_id": ["0", "1", "2"], "_payload": payloads})
    found = AvroDecoder(schemas).decode(table["_payload"]).beside(table)
    assert found.column_names == ["_row_id", "_payload", "s", "i", "_schema_id", "_fault"]
    assert found["s"].to_pylist() == [None, "a", None]
    assert found["_schema_id"].type == pa.int32()
    assert [fault is None for fault in found["_fault"].to_pylist()] == [False, True, False]
    nothing = AvroDecoder(schemas).decode(table["_payload"].slice(0, 1)).beside(table.slice(0, 1))
    assert nothing["_fault"].null_count == 0
    assert AvroDecoder(schemas).decode(pa.chunked_array([], pa.binary())).rows.num_rows == 0


def test_slices_and_chunks_and_long_offsets_of_arrow_arrays() -> None:
    schemas = MemorySchemas()
    number = schemas.add("rows-value", STRING)
    payloads = [framed(number, encode(STRING, {"s": str(i), "i": i})) for i in range(50)]
    payloads[7] = payloads[7][:-1]
    expected = AvroDecoder(schemas).decode(payloads)
    whole = pa.array(payloads, pa.binary())
    shapes = [pa.chunked_array([whole.slice(0, 5), whole.slice(5)]), whole.cast(pa.large_binary()), whole.slice(0)]
    for shape in shapes:
        found = AvroDecoder(schemas).decode(shape)
        assert found.rows.equals(expected.rows)
        assert (found.good.tolist(), found.faults) == (expected.good.tolist(), expected.faults)
    assert AvroDecoder(schemas).decode(whole.slice(7, 2)).faults == {0: expected.faults[7]}


def test_rows_of_several_schemas_in_one_block_keep_their_order() -> None:
    schemas = MemorySchemas()
    old, new = record(("id", "int"), ("a", "int")), record(("id", "int"), ("b", "string"))
    ids = schemas.add("rows-value", old), schemas.add("rows-value", new)
    values: list[Json] = [{"id": i, **({"a": i} if i % 3 else {"b": str(i)})} for i in range(20)]
    payloads = [framed(ids[0], encode(old, v)) if "a" in v else framed(ids[1], encode(new, v)) for v in values]
    block = AvroDecoder(schemas).decode(payloads)
    assert block.rows.to_pylist() == [{"id": v["id"], "b": v.get("b"), "a": v.get("a")} for v in values]
    assert block.schema_ids.to_pylist() == [2 if i % 3 == 0 else 1 for i in range(20)]


def test_a_field_of_another_type_is_rejected_unless_it_widens() -> None:
    schemas = MemorySchemas()
    kinds = {kind: schemas.add("rows-value", record(("x", kind))) for kind in ("double", "long", "string")}
    bodies = {"double": encode("double", 1.5), "long": encode("long", 2), "string": encode("string", "s")}
    block = AvroDecoder(schemas).decode([framed(kinds[k], bodies[k]) for k in ("double", "long", "string")])
    assert block.rows.to_pylist() == [{"x": 1.5}, {"x": 2.0}]
    assert "field x is string, earlier rows of this batch have double; name a reader schema" in block.faults[2]


def test_another_kind_of_message_is_told_from_a_new_version() -> None:
    schemas = MemorySchemas()
    decoder = AvroDecoder(schemas, columns=["s", "later"])
    rows, orders = schemas.add("rows-value", STRING), schemas.add("orders-value", record(("total", "int")))
    block = decoder.decode([framed(rows, encode(STRING, {"s": "a", "i": 1})), framed(orders, b"\x02")])
    assert block.good.tolist() == [0]
    assert "none of its fields (total) is a column of the expectations (s, later)" in block.faults[1]


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("[", "it is not JSON"),
        ('"nobody"', "schema: nothing is named 'nobody'"),
        (record(("a", "int"), ("a", "int")), "schema.a: the field is there twice"),
        (record(("a", ["int", ["null"]])), "stands directly in a union"),
        (record(("a", ["int", "int"])), "schema.a: a union has int twice"),
        (record(("e", {"type": "enum", "name": "E", "symbols": []})), "enum 'E' has no symbols"),
        (record(("f", {"type": "fixed", "name": "F", "size": -1})), "fixed 'F' has size -1"),
        ({"type": "record", "name": "R"}, "record 'R' has no list of fields"),
        ("[" * 100_000, "it is not JSON"),
    ],
)
def test_a_schema_that_cannot_be_used_says_where(schema: Any, message: str) -> None:
    with pytest.raises(SchemaFaultError, match=message.replace("(", r"\(").replace("[", r"\[")):
        parse(schema if isinstance(schema, str) else json.dumps(schema))


def test_a_small_schema_cannot_become_a_million_columns() -> None:
    inner: Any = "int"
    for level in range(20):
        inner = record(("a", inner), ("b", f"L{level - 1}" if level else "int"), name=f"L{level}")
    with pytest.raises(SchemaFaultError, match=f"more than {MAX_SCHEMA_NODES} types"):
        parse(json.dumps(inner))
