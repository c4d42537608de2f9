"""Avro read by another schema than it was written by: evolutions, defaults, what does not go together."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

import fastavro
import pytest

from airflow_ai_provider.core.ingest.encoded.avro.decoder import AvroDecoder
from airflow_ai_provider.core.ingest.encoded.wire import DecodedBlock
from airflow_ai_provider.errors import SpecError
from airflow_ai_provider.testing.registry import MemorySchemas
from tests.core.ingest.avro_rows import Json, decode, encode, framed, record


def read_as(writer: Any, reader: Any, values: Sequence[Any]) -> DecodedBlock:
    return decode(writer, [encode(writer, v) for v in values], reader_schema=json.dumps(reader))


def fastavro_reads(writer: Any, reader: Any, value: Any) -> Any:
    sink = io.BytesIO(encode(writer, value))
    return fastavro.schemaless_reader(sink, fastavro.parse_schema(writer), fastavro.parse_schema(reader))


NESTED = record(("r", record(("a", "int"), ("gone", "string"), name="In")))
EVOLUTIONS: list[tuple[Any, Any, list[Json]]] = [
    (record(("a", "int"), ("b", "string")), record(("b", "string")), [{"a": 1, "b": "x"}]),
    (record(("a", "int")), record(("a", "long"), {"name": "n", "type": "int", "default": 7}), [{"a": 1}]),
    (record(("a", "int")), record({"name": "z", "type": "double", "aliases": ["a"]}), [{"a": 1}]),
    (record(("a", "long")), record(("a", "double")), [{"a": 16777217}, {"a": 2**53 + 1}]),
    (record(("a", "float")), record(("a", "double")), [{"a": 0.5}]),
    (record(("a", "string")), record(("a", "bytes")), [{"a": "é"}]),
    (record(("a", "bytes")), record(("a", "string")), [{"a": b"ok"}]),
    (record(("a", "int")), record(("a", ["null", "long"])), [{"a": 1}]),
    (record(("a", ["null", "int"])), record(("a", ["null", "double"])), [{"a": 1}, {"a": None}]),
    (record(("a", ["null", "int"])), record(("a", ["int", "null"])), [{"a": 1}, {"a": None}]),
    (
        record(("e", {"type": "enum", "name": "E", "symbols": ["a", "b", "c"]})),
        record(("e", {"type": "enum", "name": "E", "symbols": ["c", "a"], "default": "a"})),
        [{"e": "a"}, {"e": "b"}, {"e": "c"}],
    ),
    (
        NESTED,
        record(("r", record(("a", "double"), {"name": "n", "type": ["null", "int"], "default": None}, name="In"))),
        [{"r": {"a": 1, "gone": "x"}}],
    ),
    (
        record(("l", {"type": "array", "items": "int"}), ("o", ["null", NESTED["fields"][0]["type"]])),
        record(("l", {"type": "array", "items": "double"}), ("o", ["null", record(("a", "int"), name="In")])),
        [{"l": [1, 2], "o": None}, {"l": [], "o": {"a": 5, "gone": ""}}],
    ),
    (
        record(("a", "int")),
        record(("a", "int"), {"name": "l", "type": {"type": "array", "items": "int"}, "default": [1, 2]}),
        [{"a": 1}, {"a": 2}],
    ),
]


@pytest.mark.parametrize(("writer", "reader", "values"), EVOLUTIONS)
def test_reading_by_another_schema_is_as_fastavro_does_it(writer: Any, reader: Any, values: list[Json]) -> None:
    block = read_as(writer, reader, values)
    assert not block.faults
    assert block.rows.to_pylist() == [fastavro_reads(writer, reader, v) for v in values]


def test_an_integer_read_as_float_is_rounded_to_one() -> None:
    """As the specification's float has 24 bits; fastavro keeps the integer."""
    block = read_as(record(("a", "long")), record(("a", "float")), [{"a": 16777217}])
    assert block.rows.to_pylist() == [{"a": 16777216.0}]


def test_defaults_have_the_value_that_they_mean() -> None:
    """Where fastavro gives the raw JSON: bytes as text, a date as a number, a decimal as text."""
    cents = {"type": "bytes", "logicalType": "decimal", "precision": 4, "scale": 2}
    reader = record(
        ("a", "int"),
        {"name": "b", "type": "bytes", "default": "\u00ff"},
        {"name": "d", "type": {"type": "int", "logicalType": "date"}, "default": 1},
        {"name": "s", "type": cents, "default": "\u0001"},
        {"name": "m", "type": {"type": "map", "values": "int"}, "default": {"k": 1}},
        {"name": "u", "type": ["null", "int", "string"], "default": None},
        {"name": "r", "type": record(("x", "int"), {"name": "y", "type": "int", "default": 4}, name="D"),
         "default": {"x": 3}},
    )  # fmt: skip
    block = read_as(record(("a", "int")), reader, [{"a": 1}])
    expected = {
        "a": 1, "b": b"\xff", "d": date(1970, 1, 2), "s": Decimal("0.01"), "m": [("k", 1)], "u": None,
        "r": {"x": 3, "y": 4},
    }  # fmt: skip
    assert block.rows.to_pylist() == [expected]


