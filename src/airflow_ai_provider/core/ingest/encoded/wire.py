"""Messages in Confluent's wire format: a zero byte, the schema's id in four bytes, a body → columns, schema by schema.

Invariants: every payload is in exactly one of ``good`` and ``faults``; rows keep their order; what a payload becomes
depends on its own bytes, its schema and the columns that earlier rows fixed, never on its neighbours' bytes; each
schema is asked for once. A registry that does not answer is an error of the run, not of the row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from airflow_ai_provider.core.ingest.column import flags, mask_of, numbers, positions
from airflow_ai_provider.core.ingest.contract import FAULT
from airflow_ai_provider.core.ingest.encoded.registry import RegisteredSchema, Schemas

SCHEMA_ID = "_schema_id"
MAX_PAYLOAD = 16 * 1024 * 1024
MAX_DEPTH = 100
HEADER = 5
SLACK = 16
"""Bytes behind the last body in the buffer that a schema's decoder gets."""

Ints: TypeAlias = npt.NDArray[np.int64]
Payloads: TypeAlias = "Sequence[bytes | None] | pa.Array | pa.ChunkedArray"


@dataclass(frozen=True)
class Bodies:
    """What follows the headers, of messages of one schema.

    :param data: the buffer they lie in, with :data:`SLACK` bytes behind the last one.
    :param starts: where each begins; ``ends`` where it ends; in order, none overlaps the next.
    """

    data: npt.NDArray[np.uint8]
    starts: Ints
    ends: Ints

    def one(self, i: int) -> bytes:
        return self.data[self.starts[i] : self.ends[i]].tobytes()


@dataclass(frozen=True)
class Rows:
    """What the bodies of one schema are.

    :param columns: values of the good bodies, in order.
    :param good: their positions.
    :param faults: position → reason (``<code>: <detail>``) of the others.
    """

    columns: Mapping[str, pa.Array | pa.ChunkedArray]
    good: Ints
    faults: Mapping[int, str]


class BodyDecoder(Protocol):
    """Reads the bodies of one schema."""

    @property
    def types(self) -> Mapping[str, pa.DataType]:
        """The columns that it gives."""

    def decode(self, bodies: Bodies) -> Rows: ...


class SchemaUnusableError(ValueError):
    """A schema that the registry has cannot be used; its rows are rejected with the text.

    :param code: the reason's code.
    """

    def __init__(self, text: str, code: str = "unknown_schema") -> None:
        super().__init__(text)
        self.code = code


@dataclass(frozen=True)
class DecodedBlock:
    """One block of payloads, decoded.

    :param rows: values of the good payloads, in order; no columns when there are none.
    :param good: their positions.
    :param faults: position → why that payload is not a row.
    :param schema_ids: the id in each payload's header; null where there is no header.
    """

    rows: pa.Table
    good: Ints
    faults: Mapping[int, str]
    schema_ids: pa.Array

    def beside(self, table: pa.Table) -> pa.Table:
        """Put the values, ``_schema_id`` and ``_fault`` beside the rows that the payloads came with."""
        count = len(self.schema_ids)
        if len(self.good) != count:
            at = np.zeros(count, np.int64)
            missing = np.ones(count, np.bool_)
            at[self.good], missing[self.good] = np.arange(len(self.good)), False
            values = self.rows.take(positions(at, missing)) if len(self.good) else self._nothing(count)
        else:
            values = self.rows
        for name in values.column_names:
            table = table.append_column(values.schema.field(name), values[name])
        table = table.append_column(SCHEMA_ID, self.schema_ids)
        return table.append_column(FAULT, self._reasons(count))

    def _reasons(self, count: int) -> pa.Array:
        if not self.faults:
            return pa.nulls(count, pa.string())
        reasons: list[str | None] = [None] * count
        for position, reason in self.faults.items():
            reasons[position] = reason
        return pa.array(reasons, pa.string())

    def _nothing(self, count: int) -> pa.Table:
        return pa.table({f.name: pa.nulls(count, f.type) for f in self.rows.schema})


@dataclass
class _Opened:
    """A schema id's decoder, or why its rows are rejected."""

    decoder: BodyDecoder | None
    fault: str = ""


