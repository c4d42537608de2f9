"""Protobuf messages in Confluent's wire format → columns.

Decided once:

- A field that has presence (a message, ``optional``, a oneof's) and is absent is null; any other has its default.
- Integers are int64 (``uint64`` and ``fixed64`` uint64), floats float64, an enum its name, a repeated field a list, a
  map a map, a message a struct; a message that contains itself is JSON text where it does.
- ``google.protobuf.Timestamp`` is a timestamp in microseconds (finer digits are cut); a wrapper (``StringValue`` …) is
  its value or null.
- A field that the schema does not know is ignored, as Protobuf means it. One that it knows, sent as another wire type
  (which parsers take for an unknown field and so for the default), is ``broken_protobuf``; so is an enum's number
  without a name, text that is not UTF-8, a time outside the years 1 to 9999, and nesting deeper than 100.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet

from airflow_ai_provider.core.ingest.encoded.protobuf.schema import ProtoFile
from airflow_ai_provider.core.ingest.encoded.registry import RegisteredSchema, Schemas
from airflow_ai_provider.core.ingest.encoded.wire import (
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

BROKEN = "broken_protobuf"
MAX_COLUMNS = 10_000
_MAX_PATH = 32
_FIRST_S, _LAST_S = -62_135_596_800, 253_402_300_799  # the years 1 to 9999, in seconds from 1970
_WRAPPERS = {f"google.protobuf.{n}Value" for n in ("Double", "Float", "Int64", "UInt64", "Int32", "UInt32", "Bool")}
_WRAPPERS |= {"google.protobuf.StringValue", "google.protobuf.BytesValue"}
_TIMESTAMP = "google.protobuf.Timestamp"

Read: TypeAlias = Callable[[Any], Any]
"""A value as protobuf has it → as Arrow takes it."""


class _MisfitError(ValueError):
    """A message's value is none."""


class ProtobufDecoder:
    """Decode the Protobuf messages of one batch; rows of different schemas and message types may be mixed.

    Columns are those of the message types met so far: a field that only some have is null elsewhere, and a type whose
    field has another type than earlier rows is rejected.

    :param registry: where schemas come from.
    :param reader_schema: ``.proto`` text to read all rows by (fields go by number); it has the messages' own names.
        Its imports are the well-known types at most.
    :param max_bytes: a longer payload is rejected.
    :param columns: the columns that the expectations declare; a message type with none of them is rejected.
    :raises SpecError: when the reader schema cannot be used; a retry does not help.
    :raises MissingExtraError: when protoc is not installed; a retry does not help.
    """

    def __init__(
        self,
        registry: Schemas,
        reader_schema: str | None = None,
        *,
        max_bytes: int = MAX_PAYLOAD,
        columns: Sequence[str] = (),
    ) -> None:
        self._reader = _read_reader(reader_schema) if reader_schema else None
        self._files: dict[int, ProtoFile] = {}
        self._paths: list[tuple[int, ...]] = [(0,)]
        self._wire = WireDecoder(registry, self._open, "PROTOBUF", BROKEN, max_bytes, columns, self._split)

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

    def _split(self, bodies: Bodies) -> tuple[Ints, Ints, dict[int, str]]:
        """Read which message of the file each body is: most begin with one zero byte, the first message."""
        first = (bodies.ends > bodies.starts) & (bodies.data[bodies.starts] == 0)
        marks, starts = np.zeros(len(first), np.int64), bodies.starts + 1
        faults: dict[int, str] = {}
        known = {path: mark for mark, path in enumerate(self._paths)}
        for i in np.flatnonzero(~first).tolist():
            try:
                path, size = _read_path(bodies.one(i))
            except _MisfitError as error:
                faults[i] = f"{BROKEN}: {error}"
                continue
            if path not in known:
                known[path] = len(self._paths)
                self._paths.append(path)
            marks[i], starts[i] = known[path], bodies.starts[i] + size
        return marks, starts, faults

    def _open(self, schema: RegisteredSchema, mark: int) -> ProtobufBodies:
        if schema.id not in self._files:
            self._files[schema.id] = ProtoFile(schema.text, schema.references)
        message = self._files[schema.id].at(self._paths[mark])
        if self._reader is not None:
            message = self._reader.named(message.DESCRIPTOR.full_name)
        return ProtobufBodies(message)


