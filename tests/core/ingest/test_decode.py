"""Decoding: every rule of json_rows and typed_rows, with payloads made to break parsers, and their bytes kept."""

from __future__ import annotations

import datetime as dt
import json
from typing import Any

import pyarrow as pa
import pytest

from airflow_ai_provider.core.ingest.decode import RowDecoder
from airflow_ai_provider.core.ingest.json_rows import MAX_DEPTH, MAX_PAYLOAD
from airflow_ai_provider.errors import SpecError

ALL = {"i": "int64", "f": "float64", "s": "string", "b": "bool", "t": "timestamp", "j": "json"}


def block(*payloads: bytes | None) -> pa.Table:
    ids = [f"r{i}" for i in range(len(payloads))]
    return pa.table({"_row_id": ids, "_payload": pa.array(payloads, pa.binary())})


def one(payload: bytes | None, schema: dict[str, str] | None = None) -> dict[str, Any] | list[str]:
    """The decoded row, or the reasons why it is none; its bytes are kept either way."""
    decoded = RowDecoder(ALL if schema is None else schema, "json").decode(block(payload))
    assert decoded.accepted.num_rows + decoded.rejected.num_rows == 1
    kept = decoded.accepted if decoded.accepted.num_rows else decoded.rejected
    assert kept["_payload"].to_pylist() == [payload]
    if decoded.rejected.num_rows:
        assert decoded.rejected["_stage"].to_pylist() == ["decode"]
        reasons: list[str] = decoded.rejected["_reasons"].to_pylist()[0]
        return reasons
    row: dict[str, Any] = decoded.accepted.to_pylist()[0]
    return row


DEEP = b"[" * 10_000 + b"]" * 10_000
BROKEN = {
    "null": b"null",
    "array": b"[1]",
    "number": b"1",
    "empty": b"",
    "blank": b" \n",
    "two objects": b'{"i":1}{"i":2}',
    "half of a pair": b'{"i":1},{"i":2',
    "trailing bytes": b'{"i":1} x',
    "trailing NUL": b'{"i":1}\x00',
    "trailing comma": b'{"i":1,}',
    "cut": b'{"i":1',
    "NaN": b'{"f":NaN}',
    "Infinity": b'{"f":-Infinity}',
    "byte order mark": b'\xef\xbb\xbf{"i":1}',
    "UTF-16": '{"i":1}'.encode("utf-16"),
    "gzip": b"\x1f\x8b\x08\x00\x00",
    "invalid UTF-8": b'{"s":"\xff"}',
    "overlong UTF-8": b'{"s":"\xc0\xaf"}',
    "surrogate as UTF-8": b'{"s":"\xed\xa0\x80"}',
    "lone surrogate": b'{"s":"\\ud800"}',
    "lone surrogate in an unknown field": b'{"z":"\\ud800"}',
    "invalid UTF-8 in an unknown field": b'{"z":"\xff"}',
    "invalid UTF-8 in a key": b'{"\xff":1}',
    "raw newline in a text": b'{"s":"a\nb"}',
    "leading zero": b'{"i":01}',
    "deep": b'{"j":' + DEEP + b"}",
    "deep in an unknown field": b'{"z":' + DEEP + b"}",
    "deep and never closed": b'{"j":' + b'{"a":' * 100_000,
    "too large": b'{"s":"' + b"x" * MAX_PAYLOAD + b'"}',
}


@pytest.mark.parametrize("name", sorted(BROKEN))
def test_what_is_not_one_json_object_is_quarantined_with_its_bytes(name: str) -> None:
    for schema in (ALL, {"i": "int64", "f": "float64", "s": "string"}, {}):
        reasons = one(BROKEN[name], schema)
        assert isinstance(reasons, list), f"{name} was accepted under {schema}"
        assert [r.partition(":")[0] for r in reasons] == ["broken_json"]


def test_a_tombstone_is_quarantined_without_bytes() -> None:
    assert one(None) == ["tombstone: the record has no payload"]


