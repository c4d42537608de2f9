"""JSON by shape: what it decides is what the strict path says; what it does not decide, that path reads."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from airflow_ai_provider.core.ingest.digit import REACH, Text, Values, read_float64, read_int64, read_timestamp
from airflow_ai_provider.core.ingest.json_rows import JsonRows
from airflow_ai_provider.core.ingest.json_shape import MAX_SHAPES, ShapeReader, learn

COLUMNS = {"id": "string", "n": "int64", "x": "float64", "at": "timestamp", "ok": "bool", "more": "string"}
TIMES = """
    2026-01-31T23:59:59Z 2026-01-31T23:59:59.123456Z 2024-02-29T00:00:00.5 2026-01-31T23:59:59+00:00
    2026-01-31T23:59:59.1+00:00 0001-01-01T00:00:00Z 9999-12-31T23:59:59.999999Z 1969-07-20T20:17:40
    2026-02-29T00:00:00Z 2026-01-31T23:59:59.1234567Z 2026-01-31T23:59:60Z 2026-13-01T00:00:00Z 2026-00-10T00:00:00Z
    2026-01-00T00:00:00Z 2026-01-01T24:00:00Z 2026-01-01T00:60:00Z 0000-01-01T00:00:00Z 2026-01-31
    2026-01-31T23:59:59.Z 2026-01-31T23:59:59+02:00 2026-01-31t23:59:59Z 2026-01-31T23:59:59.5+00:0 Z
