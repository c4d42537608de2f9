"""The rows of K1, V1 and S1: twelve columns, ten expectations, and what breaks them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

SITES = ["north", "south", "east", "west"]
SCHEMA = {
    "reading_id": "string",
    "device": "string",
    "site": "string",
    "taken_at": "timestamp",
    "temperature": "float64",
    "humidity": "float64",
    "pressure": "float64",
    "count": "int64",
    "sequence": "int64",
    "valid": "bool",
    "note": "string",
    "operator": "string",
}
BROKEN = 1000  # one in so many is malformed
INVALID = 100  # one in so many breaks an expectation


def _rule(kind: str, column: str, **kwargs: Any) -> dict[str, Any]:
    name = kind if kind.startswith("expect_") else f"expect_column_values_to_{kind}"
    return {"type": name, "kwargs": {"column": column, **kwargs}}


RULES = [
    _rule("not_be_null", "reading_id"),
    _rule("match_regex", "reading_id", regex="^reading-[0-9]{9}$"),
    _rule("match_regex", "device", regex="^device-[0-9]{5}$"),
    _rule("be_in_set", "site", value_set=SITES),
    _rule("be_between", "taken_at", min_value="2020-01-01T00:00:00", max_value="2030-01-01T00:00:00"),
    _rule("be_between", "temperature", min_value=-40, max_value=60),
    _rule("be_between", "humidity", min_value=0, max_value=100),
    _rule("be_between", "count", min_value=0, max_value=1_000_000),
    _rule("expect_column_value_lengths_to_be_between", "operator", min_value=1, max_value=60),
    _rule("not_be_null", "valid"),
]
SUITE = {
    "name": "readings",
    "expectations": [*(_rule("be_of_type", c, type_=t) for c, t in SCHEMA.items()), *RULES],
}
_BREAKS: list[dict[str, Any]] = [
    {"temperature": 900.5},
    {"site": "up", "humidity": -1.0},
    {"device": "?"},
    {"valid": None},
    {"count": -5, "operator": ""},
]


def reading(i: int, chance: random.Random) -> dict[str, Any]:
    """Make one row; one in a hundred breaks an expectation or two."""
    row = {
        "reading_id": f"reading-{i:09d}",
        "device": f"device-{chance.randrange(5000):05d}",
        "site": SITES[i * 7 % 4],
        "taken_at": f"2026-01-{1 + i % 28:02d}T{i % 24:02d}:{i % 60:02d}:{i % 59:02d}.{i % 1000:03d}Z",
        "temperature": round(chance.gauss(20, 5), 3),
        "humidity": round(chance.random() * 100, 2),
        "pressure": round(chance.gauss(1013, 8), 2),
        "count": chance.randrange(100_000),
        "sequence": i,
        "valid": chance.random() < 0.98,
        "note": None if i % 3 else "by hand",
        "operator": f"op {chance.randrange(200)}",
    }
    return {**row, **_BREAKS[i // INVALID % len(_BREAKS)]} if is_invalid(i) else row


def is_invalid(i: int) -> bool:
    """Tell whether row ``i`` breaks an expectation."""
    return i % INVALID == INVALID // 2 and not is_broken(i)


def is_broken(i: int) -> bool:
    """Tell whether message ``i`` is malformed."""
    return i % BROKEN == BROKEN // 4


def payloads(count: int) -> Iterator[bytes]:
    """Make the messages: compact JSON, one in a thousand cut, not JSON, not UTF-8 or with trailing bytes."""
    chance = random.Random(1)
    for i in range(count):
        text = json.dumps(reading(i, chance), separators=(",", ":")).encode()
        yield (text[:60], b"none", text[:-2] + b"\xff}", text + b" x")[i // BROKEN % 4] if is_broken(i) else text