class ProtobufBodies:
    """Decode messages of one type.

    :param message: its class.
    :raises SchemaUnusableError: when its columns, written out, are too many.
    """

    def __init__(self, message: Any) -> None:
        self._message = message
        self._row = _Row(message.DESCRIPTOR, (), [MAX_COLUMNS])

    @property
    def types(self) -> Mapping[str, pa.DataType]:
        """The columns that it gives."""
        return dict(zip(self._row.names, self._row.types, strict=True))

    def decode(self, bodies: Bodies) -> Rows:
        """Read every body; each is a row or at fault."""
        parse, read = self._message.FromString, self._row.values
        values, good, faults = [], [], {}
        for i in range(len(bodies.starts)):
            try:
                values.append(read(parse(bodies.one(i))))
                good.append(i)
            except (DecodeError, _MisfitError, UnicodeDecodeError) as error:
                faults[i] = f"{BROKEN}: {error}"
        columns = [[row[k] for row in values] for k in range(len(self._row.names))]
        arrays = (pa.array(column, type_) for column, type_ in zip(columns, self._row.types, strict=True))
        return Rows(dict(zip(self._row.names, arrays, strict=True)), np.array(good, np.int64), faults)


class _Row:
    """How the fields of a message type are read."""

    def __init__(self, descriptor: Descriptor, within: tuple[str, ...], budget: list[int]) -> None:
        self._numbers = frozenset(descriptor.fields_by_number)
        within = (*within, descriptor.full_name)
        fields = [(field, *_plan(field, within, budget)) for field in descriptor.fields]
        self.names = [field.name for field, _, _ in fields]
        self.types = [type_ for _, _, type_ in fields]
        self.type = pa.struct([pa.field(n, t) for n, t in zip(self.names, self.types, strict=True)])
        self._reads = [(f.name, read, f.has_presence and not _is_repeated(f)) for f, read, _ in fields]

    def values(self, message: Any) -> list[Any]:
        _demand_wire_types(message, self._numbers)
        return [
            None if presence and not message.HasField(name) else read(getattr(message, name))
            for name, read, presence in self._reads
        ]

    def struct(self, message: Any) -> dict[str, Any]:
        return dict(zip(self.names, self.values(message), strict=True))


def _plan(field: FieldDescriptor, within: tuple[str, ...], budget: list[int]) -> tuple[Read, pa.DataType]:
    budget[0] -= 1
    if budget[0] < 0:
        raise SchemaUnusableError(f"written out it has more than {MAX_COLUMNS} fields")
    if not _is_repeated(field):
        return _plan_one(field, within, budget)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        parts = field.message_type.fields_by_name
        key, key_type = _plan_one(parts["key"], within, budget)
        value, value_type = _plan_one(parts["value"], within, budget)
        return lambda found: [(key(k), value(v)) for k, v in sorted(found.items())], pa.map_(key_type, value_type)
    item, type_ = _plan_one(field, within, budget)
    return lambda found: [item(v) for v in found], pa.list_(type_)


def _plan_one(field: FieldDescriptor, within: tuple[str, ...], budget: list[int]) -> tuple[Read, pa.DataType]:
    if field.message_type is None:
        return _plan_scalar(field)
    name = field.message_type.full_name
    if name == _TIMESTAMP:
        return _microseconds, pa.timestamp("us", tz="UTC")
    if name in _WRAPPERS:
        inner, type_ = _plan_scalar(field.message_type.fields_by_name["value"])
        return lambda message: inner(_checked(message).value), type_
    if name in within or (name.startswith("google.protobuf.") and _contains_itself(field.message_type, ())):
        return _json, pa.string()
    row = _Row(field.message_type, within, budget)
    return row.struct, row.type


