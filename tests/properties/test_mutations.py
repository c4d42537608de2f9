"""Valid payloads, some of them spoiled by chance, through the whole of ingest: JSON, Avro and Protobuf.

A spoiled payload is accepted with just the values that another reader finds in it, or quarantined byte for byte; the
whole ones beside it keep theirs; and what becomes of a payload does not depend on those that it came with.
"""

from __future__ import annotations

import io
import json
import math
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fastavro
import pytest

from airflow_ai_provider.core.batch import ACCEPTED, QUARANTINE
from airflow_ai_provider.core.ingest.contract import Source
from airflow_ai_provider.core.ingest.encoded.protobuf.schema import ProtoFile
from airflow_ai_provider.core.ingest.encoded.source import open_encoded
from airflow_ai_provider.core.ingest.flow import IngestRun, ingest
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.testing import MemoryLedger, MemorySource, RuleValidator
from airflow_ai_provider.testing.registry import MemorySchemas

TYPES = {"i": "int64", "f": "float64", "s": "string", "b": "bool"}
FIELDS = [{"name": n, "type": t} for n, t in (("i", "long"), ("f", "double"), ("s", "string"), ("b", "boolean"))]
AVRO = {"type": "record", "name": "Row", "fields": FIELDS}
PROTO = """
syntax = "proto3";
message Row { int64 i = 1; double f = 2; string s = 3; bool b = 4; }
"""
MESSAGE = ProtoFile(PROTO, {}).at((0,))
SCHEMAS = MemorySchemas()
AVRO_ID, PROTO_ID = SCHEMAS.add("avro-value", AVRO), SCHEMAS.add("proto-value", PROTO, kind="PROTOBUF")
PARSED = fastavro.parse_schema(AVRO)
Row = dict[str, Any]


@dataclass(frozen=True)
class Format:
    """How rows are written, read by somebody else, and taken by us."""

    write: Callable[[Row], bytes]
    read: Callable[[bytes], Row]
    source: Callable[[MemorySource], Source]


def write_avro(row: Row) -> bytes:
    sink = io.BytesIO()
    fastavro.schemaless_writer(sink, PARSED, row)
    return b"\0" + struct.pack(">i", AVRO_ID) + sink.getvalue()


def read_avro(payload: bytes) -> Row:
    rest = io.BytesIO(payload[5:])
    row = fastavro.schemaless_reader(rest, PARSED)
    assert not rest.read()
    return row  # type: ignore[return-value]


def write_proto(row: Row) -> bytes:
    return b"\0" + struct.pack(">i", PROTO_ID) + b"\0" + MESSAGE(**row).SerializeToString()


def read_proto(payload: bytes) -> Row:
    assert payload[5] in (0, 2), "the index path of the first message"
    found = MESSAGE.FromString(payload[6 if payload[5] == 0 else 7 :])
    return {name: getattr(found, name) for name in TYPES}


def read_json(payload: bytes) -> Row:
    found = json.loads(payload.decode())
    return {name: found.get(name) for name in TYPES}


FORMATS = {
    "json": Format(lambda row: json.dumps(row).encode(), read_json, lambda rows: rows),
    "avro": Format(write_avro, read_avro, lambda rows: open_encoded(rows, "avro", SCHEMAS)),
    "protobuf": Format(write_proto, read_proto, lambda rows: open_encoded(rows, "protobuf", SCHEMAS)),
}


def some_row(chance: random.Random) -> Row:
    text = "".join(chance.choices(["a", "\u00e9", "\U0001f600", '"', "\\", "{", "\n", "0"], k=chance.randrange(8)))
    number = chance.choice([0, 1, -1, 2**31, -(2**63), 2**63 - 1, chance.randrange(10**6)])
    return {"i": number, "f": chance.choice([0.0, -0.5, 1e300, chance.random()]), "s": text, "b": chance.random() < 0.5}


def spoil(payload: bytes, other: bytes, chance: random.Random) -> bytes:
    """One small thing goes wrong, now and then two."""
    at, way = chance.randrange(len(payload) + 1), chance.randrange(7)
    spoiled = [
        payload[:at],
        payload[:at] + chance.randbytes(1) + payload[at:],
        payload[:at] + payload[at + 1 :],
        payload[:at] + other[at:],
        payload + other[: chance.randrange(3)],
        payload[:at] + payload[chance.randrange(len(payload) + 1) :],
        bytes(b ^ (1 << chance.randrange(8)) if n == at else b for n, b in enumerate(payload)),
    ][way]
    return spoil(spoiled, other, chance) if spoiled and chance.random() < 0.2 else spoiled


def take(payloads: list[bytes], kind: Format, folder: Path) -> dict[int, Row | tuple[bytes, list[str]]]:
    """What became of each payload: its values, or its bytes and the reasons."""
    source, store = kind.source(MemorySource({0: payloads})), Store(str(folder))
    rules = RuleValidator(schema=TYPES)
    ref = ingest(source, rules, store, MemoryLedger(), IngestRun("p", "r", "k"))
    found: dict[int, Row | tuple[bytes, list[str]]] = {}
    for row in (row for table in store.read(ref, ACCEPTED) for row in table.to_pylist()):
        found[row["_offset"]] = {name: row[name] for name in TYPES}
    for row in (row for table in store.read(ref, QUARANTINE) for row in table.to_pylist()):
        found[row["_offset"]] = (row["_payload"], row["_reasons"])
    assert ref.counts["read"] == len(payloads) == len(found)
    return found


def same(ours: Row, theirs: Row) -> bool:
    return all(
        a == b or (isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b))
        for a, b in ((ours[name], theirs[name]) for name in TYPES)
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", FORMATS)
def test_spoiled_payloads_are_read_exactly_or_quarantined(name: str, seed: int, tmp_path: Path) -> None:
    chance, kind = random.Random(seed), FORMATS[name]
    rows = [some_row(chance) for _ in range(1500)]
    payloads, whole = [kind.write(row) for row in rows], set(range(0, len(rows), 3))
    for at in set(range(len(rows))) - whole:
        payloads[at] = spoil(payloads[at], payloads[at - 1], chance)
    found = take(payloads, kind, tmp_path / "together")
    for at, payload in enumerate(payloads):
        became = found[at]
        if at in whole:
            assert became == rows[at]
        elif isinstance(became, tuple):
            assert became[0] == payload
            assert became[1]
        else:
            assert same(became, kind.read(payload)), (payload, became)
    counts = [sum(isinstance(became, kind_) for became in found.values()) for kind_ in (dict, tuple)]
    assert min(counts) > 200, "both kinds of end are met"

    order = [*range(len(payloads))]
    chance.shuffle(order)
    apart = take([payloads[at] for at in order], kind, tmp_path / "apart")
    assert all(repr(apart[place]) == repr(found[at]) for place, at in enumerate(order))
