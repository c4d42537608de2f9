"""Avro messages in Confluent's wire format → columns: whole blocks at once, and a doubtful body by itself.

Invariants: a body is either exactly a value of its schema or rejected (the rules are those of :mod:`.avro_row`, which
judges every body that the columns leave undecided); both ways give the same value. Only numpy, Arrow and Python read
the bytes: there is no native Avro parser that a message could crash or make allocate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from airflow_ai_provider.core.ingest.column import flags, positions
from airflow_ai_provider.core.ingest.encoded.avro.block import can_read, read_bodies
from airflow_ai_provider.core.ingest.encoded.avro.evolve import Convert, resolve
from airflow_ai_provider.core.ingest.encoded.avro.row import BodyFaultError, read_body
from airflow_ai_provider.core.ingest.encoded.avro.schema import Record, SchemaFaultError, arrow_type, parse
from airflow_ai_provider.core.ingest.encoded.avro.values import array_of
from airflow_ai_provider.core.ingest.encoded.registry import RegisteredSchema, Schemas
from airflow_ai_provider.core.ingest.encoded.wire import (
    MAX_DEPTH,
    MAX_PAYLOAD,
    Bodies,
    DecodedBlock,
    Ints,
    Payloads,
    Rows,
    SchemaUnusableError,
    WireDecoder,
)
from airflow_ai_provider.errors import SpecError

BROKEN = "broken_avro"


class AvroDecoder:
    """Decode the Avro messages of one batch, all into the same columns; rows of different schemas may be mixed.

    Without a reader schema, columns are those of the schemas met so far: a field that only some have is null elsewhere,
    and a schema whose field has another type than earlier rows is rejected. With one, every row is read by Avro's rules
    of schema resolution: what it does not name is dropped, defaults fill in.

    :param registry: where schemas come from.
    :param reader_schema: Avro schema (JSON text) to read all rows by.
    :param max_bytes: a longer payload is rejected.
    :param max_depth: records, lists, maps and unions nested deeper are rejected.
    :param columns: the columns that the expectations declare; a schema with none of them is rejected.
    :raises SpecError: when the reader schema cannot be used; a retry does not help.
    """

    def __init__(
        self,
        registry: Schemas,
        reader_schema: str | None = None,
        *,
        max_bytes: int = MAX_PAYLOAD,
        max_depth: int = MAX_DEPTH,
        columns: Sequence[str] = (),
    ) -> None:
        self._reader = _parse_reader(reader_schema) if reader_schema else None
        self._max_depth = max_depth
        self._wire = WireDecoder(registry, self._open, "AVRO", BROKEN, max_bytes, columns)

    @property
    def facts(self) -> list[dict[str, Any]]:
        """Ids, subjects and versions of the schemas that rows were decoded with."""
        return self._wire.facts

    def decode(self, payloads: Payloads) -> DecodedBlock:
        """Decode one block of payloads.

        :param payloads: bytes, or None for a tombstone; a list or an Arrow array.
        :raises RegistryUnavailableError: when a schema cannot be had; a retry may help.
        """
        return self._wire.decode(payloads)

    def _open(self, schema: RegisteredSchema, _: int) -> AvroBodies:
        try:
            return AvroBodies(parse(schema.text, schema.references), self._reader, self._max_depth)
        except SchemaFaultError as error:
            raise SchemaUnusableError(str(error)) from error


class AvroBodies:
    """Decode bodies of one writer's schema.

    :param writer: the schema they were written by.
    :param reader: the schema to read them by; None: the writer's.
    :param by_column: read blocks by column where the schema allows; tests switch it off to compare.
    """

    def __init__(self, writer: Record, reader: Record | None, max_depth: int, *, by_column: bool = True) -> None:
        self._writer, self._max_depth = writer, max_depth
        self._by_column = by_column and bool(writer.fields) and can_read(writer)
        self._convert: Convert | None = resolve(writer, reader) if reader else None
        self._schema = arrow_type(reader or writer)

    @property
    def types(self) -> Mapping[str, pa.DataType]:
        """The columns that it gives."""
        return {f.name: f.type for f in self._schema}

    def decode(self, bodies: Bodies) -> Rows:
        """Read every body; each is a row or at fault."""
        count = len(bodies.starts)
        if self._by_column:
            table, decided = read_bodies(self._writer, bodies.data, bodies.starts, bodies.ends)
            if decided.all():
                return self._evolved(dict(zip(table.column_names, table.columns, strict=True)), np.arange(count), {})
            fast = {name: table[name] for name in table.column_names}
        else:
            fast, decided = {}, np.zeros(count, np.bool_)
        values, at, faults = self._row_by_row(bodies, np.flatnonzero(~decided))
        if not len(at) and fast:
            return self._evolved(fast, np.flatnonzero(decided), faults)
        slow = {
            field.name: array_of(field.node, [row[i] for row in values], (self._writer,))
            for i, field in enumerate(self._writer.fields)
        }
        good = np.concatenate([np.flatnonzero(decided), at])
        order = np.argsort(good, kind="stable")
        columns = {name: _joined(fast.get(name), slow[name], order) for name in slow}
        return self._evolved(columns, good[order], faults)

    def _row_by_row(self, bodies: Bodies, rows: Ints) -> tuple[list[tuple[Any, ...]], Ints, dict[int, str]]:
        values, at, faults = [], [], {}
        for i in rows.tolist():
            try:
                values.append(read_body(self._writer, bodies.one(i), self._max_depth))
                at.append(i)
            except BodyFaultError as error:
                faults[i] = f"{BROKEN}: {error}"
        return values, np.array(at, np.int64), faults

    def _evolved(self, columns: Mapping[str, pa.ChunkedArray], good: Ints, faults: dict[int, str]) -> Rows:
        if self._convert is None:
            return Rows(columns, good, faults)
        chunks = [c.combine_chunks() if isinstance(c, pa.ChunkedArray) else c for c in columns.values()]
        flat = [pa.concat_arrays(c.chunks) if isinstance(c, pa.ChunkedArray) else c for c in chunks]
        written = arrow_type(self._writer)
        struct = pa.StructArray.from_arrays(flat, fields=list(written)) if flat else pa.array([{}] * len(good), written)
        made, bad = self._convert(struct)
        read = dict(zip(self.types, made.flatten(), strict=True))
        if not bad.any():
            return Rows(read, good, faults)
        keep = flags(~bad)
        reason = "schema_mismatch: a value of the writer's schema is none of the reader's (null, symbol or type)"
        return Rows(
            {name: column.filter(keep) for name, column in read.items()},
            good[~bad],
            {**faults, **dict.fromkeys(good[bad].tolist(), reason)},
        )


def _joined(fast: pa.ChunkedArray | None, slow: pa.Array, order: Ints) -> pa.ChunkedArray:
    if fast is None or not len(fast):
        return pa.chunked_array([slow], slow.type)
    if not len(slow):
        return fast
    return pa.chunked_array([*fast.chunks, slow]).take(positions(order))


def _parse_reader(text: str) -> Record:
    try:
        return parse(text)
    except SchemaFaultError as error:
        raise SpecError(
            f"the reader schema cannot be used: {error}. Correct it; the registry's own text of a version will do.",
            faults=[("reader_schema", str(error))],
        ) from error