def test_rows_that_the_reader_cannot_hold_are_rejected_one_by_one() -> None:
    writer = record(
        ("a", ["null", "int", "string"]),
        ("e", {"type": "enum", "name": "E", "symbols": ["x", "y"]}),
        ("b", "bytes"),
        ("l", {"type": "array", "items": ["null", "int"]}),
        ("o", ["null", record(("i", ["null", "int"]), name="In")]),
    )
    reader = record(
        ("a", "int"),
        ("e", {"type": "enum", "name": "E", "symbols": ["x"]}),
        ("b", "string"),
        ("l", {"type": "array", "items": "int"}),
        ("o", ["null", record(("i", "int"), name="In")]),
    )
    fine = {"a": 1, "e": "x", "b": b"t", "l": [1, 2], "o": {"i": 1}}
    faulty: list[Mapping[str, Any]] = [
        {"a": None}, {"a": "text"}, {"e": "y"}, {"b": b"\xff"}, {"l": [1, None]}, {"o": {"i": None}},
    ]  # fmt: skip
    values = [fine, *({**fine, **change} for change in faulty), {**fine, "o": None, "l": []}]
    block = read_as(writer, reader, values)
    assert block.good.tolist() == [0, 7]
    assert set(block.faults) == {1, 2, 3, 4, 5, 6}
    assert all(reason.startswith("schema_mismatch: ") for reason in block.faults.values())
    assert block.rows.to_pylist() == [{**fine, "b": "t"}, {**fine, "b": "t", "o": None, "l": []}]


def test_a_number_may_take_or_lose_its_meaning() -> None:
    plain, stamped = record(("t", "long")), record(("t", {"type": "long", "logicalType": "timestamp-millis"}))
    at = datetime(2026, 1, 1, tzinfo=UTC)
    ms = int(at.timestamp() * 1000)
    assert read_as(plain, stamped, [{"t": ms}, {"t": 2**60}]).rows.to_pylist() == [{"t": at}]
    assert read_as(stamped, plain, [{"t": at}]).rows.to_pylist() == [{"t": ms}]
    day = record(("t", {"type": "int", "logicalType": "date"}))
    assert read_as(day, plain, [{"t": date(1970, 1, 3)}]).rows.to_pylist() == [{"t": 2}]


@pytest.mark.parametrize(
    ("writer", "reader", "reason"),
    [
        (record(("a", "int")), record(("b", "int")), "Row.b: the writer has no such field, and it has no default"),
        (record(("a", "string")), record(("a", "int")), "Row.a: string cannot be read as int"),
        (record(("a", "double")), record(("a", "long")), "Row.a: double cannot be read as long"),
        (record(("a", "int"), name="A"), record(("a", "int"), name="B"), "record A is neither B nor one of its"),
        (
            record(("a", "int")),
            record(("a", "int"), {"name": "d", "type": "int", "default": "x"}),
            "Row.d: the default 'x' does not fit",
        ),
        (
            record(("t", {"type": "long", "logicalType": "timestamp-millis"})),
            record(("t", {"type": "long", "logicalType": "timestamp-micros"})),
            "Row.t: long (timestamp-millis) cannot be read as long (timestamp-micros)",
        ),
    ],
)
def test_schemas_that_do_not_go_together_reject_every_row_with_the_field(writer: Any, reader: Any, reason: str) -> None:
    schemas = MemorySchemas()
    number = schemas.add("rows-value", writer)
    block = AvroDecoder(schemas, json.dumps(reader)).decode([framed(number, b""), framed(number, b"\x02")])
    assert block.faults[0] == block.faults[1]
    assert block.faults[0].startswith("unknown_schema: schema 1 (rows-value version 1) cannot be used: ")
    assert reason in block.faults[0]


def test_a_reader_schema_that_is_none_fails_before_any_row() -> None:
    with pytest.raises(SpecError, match="the reader schema cannot be used: it is not JSON"):
        AvroDecoder(MemorySchemas(), "{")


def test_referenced_types() -> None:
    schemas = MemorySchemas()
    inner = json.dumps({**record(("x", "int"), name="Inner"), "namespace": "n"})
    number = schemas.add("rows-value", record(("r", "n.Inner"), ("s", "n.Inner")), references={"n.Inner": inner})
    assert AvroDecoder(schemas).decode([framed(number, b"\x02\x04")]).rows.to_pylist() == [
        {"r": {"x": 1}, "s": {"x": 2}}
    ]