MISFITS = [
    *(("i", text) for text in ("1.0", "1e3", "true", '"1"', "[]")),
    *(("i", text) for text in ("9223372036854775808", "-9223372036854775809", "1" * 40)),
    *(("f", text) for text in ('"1"', "true", "1e999", "{}")),
    *(("s", text) for text in ("1", "true", "[]", "{}")),
    *(("b", text) for text in ("1", '"true"', "0")),
    *(("t", text) for text in ("1", '"2020-01-01"', '"now"')),
    *(("t", text) for text in ('"9999-12-31T23:59:59-10:00"', '"0001-01-01T00:00:00+23:00"')),
]


@pytest.mark.parametrize(("column", "text"), MISFITS)
def test_a_misfit_is_wrong_type_and_names_column_value_and_type(column: str, text: str) -> None:
    reasons = one(f'{{"{column}":{text}}}'.encode())
    assert isinstance(reasons, list)
    assert len(reasons) == 1
    assert reasons[0].startswith(f"wrong_type: {column}={text} is not {ALL[column]} (")


FITS = [
    ("i", "9223372036854775807", 2**63 - 1),
    ("i", "-9223372036854775808", -(2**63)),
    ("i", "-0", 0),
    ("i", "null", None),
    ("f", "1", 1.0),
    ("f", "9007199254740993", 2.0**53),
    ("f", "-0.0", -0.0),
    ("f", "1e-999", 0.0),
    ("s", '"\\u0000 \\ud83d\\ude00"', "\0 😀"),
    ("b", "false", False),
    ("t", '"2020-01-01T02:00:00+02:00"', dt.datetime(2020, 1, 1, tzinfo=dt.UTC)),
    ("t", '"2020-01-01T00:00:00"', dt.datetime(2020, 1, 1, tzinfo=dt.UTC)),
    ("j", '{"a": [1, 2.50]}', '{"a": [1, 2.50]}'),
    ("j", "1e999", "1e999"),
    ("j", "null", None),
]


@pytest.mark.parametrize(("column", "text", "value"), FITS)
def test_what_fits_has_its_value(column: str, text: str, value: Any) -> None:
    row = one(f' {{"{column}" : {text}}} \n'.encode())
    assert isinstance(row, dict)
    assert repr(row[column]).replace("zoneinfo.ZoneInfo(key='UTC')", "datetime.timezone.utc") == repr(value)
    assert row["_extra"] is None
    assert all(row[other] is None for other in ALL if other != column)


def test_all_misfits_of_a_row_are_named() -> None:
    reasons = one(b'{"i":"x","f":true,"s":"fine"}')
    assert [r.split("=")[0] for r in reasons] == ["wrong_type: i", "wrong_type: f"]


def test_the_last_of_doubled_keys_counts_on_every_path() -> None:
    for extra in (b"", b',"z":0'):
        row = one(b'{"i":"x","i":1,"\\u0069":2' + extra + b"}")
        assert isinstance(row, dict)
        assert row["i"] == 2


def test_unknown_fields_and_reserved_names_are_kept_as_their_own_text() -> None:
    decoder = RowDecoder(ALL, "json")
    assert decoder.decode(block(b"{}")).accepted["_extra"].to_pylist() == [None]
    row = decoder.decode(block(b'{"i":1,"z":[1, 2.50],"_row_id":"forged","":null}')).accepted.to_pylist()[0]
    assert row["_row_id"] == "r0"
    assert row["_extra"] == '{"z":[1, 2.50],"_row_id":"forged","":null}'


