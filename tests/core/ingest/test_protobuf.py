"""Protobuf in the wire format: values, index paths, what parsers let through, evolution by number, any bytes."""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from airflow_ai_provider.core.ingest.encoded.protobuf.decoder import ProtobufDecoder
from airflow_ai_provider.core.ingest.encoded.protobuf.schema import ProtoFile
from airflow_ai_provider.core.ingest.encoded.wire import DecodedBlock, SchemaUnusableError
from airflow_ai_provider.errors import RegistryUnavailableError, SpecError
from airflow_ai_provider.testing.registry import MemorySchemas

TEXT = """
syntax = "proto3";
package shop;
import "google/protobuf/timestamp.proto";
import "google/protobuf/wrappers.proto";
import "google/protobuf/struct.proto";
enum Colour { NONE = 0; RED = 1; }
message Order {
  int64 id = 1;
  string name = 2;
  optional double price = 3;
  Colour colour = 4;
  repeated int32 sizes = 5;
  map<string, int64> stock = 6;
  Inner inner = 7;
  google.protobuf.Timestamp at = 8;
  google.protobuf.StringValue note = 9;
  uint64 big = 10;
  bytes raw = 11;
  oneof way { string street = 12; int32 box = 13; }
  Order parent = 14;
  google.protobuf.Struct more = 15;
  bool fine = 16;
  float share = 17;
  message Inner { string x = 1; repeated Deep deep = 2; message Deep { int32 y = 1; } }
}
message Refund { int64 order_id = 1; string name = 2; message Receipt { string x = 1; } }
"""
FILE = ProtoFile(TEXT, {})
ORDER, REFUND = FILE.at((0,)), FILE.at((1,))
EMPTY = {
    "id": 0, "name": "", "price": None, "colour": "NONE", "sizes": [], "stock": [], "inner": None, "at": None,
    "note": None, "big": 0, "raw": b"", "street": None, "box": None, "parent": None, "more": None, "fine": False,
    "share": 0.0,
}  # fmt: skip


def decode(bodies: Sequence[bytes], prefix: bytes = b"\0", text: str = TEXT, **options: Any) -> DecodedBlock:
    schemas = MemorySchemas()
    number = schemas.add("orders-value", text, kind="PROTOBUF")
    return ProtobufDecoder(schemas, **options).decode([framed(number, prefix + body) for body in bodies])


def framed(schema_id: int, body: bytes) -> bytes:
    return b"\0" + struct.pack(">i", schema_id) + body


def test_every_kind_of_field_has_its_value() -> None:
    order = ORDER(id=-5, name="é", price=0.0, colour=1, sizes=[1, -2], stock={"b": 2, "a": 1}, big=2**64 - 1)
    order.inner.x = "in"
    order.inner.deep.add().y = 7
    order.at.FromDatetime(datetime(2026, 11, 22, 1, 2, 3, 456789))
    order.note.value = ""
    order.raw, order.box, order.fine, order.share = b"\xff", 0, True, 1.5
    order.parent.id = 9
    order.more["k"] = [1, "two"]
    block = decode([order.SerializeToString(), b""])
    assert not block.faults
    assert block.rows.to_pylist()[0] == {
        "id": -5, "name": "é", "price": 0.0, "colour": "RED", "sizes": [1, -2], "stock": [("a", 1), ("b", 2)],
        "inner": {"x": "in", "deep": [{"y": 7}]}, "at": datetime(2026, 11, 22, 1, 2, 3, 456789, UTC), "note": "",
        "big": 2**64 - 1, "raw": b"\xff", "street": None, "box": 0, "parent": '{"id": "9"}',
        "more": '{"k": [1.0, "two"]}', "fine": True, "share": 1.5,
    }  # fmt: skip
    assert block.rows.to_pylist()[1] == EMPTY
    assert block.rows.schema.field("big").type == pa.uint64()
    block.rows.validate(full=True)