"""
VALUES = {
    "id": ['"a"', '""', '"ü€😀"', '"a b, c: {d} [e]"', '"\\u00e4"', '"\\""', '"\\\\"', '"\t"', '"null"', '"\x7f"'],
    "n": [
        "0",
        "-0",
        "7",
        "-12345678",
        "123456789",
        "9223372036854775807",
        "-9223372036854775808",
        "00",
        "-",
        "+1",
        "9223372036854775808",
        "99999999999999999999",
        "1.0",
        "1e3",
        "12345678901234567",
        "0x1",
        "1_0",
    ],
    "x": [
        "0",
        "-0.0",
        "1",
        "1.5",
        "-12345678.12345678",
        "0.1",
        "1e5",
        "1E-5",
        "1.",
        ".5",
        "01.5",
        "1.5.5",
        "1e999",
        "0.30000000000000004",
        "123456789.5",
        "123456789",
        "12345678x5",
        "99999999.99999999",
        "nan",
        "Infinity",
        "-inf",
        "90071992.54740993",
        "90071992.54740992",
        "2.2250738585072014e-308",
        "1e",
        "--1",
        "5e-324",
        "0.123456789",
    ],
    "at": [f'"{time}"' for time in TIMES.split()],
    "ok": ["true", "false", "True", "1", "tru", "truee", '"true"', "falsey"],
    "more": ['"x"', "{}", "[1]", '{"a":"b"}', "7"],
}
ANY = ["null", '"7"', "7", "true", "nul", "nulls", "{", '"', "", "[]"]


def same(payloads: Sequence[bytes | None], columns: dict[str, str] | None = None) -> None:
    """Both paths give the same rows, values, extra fields and reasons."""
    rows = JsonRows(columns or COLUMNS)
    for _ in range(2):  # the second time, the shapes are known
        fast, slow = rows.decode(payloads), rows.decode_slowly(payloads)
        assert fast.faults == slow.faults
        assert fast.extras == slow.extras
        for name, values in slow.columns.items():
            assert _bits(fast.columns[name]) == _bits(values), name
            fast.columns[name].validate(full=True)


def _bits(column: pa.Array) -> list[object]:
    """Values that tell -0.0 from 0.0."""
    return [repr(value) if isinstance(value, float) else value for value in column.to_pylist()]


def plain(number: int) -> dict[str, object]:
    at = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=number * 37.001)
    made = {"id": f"row {number}", "n": number * 7919 - 50, "x": number / 8, "at": at.isoformat()}
    return {**made, "ok": number % 3 == 0, "more": None if number % 5 else "ümlaut"}


def compact(row: dict[str, object]) -> bytes:
    return json.dumps(row, separators=(",", ":"), ensure_ascii=False).encode()


def decided(payloads: Sequence[bytes | None], columns: dict[str, str] | None = None) -> list[int]:
    found = ShapeReader(columns or COLUMNS).read(pa.array(payloads, pa.binary()))
    return sorted(int(at) for rows in found for at in rows.at)


@st.composite
def objects(draw: st.DrawFn) -> bytes:
    """An object, in one of few shapes, with a value of any kind at one place or two."""
    names = draw(st.sampled_from([list(COLUMNS), list(COLUMNS)[::-1], ["n", "x"], [*COLUMNS, "unknown"], ["id", "id"]]))
    gap = draw(st.sampled_from([",", ", ", " ,"]))
    values = {name: VALUES.get(name, ["1"])[0] for name in names}
    for name in draw(st.lists(st.sampled_from(names), max_size=2)):
        values[name] = draw(st.sampled_from([*VALUES.get(name, []), *ANY]))
    text = (
        "{"
        + gap.join(f'"{name}":{values[name]}' for name in names)
        + draw(st.sampled_from(["}"] * 9 + ["} ", "", "}}"]))
    )
    return text.encode()


@st.composite
def broken(draw: st.DrawFn) -> bytes:
    """An object with a byte changed, left out or put in."""
    payload, byte = bytearray(draw(objects())), draw(st.integers(0, 255))
    at = draw(st.integers(0, len(payload) - 1))
    payload[at : at + draw(st.integers(0, 1))] = bytes([byte] * draw(st.integers(0, 1)))
    return bytes(payload)


@given(st.lists(st.one_of(objects(), objects(), broken(), st.none(), st.binary(max_size=12)), max_size=40))
@settings(max_examples=150, deadline=None)
@example([b'{"n":1,"x":12345678x5}', b'{"n":1,"x":123456789}', b'{"n":1,"x":2}'])
@example([compact(plain(1)), compact(plain(1))[:-1], compact(plain(1)) + b"}", b"", None])
def test_both_paths_say_the_same(payloads: list[bytes | None]) -> None:
    same(payloads)


@pytest.mark.parametrize("column", COLUMNS)
def test_each_text_of_each_column_is_read_alike_among_plain_rows(column: str) -> None:
    rows = [compact(plain(i)) for i in range(20)]
    texts = [*VALUES[column], *ANY]
    odd = ["{" + ",".join(f'"{n}":{t if n == column else VALUES[n][0]}' for n in COLUMNS) + "}" for t in texts]
    same([payload for text in odd for payload in (rows[len(text) % 20], text.encode("utf-8"))])


@given(st.floats(-1e307, 1e307), st.integers(0, 17))
@settings(max_examples=300, deadline=None)
def test_a_number_is_rounded_to_the_nearest(value: float, places: int) -> None:
    texts = [repr(value), f"{value:.{places}f}", f"{value:.{places}e}", repr(round(value, places))]
    found, fits = _read(read_float64, texts)
    assert fits == [len(text) <= 400 for text in texts]
    assert [repr(f) for f, text in zip(found, texts, strict=True)] == [repr(float(text)) for text in texts]


@given(st.integers(-(2**63) + 1, 2**63 - 1))
def test_an_integer_is_exact(value: int) -> None:
    assert _read(read_int64, [str(value), str(value // 10**9)]) == ([value, value // 10**9], [True, True])


@given(st.datetimes(datetime(1, 1, 1), datetime(9999, 12, 31)), st.sampled_from(["Z", "", "+00:00"]))
def test_a_time_is_exact(at: datetime, zone: str) -> None:
    found, fits = _read(read_timestamp, [at.isoformat() + zone, f"{at.replace(microsecond=0).isoformat()}{zone}"])
    since = at - datetime(1970, 1, 1)
    assert fits == [True, True]
    assert found == [s // timedelta(microseconds=1) for s in (since, since - timedelta(microseconds=at.microsecond))]


def _read(read: object, texts: Sequence[str]) -> tuple[list[object], list[bool]]:
    body = "|".join(texts).encode()
    data = np.frombuffer(b"\0" * REACH + body + b"\0" * 4 * REACH, np.uint8)
    text = Text(data, np.empty(len(data), np.bool_))
    sizes = np.array([len(text) for text in texts])
    starts = REACH + np.cumsum(sizes + 1) - 1 - sizes
    more = [np.ones(len(texts), np.bool_)] if read is read_float64 else []
    values, fits = read(Values(text, text.window(starts - 3, 3 + REACH), 3, starts, sizes), *more)  # type: ignore[operator]
    return values.tolist(), fits.tolist()


def test_rows_of_one_producer_are_all_decided() -> None:
    payloads = [compact(plain(i)) for i in range(3000)]
    assert decided(payloads) == list(range(3000))
    assert decided([json.dumps(plain(i), ensure_ascii=False).encode() for i in range(300)]) == list(range(300))
    same(payloads)


@pytest.mark.parametrize("last", ["more", "n"])
def test_texts_of_any_length_end_at_their_own_quote(last: str) -> None:
    columns = {"id": "string", last: COLUMNS[last]}
    rows = [{"id": "x" * size, last: "y" * (300 - size) if last == "more" else 10**17} for size in range(300)]
    payloads = [compact(row) for row in rows]
    assert decided(payloads, columns) == list(range(300))
    same([*payloads, payloads[0][:-3], b'{"id":"' + b"x" * 200, *payloads[::-1]], columns)


def test_some_shapes_side_by_side_keep_the_rows_in_order() -> None:
    chance = random.Random(5)
    rows = [plain(i) for i in range(4000)]
    orders = [list(COLUMNS), list(COLUMNS)[::-1], ["n", "id", "x"]]
    payloads = [compact({name: row[name] for name in chance.choice(orders)}) for row in rows]
    assert decided(payloads) == list(range(4000))
    same(payloads)


def test_escapes_control_characters_and_nested_values_are_left_to_the_other_path() -> None:
    good = compact(plain(3))
    odd = [good.replace(b"row 3", text) for text in (b"row\\n", b"row\t3", b"\xff", b"\xed\xa0\x80")]
    odd.append(good.replace(b'"row 3"', b'{"a":"b"}'))
    payloads = [payload for bad in odd for payload in (good, good, bad)]
    assert decided(payloads) == [i for i in range(len(payloads)) if i % 3 < 2]
    same(payloads)


def test_a_broken_first_row_hides_no_shape() -> None:
    payloads = [b"{", b"none", *(compact(plain(i)) for i in range(50))]
    assert decided(payloads) == list(range(2, 52))


def test_objects_of_too_many_shapes_are_read_one_by_one() -> None:
    chance = random.Random(6)
    payloads = [
        compact({name: plain(i)[name] for name in chance.sample(list(COLUMNS), len(COLUMNS))}) for i in range(400)
    ]
    reader = ShapeReader(COLUMNS)
    column = pa.array(payloads, pa.binary())
    assert 0 < sum(len(rows.at) for rows in reader.read(column)) <= 400
    assert reader.read(column) == []
    assert len(payloads) > MAX_SHAPES
    same(payloads)


@pytest.mark.parametrize(
    "payload",
    [
        *(b"{}", b"", b"[1]", b'{"n":1,"n":2}', b'{"n":1,"z":2}', b'{"n":[1]}', b'{"n":1', b'{"n":1}x', b'{"n":1,}'),
        *(b'{,"n":1}', b'{"n":1{"x":2}', b'{"' + b"n" * 2000 + b'":1}', b'{"n":1,"x":}'),
    ],
)
def test_no_shape_is_learned_from(payload: bytes) -> None:
    assert learn(payload, COLUMNS) is None


@pytest.mark.parametrize("odd", [b'{"n":1,"x":"', b"{", b'"' * 60, compact(plain(1))[:-1] + b',"id":"a"}'])
def test_a_row_that_leads_astray_may_be_the_first_or_the_last_or_alone(odd: bytes) -> None:
    rows = [compact(plain(i)) for i in range(3)]
    for payloads in ([odd, *rows], [*rows, odd], [odd, *rows, odd], [odd]):
        reader = JsonRows(COLUMNS)
        reader.decode(rows)  # the shape is known
        fast, slow = reader.decode(payloads), reader.decode_slowly(payloads)
        assert fast.faults == slow.faults
        assert all(fast.columns[name].equals(slow.columns[name]) for name in COLUMNS)


def test_a_slice_of_a_block_is_read_where_it_lies() -> None:
    payloads = [compact(plain(i)) for i in range(40)]
    whole = pa.array([b"xx", None, *payloads, b'"'], pa.binary())
    rows = JsonRows(COLUMNS).decode(whole.slice(2, 40))
    assert rows.columns["id"].to_pylist() == [f"row {i}" for i in range(40)]
    assert JsonRows(COLUMNS).decode(whole).faults.keys() == {0, 1, 42}