@dataclass
class WireDecoder:
    """Decode blocks of one batch; all into columns of the same types.

    :param schemas: where schemas come from.
    :param open_schema: makes the decoder of a schema (and mark); raises :class:`SchemaUnusableError` when it cannot.
    :param kind: the registry's word for the format: ``AVRO``, ``PROTOBUF``.
    :param broken: reason code of a payload that is not in the format.
    :param max_bytes: a longer payload is rejected before it is read.
    :param columns: columns that the expectations declare; rows of a schema with none of them are rejected, for another
        kind of message has come into the topic. Empty: any schema will do.
    :param split: takes off what stands between header and body and tells bodies of one schema apart: gives a mark for
        each (below 2^31), where it begins, and faults. None: nothing does.
    """

    schemas: Schemas
    open_schema: Callable[[RegisteredSchema, int], BodyDecoder]
    kind: str
    broken: str
    max_bytes: int = MAX_PAYLOAD
    columns: Sequence[str] = ()
    split: Callable[[Bodies], tuple[Ints, Ints, dict[int, str]]] | None = None
    used: dict[int, RegisteredSchema] = field(default_factory=dict)
    _opened: dict[tuple[int, int], _Opened] = field(default_factory=dict)
    _types: dict[str, pa.DataType] = field(default_factory=dict)

    @property
    def facts(self) -> list[dict[str, Any]]:
        """The schemas that rows were decoded with, for the manifest; sorted by id."""
        return [self.used[i].to_dict() for i in sorted(self.used)]

    def decode(self, payloads: Payloads) -> DecodedBlock:
        """Decode one block.

        :raises RegistryUnavailableError: when a schema's text cannot be had; a retry may help.
        """
        blocks = [self._decode(chunk) for chunk in _chunks(payloads)]
        if len(blocks) == 1:
            return blocks[0]
        first = np.cumsum([0] + [len(b.schema_ids) for b in blocks])
        return DecodedBlock(
            pa.concat_tables([b.rows for b in blocks if len(b.good)] or [pa.table({})], promote_options="default"),
            np.concatenate([b.good + at for b, at in zip(blocks, first, strict=False)]),
            {i + int(at): why for b, at in zip(blocks, first, strict=False) for i, why in b.faults.items()},
            pa.concat_arrays([b.schema_ids for b in blocks]),
        )

    def _decode(self, payloads: pa.Array) -> DecodedBlock:
        data, starts, ends = _spread_out(payloads)
        size = ends - starts
        faults: dict[int, str] = {}
        whole = (size > HEADER - 1) & (data[starts] == 0) & (size <= self.max_bytes)
        for i in np.flatnonzero(~whole):
            faults[int(i)] = self._no_header(payloads[int(i)], int(size[i]))
        ids = _ids(data, starts)
        at = np.flatnonzero(whole)
        bodies = Bodies(data, starts[at] + HEADER, ends[at])
        kinds = ids[at].astype(np.int64) << 31
        if self.split is not None:
            marks, begins, broken = self.split(bodies)
            bodies = Bodies(data, begins, bodies.ends)
            faults.update({int(at[i]): reason for i, reason in broken.items()})
            fine = np.ones(len(at), np.bool_)
            fine[list(broken)] = False
            kinds, at, bodies = (kinds | marks)[fine], at[fine], Bodies(data, begins[fine], bodies.ends[fine])
        groups: list[tuple[Ints, Rows]] = []
        for kind in _in_order(kinds):
            mine = np.flatnonzero(kinds == kind)
            places = at[mine]
            opened = self._open(int(kind) >> 31, int(kind) & 0x7FFF_FFFF)
            if opened.decoder is None:
                faults.update(dict.fromkeys(places.tolist(), opened.fault))
                continue
            rows = opened.decoder.decode(Bodies(data, bodies.starts[mine], bodies.ends[mine]))
            faults.update({int(places[i]): reason for i, reason in rows.faults.items()})
            groups.append((places[rows.good], rows))
        table, good = self._together(groups)
        return DecodedBlock(table, good, faults, _nullable(ids, whole))

    def _no_header(self, payload: pa.Scalar, size: int) -> str:
        if not payload.is_valid:
            return "tombstone: the record has no payload"
        if size > self.max_bytes:
            return f"{self.broken}: {size} bytes; at most {self.max_bytes} are read"
        if size < HEADER:
            return f"{self.broken}: {size} bytes are too few for the header of five"
        return f"{self.broken}: the first byte is {payload.as_py()[0]:#04x}, not the format's 0x00"

    def _open(self, schema_id: int, mark: int) -> _Opened:
        if (schema_id, mark) not in self._opened:
            self._opened[schema_id, mark] = self._look_up(schema_id, mark)
        return self._opened[schema_id, mark]

    def _look_up(self, schema_id: int, mark: int) -> _Opened:
        found = find_schema(self.schemas, schema_id, self.kind)
        if isinstance(found, str):
            return _Opened(None, found)
        try:
            decoder = self.open_schema(found, mark)
            self._fix(decoder.types, found)
        except SchemaUnusableError as error:
            return _Opened(None, f"{error.code}: {found} cannot be used: {error}")
        self.used[schema_id] = found
        return _Opened(decoder)

    def _fix(self, types: Mapping[str, pa.DataType], schema: RegisteredSchema) -> None:
        """Hold a schema's columns against those of the batch so far, and add what is new."""
        if self.columns and types and not set(self.columns) & set(types):
            raise SchemaUnusableError(
                f"none of its fields ({', '.join(list(types)[:10])}) is a column of the expectations "
                f"({', '.join(list(self.columns)[:10])})"
            )
        for name, type_ in types.items():
            fixed = self._types.get(name, type_)
            if not (fixed == type_ or pa.types.is_null(type_) or pa.types.is_null(fixed) or _widens(type_, fixed)):
                raise SchemaUnusableError(
                    f"field {name} is {type_}, earlier rows of this batch have {fixed}; name a reader schema"
                )
        for name, type_ in types.items():
            if pa.types.is_null(self._types.get(name, pa.null())):
                self._types[name] = type_

    def _together(self, groups: Sequence[tuple[Ints, Rows]]) -> tuple[pa.Table, Ints]:
        """One table of all groups' rows, in the payloads' order."""
        groups = [(at, rows) for at, rows in groups if len(at)]
        if not groups:
            return pa.table({}), np.zeros(0, np.int64)
        names = list(dict.fromkeys(name for _, rows in groups for name in rows.columns))
        tables = [pa.table({n: self._column(n, rows, len(at)) for n in names}) for at, rows in groups]
        good = np.concatenate([at for at, _ in groups])
        if len(groups) == 1:
            return tables[0], good
        order = np.argsort(good, kind="stable")
        return pa.concat_tables(tables).take(positions(order)), good[order]

    def _column(self, name: str, rows: Rows, count: int) -> pa.Array | pa.ChunkedArray:
        type_ = self._types[name]
        if name not in rows.columns:
            return pa.nulls(count, type_)
        column = rows.columns[name]
        return column if column.type == type_ else column.cast(type_, safe=False)