def test_depth_counts_nesting_not_brackets_in_texts() -> None:
    assert isinstance(one(b'{"s":"' + b"[" * 5000 + b'","j":' + b"[" * 99 + b"]" * 99 + b"}"), dict)
    assert isinstance(one(b'{"j":' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}"), list)
    assert isinstance(one(b'{"j":[' + b"{}," * 5000 + b'"\\"["]}'), dict)


def test_a_10_mb_text_is_a_value() -> None:
    row = one(b'{"s":"' + b"x" * 10_000_000 + b'"}')
    assert isinstance(row, dict)
    assert len(row["s"]) == 10_000_000


def test_columns_that_nobody_declared_are_found_in_the_first_block() -> None:
    decoder = RowDecoder({}, "json")
    first = decoder.decode(
        block(b'{"i":1,"f":1,"s":"x","m":1,"o":{},"big":9223372036854775808,"n":null}', b'{"f":2.5,"m":"x","b":true}')
    )
    assert decoder.columns == {
        "i": "int64", "f": "float64", "s": "string", "m": "json", "o": "json", "big": "json", "n": "json", "b": "bool",
    }  # fmt: skip
    assert first.accepted["big"].to_pylist() == ["9223372036854775808", None]
    later = decoder.decode(block(b'{"i":"x"}', b'{"new":1}'))
    assert later.accepted.schema == first.accepted.schema
    assert later.accepted["_extra"].to_pylist() == ['{"new":1}']
    assert later.rejected["_reasons"].to_pylist()[0][0].startswith('wrong_type: i="x" is not int64')


def test_columns_wait_for_the_first_row_that_fits() -> None:
    decoder = RowDecoder({}, "json")
    decoder.decode(block(b"x", None))
    assert decoder.decode(block(b'{"a":1}')).accepted["a"].to_pylist() == [1]


def test_declared_columns_without_a_type_exist_even_when_no_row_has_them() -> None:
    decoded = RowDecoder({"a": "", "b": "int64"}, "json").decode(block(b'{"a":1.5,"c":"x"}', b'{"b":2}'))
    assert decoded.accepted.column_names == ["_row_id", "a", "b", "c", "_extra", "_payload"]
    assert decoded.accepted["a"].to_pylist() == [1.5, None]
    assert RowDecoder({"a": ""}, "json").decode(block(b"{}")).accepted["a"].to_pylist() == [None]


def test_a_million_random_keys_make_no_million_columns() -> None:
    payloads = [json.dumps({f"k{i}": i}).encode() for i in range(3000)]
    decoded = RowDecoder({}, "json").decode(block(*payloads))
    assert decoded.accepted.num_rows == 3000
    assert decoded.accepted.num_columns <= 1003
    assert decoded.accepted["_extra"][2999].as_py() == '{"k2999":2999}'


def test_no_evil_payload_shifts_its_neighbours() -> None:
    payloads: list[bytes | None] = []
    for number, evil in enumerate([*BROKEN.values(), None, b'{"i":1.5}', b'{"z":1}', b'{"i":3,"i":4}']):
        payloads += [json.dumps({"i": number, "s": f"before {number}"}).encode(), evil]
    decoded = RowDecoder(ALL, "json").decode(block(*payloads))
    assert decoded.accepted.num_rows + decoded.rejected.num_rows == len(payloads)
    for row in decoded.accepted.to_pylist():
        at = int(row["_row_id"][1:])
        assert payloads[at] == row["_payload"]
        if at % 2 == 0:
            assert (row["i"], row["s"]) == (at // 2, f"before {at // 2}")
    for row in decoded.rejected.to_pylist():
        assert row["_payload"] == payloads[int(row["_row_id"][1:])]


@pytest.mark.parametrize("schema", [{"a": "int"}, {"_row_id": "string"}, {"": "string"}])
def test_a_schema_that_cannot_be_used_is_refused(schema: dict[str, str]) -> None:
    with pytest.raises(SpecError, match="row schema"):
        RowDecoder(schema, "json")


def typed(format: str, schema: dict[str, str], **columns: Any) -> tuple[list[dict[str, Any]], dict[str, list[str]], pa.Table]:  # fmt: skip  # noqa: E501
    count = len(next(iter(columns.values())))
    rows = pa.table({"_row_id": [f"r{i}" for i in range(count)], **columns})
    decoded = RowDecoder(schema, format).decode(rows)
    rejected = dict(zip(decoded.rejected["_row_id"].to_pylist(), decoded.rejected["_reasons"].to_pylist(), strict=True))
    return decoded.accepted.to_pylist(), rejected, decoded.rejected


def test_csv_texts_become_values_or_name_themselves() -> None:
    texts = {
        "int64": (["1", "-2", None], ["1.0", "+1", "0x10", "9223372036854775808", " 1", "١"]),
        "float64": (["1", "1e3", "-.5", None], ["nan", "inf", "1,5", "x", "0x1p3"]),
        "bool": (["true", "FALSE", "0", None], ["yes", "2"]),
        "timestamp": (
            ["2020-01-01T00:00:00Z", "2020-01-01", "2020-01-01T02:00:00+02:00", None],
            ["1577836800", "noon"],
        ),
        "string": (["x", None], []),
    }
    for kind, (good, bad) in texts.items():
        accepted, rejected, table = typed("csv", {"a": kind}, a=pa.array([*good, *bad], pa.string()))
        assert len(accepted) == len(good), kind
        assert list(rejected) == [f"r{i}" for i in range(len(good), len(good) + len(bad))]
        assert all(r[0].startswith("wrong_type: a=") for r in rejected.values())
        assert [json.loads(p)["a"] for p in table["_payload"].to_pylist()] == bad
    times, _, _ = typed("csv", {"a": "timestamp"}, a=texts["timestamp"][0][:3])
    assert {row["a"].isoformat() for row in times} == {"2020-01-01T00:00:00+00:00"}


def test_csv_columns_that_nobody_declared_are_numbers_when_all_cells_are() -> None:
    accepted, _, _ = typed(
        "csv", {}, i=["1", None], f=["1", "2.5"], s=["1", "x"], n=pa.array([None, None], pa.string())
    )
    assert accepted[0] == {"_row_id": "r0", "i": 1, "f": 1.0, "s": "1", "n": None, "_extra": None}


@pytest.mark.parametrize(
    ("column", "kind", "value"),
    [
        (pa.array([1], pa.int32()), "int64", 1),
        (pa.array([2**60 + 1]), "float64", 2.0**60),
        (pa.array([dt.date(2020, 1, 1)]), "timestamp", dt.datetime(2020, 1, 1, tzinfo=dt.UTC)),
        (pa.nulls(1), "string", None),
        (pa.array(["x"], pa.large_string()), "string", "x"),
    ],
)
def test_typed_columns_are_widened(column: pa.Array, kind: str, value: Any) -> None:
    accepted, rejected, _ = typed("columns", {"a": kind}, a=column)
    assert rejected == {}
    assert accepted[0]["a"] == value


@pytest.mark.parametrize(
    ("column", "kind"),
    [(pa.array([1.0, None]), "int64"), (pa.array(["1", None]), "int64"), (pa.array([1, None]), "string"), (pa.array([1, None]), "bool")],  # noqa: E501
)  # fmt: skip
def test_typed_columns_are_never_converted_to_another_kind(column: pa.Array, kind: str) -> None:
    accepted, rejected, _ = typed("columns", {"a": kind}, a=column)
    assert list(rejected) == ["r0"]
    assert [row["_row_id"] for row in accepted] == ["r1"]


def test_a_value_out_of_range_is_the_only_one_rejected() -> None:
    accepted, rejected, _ = typed("columns", {"a": "int64"}, a=pa.array([1, 2**64 - 1, 3], pa.uint64()))
    assert ([r["a"] for r in accepted], list(rejected)) == ([1, 3], ["r1"])


def test_rows_at_fault_keep_their_own_bytes_and_others_get_theirs_as_json() -> None:
    rows = pa.table(
        {
            "_row_id": ["r0", "r1", "r2"],
            "_payload": pa.array([None, b"1;2;3", None], pa.binary()),
            "_fault": pa.array([None, "broken_csv: 1 cells, the header has 2", None], pa.string()),
            "a": ["x", None, "1"],
            "b": ["é", None, "y"],
        }
    )
    rejected = RowDecoder({"a": "int64"}, "csv").decode(rows).rejected
    assert dict(zip(rejected["_row_id"].to_pylist(), rejected["_payload"].to_pylist(), strict=True)) == {
        "r1": b"1;2;3",
        "r0": '{"a":"x","b":"é"}'.encode(),
    }


def test_columns_of_later_blocks_follow_the_first() -> None:
    decoder = RowDecoder({}, "columns")
    decoder.decode(pa.table({"_row_id": ["r0"], "a": [1], "b": ["x"]}))
    later = decoder.decode(pa.table({"_row_id": ["r1", "r2"], "a": pa.array([None, 2.5]), "c": [[1], [2]]}))
    assert later.accepted.to_pylist() == [{"_row_id": "r1", "a": None, "b": None, "_extra": '{"c":[1]}'}]
    assert later.rejected["_reasons"].to_pylist() == [["wrong_type: a=2.5 is not int64"]]