def _plan_scalar(field: FieldDescriptor) -> tuple[Read, pa.DataType]:
    kind = field.cpp_type
    if kind == FieldDescriptor.CPPTYPE_ENUM:
        return _enum_reader(field), pa.string()
    types = {
        FieldDescriptor.CPPTYPE_UINT64: pa.uint64(),
        FieldDescriptor.CPPTYPE_FLOAT: pa.float64(),
        FieldDescriptor.CPPTYPE_DOUBLE: pa.float64(),
        FieldDescriptor.CPPTYPE_BOOL: pa.bool_(),
        FieldDescriptor.CPPTYPE_STRING: pa.binary() if field.type == FieldDescriptor.TYPE_BYTES else pa.string(),
    }
    return _same, types.get(kind, pa.int64())


def _enum_reader(field: FieldDescriptor) -> Read:
    names: dict[int, str] = {number: value.name for number, value in field.enum_type.values_by_number.items()}

    def read(number: int) -> str:
        if number not in names:
            raise _MisfitError(f"{field.name}: {number} is none of {field.enum_type.name}")
        return names[number]

    return read


def _same(value: Any) -> Any:
    return value


def _microseconds(message: Any) -> int:
    _checked(message)
    if not (_FIRST_S <= message.seconds <= _LAST_S and 0 <= message.nanos < 1_000_000_000):
        raise _MisfitError(f"{message.seconds} s and {message.nanos} ns are no time")
    return int(message.seconds) * 1_000_000 + int(message.nanos) // 1000


def _json(message: Any) -> str:
    _demand_wire_types_within(message)
    try:
        return str(json_format.MessageToJson(message, preserving_proto_field_name=True, indent=None))
    except (json_format.Error, ValueError, TypeError, KeyError) as error:
        raise _MisfitError(f"{message.DESCRIPTOR.name}: {error}") from error


def _checked(message: Any) -> Any:
    _demand_wire_types(message, frozenset(message.DESCRIPTOR.fields_by_number))
    return message


def _demand_wire_types(message: Any, numbers: frozenset[int]) -> None:
    """What parsers put among the unknown fields although the schema knows the number came as another wire type."""
    unknown = UnknownFieldSet(message)
    if len(unknown):
        for field in unknown:
            if field.field_number in numbers:
                name = message.DESCRIPTOR.fields_by_number[field.field_number].name
                raise _MisfitError(f"{name}: sent as another type (wire type {field.wire_type}) or an unknown name")


def _demand_wire_types_within(message: Any) -> None:
    _checked(message)
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        inner = [value]
        if _is_repeated(field):
            is_map = field.message_type.GetOptions().map_entry
            inner = [v for v in value.values() if hasattr(v, "ListFields")] if is_map else list(value)
        for part in inner:
            _demand_wire_types_within(part)


def _contains_itself(descriptor: Descriptor, within: tuple[str, ...]) -> bool:
    if descriptor.full_name in within:
        return True
    inner = (*within, descriptor.full_name)
    return any(_contains_itself(f.message_type, inner) for f in descriptor.fields if f.message_type is not None)


def _is_repeated(field: FieldDescriptor) -> bool:
    return bool(field.is_repeated)


def _read_path(body: bytes) -> tuple[tuple[int, ...], int]:
    """Read the index path in front of a message: how many indexes, then each; all zigzag varints."""
    count, at = _varint(body, 0)
    if count == 0:
        return (0,), at
    if not 0 < count <= _MAX_PATH:
        raise _MisfitError(f"an index path of {count} steps")
    path = []
    for _ in range(count):
        index, at = _varint(body, at)
        path.append(index)
    return tuple(path), at


def _varint(body: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(body) and shift < 35:
        byte = body[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return (value >> 1) ^ -(value & 1), at
    raise _MisfitError("the index path in front of the message is cut, or no number")


def _read_reader(text: str) -> ProtoFile:
    try:
        return ProtoFile(text, {})
    except SchemaUnusableError as error:
        raise SpecError(
            f"the reader schema cannot be used: {error}. Correct it; the registry's own text of a version will do.",
            faults=[("reader_schema", str(error))],
        ) from error