def find_schema(schemas: Schemas, schema_id: int, kind: str) -> RegisteredSchema | str:
    """Return a schema, or why rows that name it are rejected.

    :param kind: the registry's word for the topic's format.
    :raises RegistryUnavailableError: when the registry did not say; a retry may help.
    """
    found = schemas.schema(schema_id) if schema_id > 0 else None
    if found is None:
        return f"unknown_schema: the registry has no schema {schema_id}"
    if found.kind != kind:
        return f"unknown_schema: {found} is {found.kind}, the topic's format is {kind}"
    return found


def _widens(type_: pa.DataType, fixed: pa.DataType) -> bool:
    return bool(pa.types.is_int64(type_) and pa.types.is_float64(fixed))


def _chunks(payloads: Payloads) -> list[pa.Array]:
    """Arrays of 32-bit offsets, so that positions fit into the spans that are cut from them."""
    if not isinstance(payloads, pa.Array | pa.ChunkedArray):
        payloads = pa.chunked_array([pa.array(payloads, pa.binary())])
    chunks = payloads.chunks if isinstance(payloads, pa.ChunkedArray) else [payloads]
    found = [part for chunk in chunks for part in _narrow(chunk)]
    return found or [pa.array([], pa.binary())]


def _narrow(chunk: pa.Array) -> list[pa.Array]:
    if chunk.type == pa.binary():
        return [chunk]
    if chunk.nbytes < 2**30 or len(chunk) < 2:
        return [chunk.cast(pa.binary())]
    half = len(chunk) // 2
    return [*_narrow(chunk.slice(0, half)), *_narrow(chunk.slice(half))]


def _spread_out(payloads: pa.Array) -> tuple[npt.NDArray[np.uint8], Ints, Ints]:
    """The payloads' bytes in a buffer of our own (theirs may end right behind the last one), and where each lies."""
    _, offsets, values = payloads.buffers()
    count = len(payloads)
    if not count or offsets is None:
        return np.zeros(SLACK, np.uint8), np.zeros(0, np.int64), np.zeros(0, np.int64)
    edges = np.frombuffer(offsets, np.int32)[payloads.offset : payloads.offset + count + 1].astype(np.int64)
    first, last = int(edges[0]), int(edges[-1])
    data = np.zeros(last - first + SLACK, np.uint8)
    if last > first:
        data[: last - first] = np.frombuffer(values, np.uint8)[first:last]
    starts, ends = edges[:-1] - first, edges[1:] - first
    if payloads.null_count:  # a null may lie over bytes of its own
        ends = np.where(mask_of(payloads.is_null()), starts, ends)
    return data, starts, ends


def _nullable(ids: npt.NDArray[np.int32], there: npt.NDArray[np.bool_]) -> pa.Array:
    column = numbers(ids, pa.int32())
    return column if there.all() else pc.if_else(flags(there), column, pa.scalar(None, pa.int32()))


def _ids(data: npt.NDArray[np.uint8], starts: Ints) -> npt.NDArray[np.int32]:
    found = np.zeros(len(starts), np.uint32)
    for i in range(1, HEADER):
        found = (found << np.uint32(8)) | data[starts + i]
    return found.view(np.int32)


def _in_order(kinds: Ints) -> Ints:
    """Each kind once, in order of appearance: that order decides whose column types the batch takes."""
    if len(kinds) and (kinds == kinds[0]).all():
        return kinds[:1]
    found, first = np.unique(kinds, return_index=True)
    ordered: Ints = found[np.argsort(first)]
    return ordered
