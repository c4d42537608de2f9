"""Avro payloads, written by another library and read by ours."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Sequence
from typing import Any

import fastavro
import pyarrow as pa

from airflow_ai_provider.core.ingest.encoded.avro.decoder import AvroBodies, AvroDecoder
from airflow_ai_provider.core.ingest.encoded.avro.schema import parse
from airflow_ai_provider.core.ingest.encoded.wire import Bodies, DecodedBlock, _spread_out
from airflow_ai_provider.testing.registry import MemorySchemas

Json = dict[str, Any]


def record(*fields: tuple[str, Any] | Json, name: str = "Row") -> Json:
    listed = [f if isinstance(f, dict) else {"name": f[0], "type": f[1]} for f in fields]
    return {"type": "record", "name": name, "fields": listed}


def encode(schema: Any, value: Any) -> bytes:
    sink = io.BytesIO()
    fastavro.schemaless_writer(sink, fastavro.parse_schema(schema), value)
    return sink.getvalue()


def framed(schema_id: int, body: bytes) -> bytes:
    return b"\0" + struct.pack(">i", schema_id) + body


def decode(schema: Any, bodies: Sequence[bytes], **options: Any) -> DecodedBlock:
    schemas = MemorySchemas()
    number = schemas.add("rows-value", schema)
    return AvroDecoder(schemas, **options).decode([framed(number, body) for body in bodies])


def both_ways(schema: Any, bodies: Sequence[bytes], max_depth: int = 100) -> tuple[list[Json], dict[int, str]]:
    """Decode by column and row by row, show that it is the same, and return it."""
    data, starts, ends = _spread_out(pa.array(bodies, pa.binary()))
    found = []
    for by_column in (True, False):
        decoder = AvroBodies(parse(json.dumps(schema)), None, max_depth, by_column=by_column)
        rows = decoder.decode(Bodies(data, starts, ends))
        table = pa.table(dict(rows.columns))
        assert {f.name: f.type for f in table.schema} == dict(decoder.types)
        table.validate(full=True)
        found.append((repr(table.to_pylist()), rows.good.tolist(), dict(rows.faults), table))
    assert found[0][:3] == found[1][:3]
    return found[0][3].to_pylist(), found[0][2]
