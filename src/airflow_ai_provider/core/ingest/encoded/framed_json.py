"""JSON in Confluent's wire format: a zero byte, the schema's id in four bytes, one JSON object.

Invariants: every row of the inner source comes out once; ``_schema_id`` and ``_payload`` are all of what came: the id
is the frame, the payload the JSON text in it; what has no such frame, or one that nobody registered, keeps its bytes
and has ``_fault``. Whether the object fits is for the suite to say: the registered JSON Schema is recorded, not run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from airflow_ai_provider.core.batch import Span
from airflow_ai_provider.core.ingest.contract import FAULT, PAYLOAD, Source
from airflow_ai_provider.core.ingest.encoded.registry import RegisteredSchema, Schemas
from airflow_ai_provider.core.ingest.encoded.source import SourceOver
from airflow_ai_provider.core.ingest.encoded.wire import HEADER, find_schema

_KIND = "JSON"


class FramedJsonSource(SourceOver):
    """Take the frames off what another source reads.

    :param inner: the source of raw rows (``_payload``).
    :param schemas: where schemas come from; each id is asked for once.
    """

    format = "json"

    def __init__(self, inner: Source, schemas: Schemas) -> None:
        super().__init__(inner)
        self._schemas = schemas
        self._used: dict[int, RegisteredSchema] = {}

    @property
    def facts(self) -> dict[str, Any]:
        """What the manifest says about what was read: ids, subjects and versions of its schemas."""
        return {"schemas": [self._used[number].to_dict() for number in sorted(self._used)]} if self._used else {}

    def read(self, span: Span) -> Iterator[pa.Table]:
        """Yield the span's rows without their frames.

        :raises RegistryUnavailableError: when a schema cannot be had; a retry reads the same span.
        """
        for table in self._inner.read(span):
            yield self._unframed(table)

    def _unframed(self, table: pa.Table) -> pa.Table:
        payloads = table[PAYLOAD].combine_chunks()
        heads = pc.binary_slice(payloads, 0, HEADER).dictionary_encode()
        found = [self._read_head(head) for head in heads.dictionary.to_pylist()]
        ids = pa.array([number for number, _ in found], pa.int32()).take(heads.indices)
        faults = pa.array([fault for _, fault in found], pa.string()).take(heads.indices)
        # not binary_slice: of payloads shorter than the frame on the average it asks for less than no memory
        bare = pc.if_else(pc.is_null(faults), pc.binary_replace_slice(payloads, 0, HEADER, b""), payloads)
        at = table.column_names.index(PAYLOAD)
        return table.set_column(at, PAYLOAD, bare).append_column("_schema_id", ids).append_column(FAULT, faults)

    def _read_head(self, head: bytes) -> tuple[int | None, str | None]:
        """A frame's schema id, and why the frame is none."""
        if len(head) < HEADER:
            return None, f"broken_json: {len(head)} bytes are too few for the header of five"
        if head[0]:
            return None, f"broken_json: the first byte is {head[0]:#04x}, not the format's 0x00"
        number = int.from_bytes(head[1:], signed=True)
        found = self._used.get(number) or find_schema(self._schemas, number, _KIND)
        if isinstance(found, str):
            return number, found
        self._used[number] = found
        return number, None