def test_the_index_path_says_which_message() -> None:
    schemas = MemorySchemas()
    number = schemas.add("orders-value", TEXT, kind="PROTOBUF")
    receipt = FILE.named("shop.Refund.Receipt")(x="deep")
    payloads = [
        framed(number, b"\0" + ORDER(name="a").SerializeToString()),
        framed(number, b"\x02\x00" + ORDER(name="b").SerializeToString()),
        framed(number, b"\x02\x02" + REFUND(order_id=3, name="c").SerializeToString()),
        framed(number, b"\x02\x06"),
        framed(number, b"\x02\x01"),
        framed(number, b"\x80"),
        framed(number, b"\x7f"),
        framed(number, b""),
        framed(number, b"\x04\x02\x00" + receipt.SerializeToString()),
    ]
    block = ProtobufDecoder(schemas).decode(payloads)
    assert block.good.tolist() == [0, 1, 2, 8]
    assert block.rows["name"].to_pylist() == ["a", "b", "c", None]
    assert block.rows["order_id"].to_pylist() == [None, None, 3, None]
    assert block.rows["x"].to_pylist() == [None, None, None, "deep"]
    assert all(reason.startswith("broken_protobuf: ") for reason in block.faults.values())
    assert "it has no message at 3" in block.faults[3]
    assert "it has no message at -1" in block.faults[4]
    assert "index path" in block.faults[5]
    assert "an index path of -64 steps" in block.faults[6]
    assert "index path" in block.faults[7]
    assert schemas.asked.count(number) <= 6  # once for each message type that was named


def test_a_nested_message_that_clients_count_differently_is_refused() -> None:
    """Order.Inner is 0/0 to Java and 0/1 to Python, for Order's map has an entry type of its own."""
    for path in (b"\x04\x00\x00", b"\x04\x00\x02"):
        assert "do not agree which message 0/" in decode([b""], prefix=path).faults[0]


EVIL = [
    ("cut", b"\x12\x05ab", "parsing"),
    ("a gigabyte declared", b"\x12\xff\xff\xff\xff\x04", "parsing"),
    ("a length over 2^63", b"\x12" + b"\xff" * 9 + b"\x01", "parsing"),
    ("not utf-8", b"\x12\x02\xc0\x80", "parsing"),
    ("an end without a group", b"\x0c", "parsing"),
    ("field number 0", b"\x00\x00", "parsing"),
    ("a varint of eleven bytes", b"\x08" + b"\xff" * 11, "parsing"),
    ("an integer sent as text", b"\x0a\x01a", "id: sent as another type (wire type 2)"),
    ("text sent as an integer", b"\x10\x05", "name: sent as another type (wire type 0)"),
    ("an integer sent as text, one level in", b"\x3a\x02\x08\x01", "x: sent as another type"),
    ("a time's seconds sent as text", b"\x42\x03\x0a\x01a", "seconds: sent as another type"),
    ("an enum's unknown number", b"\x20\x09", "colour: 9 is none of Colour"),
    ("a time past the calendar", b"\x42\x07\x08" + b"\xff\xff\xff\xff\xff\x7f", "are no time"),
    ("nanoseconds below 0", b"\x42\x0b\x10" + b"\xff" * 9 + b"\x01", "are no time"),
]


@pytest.mark.parametrize(("body", "reason"), [case[1:] for case in EVIL], ids=[case[0] for case in EVIL])
def test_an_evil_body_is_rejected_alone_and_between_good_ones(body: bytes, reason: str) -> None:
    good = ORDER(id=1, name="fine").SerializeToString()
    assert reason in decode([body]).faults[0]
    block = decode([good, body, good])
    assert list(block.faults) == [1]
    assert block.rows["name"].to_pylist() == ["fine", "fine"]


def test_nesting_without_end_is_rejected() -> None:
    body = b""
    for _ in range(3_000):
        size, length = len(body), b""
        while size > 127:
            length, size = length + bytes([size & 127 | 128]), size >> 7
        body = b"\x72" + length + bytes([size]) + body
    assert list(decode([body, ORDER().SerializeToString()]).faults) == [0]


def test_a_field_that_nobody_knows_is_ignored() -> None:
    assert decode([b"\xf8\x06\x01"]).rows.to_pylist() == [EMPTY]


def test_a_reader_schema_reads_by_number() -> None:
    reader = 'syntax = "proto3"; package shop; message Order { string title = 2; string new = 90; }'
    block = decode([ORDER(id=1, name="a").SerializeToString()], reader_schema=reader)
    assert block.rows.to_pylist() == [{"title": "a", "new": ""}]
    wrong = 'syntax = "proto3"; package shop; message Order { int32 name = 2; }'
    assert "name: sent as another type" in decode([ORDER(name="a").SerializeToString()], reader_schema=wrong).faults[0]
    other = 'syntax = "proto3"; message Other { int32 a = 1; }'
    assert "it has no message shop.Order" in decode([b""], reader_schema=other).faults[0]
    with pytest.raises(SpecError, match="the reader schema cannot be used: protoc refuses it"):
        decode([b""], reader_schema="message {")


def test_schemas_that_cannot_be_used_reject_their_rows() -> None:
    assert "cannot be used: protoc refuses it" in decode([b""], text="nonsense").faults[0]
    missing = 'syntax = "proto3"; import "gone.proto"; message M {}'
    assert "gone.proto" in decode([b""], text=missing).faults[0]
    with pytest.raises(SchemaUnusableError, match="no relative path"):
        ProtoFile(missing, {"../../gone.proto": ""})
    level = " ".join(f"message M{i} {{ M{i + 1} a = 1; M{i + 1} b = 2; }}" for i in range(20))
    bomb = f'syntax = "proto3"; {level} message M20 {{ int32 x = 1; }}'
    assert "more than 10000 fields" in decode([b""], text=bomb).faults[0]


def test_a_schema_that_came_compiled() -> None:
    """As Confluent's Python client registers it: a descriptor in base64, its imports too."""
    inner = 'syntax = "proto3"; package q; message In { int32 a = 1; }'
    main = """syntax = "proto3"; import "in.proto"; import "google/protobuf/timestamp.proto";
        message Out { q.In in = 1; google.protobuf.Timestamp at = 2; }"""
    file = ProtoFile(main, {"in.proto": inner})
    descriptors = [file.named("Out").DESCRIPTOR.file, file.named("q.In").DESCRIPTOR.file]
    text, part = (base64.b64encode(d.serialized_pb).decode() for d in descriptors)
    schemas = MemorySchemas()
    number = schemas.add("x-value", text, kind="PROTOBUF", references={"in.proto": part})
    block = ProtobufDecoder(schemas).decode([framed(number, b"\0\x0a\x02\x08\x05")])
    assert block.rows.to_pylist() == [{"in": {"a": 5}, "at": None}]
    alone = schemas.add("x-value", text, kind="PROTOBUF")
    assert "its descriptor cannot be used" in ProtobufDecoder(schemas).decode([framed(alone, b"\0")]).faults[0]


def test_referenced_files() -> None:
    schemas = MemorySchemas()
    inner = 'syntax = "proto3"; package q; message In { int32 a = 1; }'
    text = 'syntax = "proto3"; import "common/in.proto"; message Out { q.In in = 1; }'
    number = schemas.add("x-value", text, kind="PROTOBUF", references={"common/in.proto": inner})
    block = ProtobufDecoder(schemas).decode([framed(number, b"\0\x0a\x02\x08\x05")])
    assert block.rows.to_pylist() == [{"in": {"a": 5}}]
    assert block.schema_ids.to_pylist() == [number]


def test_facts_and_a_registry_that_is_down() -> None:
    schemas = MemorySchemas()
    number = schemas.add("orders-value", TEXT, kind="PROTOBUF")
    decoder = ProtobufDecoder(schemas)
    decoder.decode([framed(number, b"\0"), framed(9, b"\0"), None, b"x"])
    assert decoder.facts == [{"id": 1, "type": "PROTOBUF", "subject": "orders-value", "version": 1}]
    schemas.is_down = True
    with pytest.raises(RegistryUnavailableError):
        decoder.decode([framed(10, b"\0")])


@given(st.lists(st.binary(max_size=40), min_size=1, max_size=6))
@settings(max_examples=300, deadline=None)
def test_any_bytes_at_all(bodies: list[bytes]) -> None:
    schemas = MemorySchemas()
    number = schemas.add("orders-value", "", kind="PROTOBUF")
    decoder = ProtobufDecoder(schemas)
    decoder._files[number] = FILE  # compiling takes a process
    together = decoder.decode([framed(number, b"\0" + body) for body in bodies])
    assert sorted([*together.good.tolist(), *together.faults]) == list(range(len(bodies)))
    for i, body in enumerate(bodies):
        alone = decoder.decode([framed(number, b"\0" + body)])
        assert alone.faults.get(0) == together.faults.get(i)
        if not alone.faults:
            row = together.good.tolist().index(i)
            assert repr(alone.rows.to_pylist()) == repr(together.rows.slice(row, 1).to_pylist())


@given(st.integers(-(2**63), 2**63 - 1), st.text(max_size=20), st.floats(), st.lists(st.integers(-9, 9), max_size=4))
@settings(max_examples=100, deadline=None)
def test_what_is_written_is_read(number: int, name: str, price: float, sizes: list[int]) -> None:
    body = ORDER(id=number, name=name, price=price, sizes=sizes).SerializeToString()
    schemas = MemorySchemas()
    decoder = ProtobufDecoder(schemas)
    decoder._files[schemas.add("orders-value", "", kind="PROTOBUF")] = FILE
    row = decoder.decode([framed(1, b"\0" + body)]).rows.to_pylist()[0]
    expected = {**EMPTY, "id": number, "name": name, "price": price, "sizes": sizes}
    assert repr(row) == repr(expected)
