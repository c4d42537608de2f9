"""Columns as one schema wrote them → as another reads them, by Avro's rules of schema resolution.

Invariants: whether two schemas go together is decided before any row is seen; a row that cannot be read by the reader's
schema (a null where it has none, an enum's symbol or a union's type that it does not know) is named, never changed.

Decided here: a name matches without its namespace, or by the reader's alias. Integers may become floats (``float`` is
rounded as Avro rounds it), text bytes and bytes text. Logical types must be equal, or one side has none: then the
number keeps its value and takes or loses the meaning. A recursive record is read only by one written the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from airflow_ai_provider.core.ingest.column import flags, mask_of, numbers, positions
from airflow_ai_provider.core.ingest.encoded.avro.schema import (
    MISSING,
    Array,
    Enum,
    Field,
    Leaf,
    Map,
    Node,
    Record,
    SchemaFaultError,
    Union,
    arrow_type,
    is_null,
    recurs,
)
from airflow_ai_provider.core.ingest.encoded.avro.values import array_of, bounds, factor, struct_of, times_of

Mask: TypeAlias = npt.NDArray[np.bool_]
Convert: TypeAlias = Callable[[pa.Array], tuple[pa.Array, Mask]]
"""An array of the writer's type → one of the reader's, and which of its rows do not fit. Nulls stay null and fit."""

_PROMOTIONS = {
    "int": ("long", "float", "double"),
    "long": ("float", "double"),
    "float": ("double",),
    "string": ("bytes",),
    "bytes": ("string",),
}


def resolve(writer: Record, reader: Record) -> Convert:
    """Say how a writer's rows, as one struct column, become the reader's.

    :raises SchemaFaultError: when the schemas do not go together, naming the field.
    """
    return _resolve(writer, reader, reader.name or "schema")


def _resolve(writer: Node, reader: Node, place: str) -> Convert:
    if isinstance(writer, Union) or isinstance(reader, Union):
        return _unions(writer, reader, place)
    if isinstance(writer, Record) and isinstance(reader, Record):
        return _records(writer, reader, place)
    if isinstance(writer, Array) and isinstance(reader, Array):
        return _lists(_resolve(writer.items, reader.items, f"{place}[]"), arrow_type(reader))
    if isinstance(writer, Map) and isinstance(reader, Map):
        return _maps(_resolve(writer.values, reader.values, f"{place}{{}}"))
    if isinstance(writer, Enum) and isinstance(reader, Enum) and _same_name(writer, reader):
        return _enums(writer, reader)
    if isinstance(writer, Leaf) and isinstance(reader, Leaf):
        return _leaves(writer, reader, place)
    raise SchemaFaultError(f"{place}: {_called(writer)} cannot be read as {_called(reader)}")


def _records(writer: Record, reader: Record, place: str) -> Convert:
    if not _same_name(writer, reader):
        raise SchemaFaultError(f"{place}: record {writer.name} is neither {reader.name} nor one of its aliases")
    if recurs(writer) or recurs(reader):
        if _text(writer) == _text(reader):
            return _unchanged
        raise SchemaFaultError(f"{place}: record {writer.name} contains itself and is written in another way")
    written = {f.name: i for i, f in enumerate(writer.fields)}
    sources: list[tuple[int, Convert] | pa.Array] = []
    for field in reader.fields:
        own = f"{place}.{field.name}"
        name = next((n for n in (field.name, *field.aliases) if n in written), None)
        if name is not None:
            sources.append((written[name], _resolve(writer.fields[written[name]].node, field.node, own)))
        elif field.default is MISSING:
            raise SchemaFaultError(f"{own}: the writer has no such field, and it has no default")
        else:
            sources.append(_default(field, own))
    return _struct(arrow_type(reader), sources)


def _struct(type_: pa.StructType, sources: Sequence[tuple[int, Convert] | pa.Array]) -> Convert:
    def convert(values: pa.Array) -> tuple[pa.Array, Mask]:
        columns, bad = [], _none(values)
        here = mask_of(values.is_valid())
        inner = values.flatten()  # with the struct's own nulls
        for source in sources:
            if isinstance(source, tuple):
                column, misfits = source[1](inner[source[0]])
                bad |= misfits & here
            else:
                column = source.take(positions(np.zeros(len(values))))
            columns.append(column)
        return struct_of(type_, columns, ~here), bad

    return convert


def _default(field: Field, place: str) -> pa.Array:
    try:
        return array_of(field.node, [_value(field.node, field.default)])
    except (ValueError, TypeError, KeyError, AttributeError, pa.ArrowException) as error:
        raise SchemaFaultError(f"{place}: the default {field.default!r} does not fit ({error})") from error


def _value(node: Node, default: Any) -> Any:
    """A default's JSON → the plain value it stands for."""
    if isinstance(node, Union):
        return _union_value(node, default)
    if isinstance(node, Record):
        return tuple(_value(f.node, default.get(f.name, f.default)) for f in node.fields)
    if isinstance(node, Array):
        return [_value(node.items, v) for v in default]
    if isinstance(node, Map):
        return [(k, _value(node.values, v)) for k, v in default.items()]
    if isinstance(node, Enum):
        fits, value = default in node.symbols, default
    else:
        fits, value = _leaf_value(node, default)
    if not fits:
        raise ValueError(f"it is no {_called(node)}")
    return value


def _leaf_value(node: Leaf, default: Any) -> tuple[bool, Any]:
    if node.kind in ("bytes", "fixed"):
        value = default.encode("latin-1")
        return node.kind == "bytes" or len(value) == node.size, value
    if node.kind in ("int", "long"):
        return type(default) is int and bounds(node)[0] <= default <= bounds(node)[1], default
    if node.kind in ("float", "double"):
        return type(default) in (int, float), float(default)
    return type(default) is {"null": type(None), "boolean": bool, "string": str}[node.kind], default


def _union_value(node: Union, default: Any) -> Any:
    """Of the first type that it fits (older releases of Avro allow the first type alone)."""
    for branch in node.branches:
        try:
            value = _value(branch, default)
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
        return value if is_null(branch) or len(node.valued) == 1 else (node.valued.index(branch), value)
    raise ValueError(f"it is none of {_called(node)}")


def _unions(writer: Node, reader: Node, place: str) -> Convert:
    """Each of the writer's types goes to the first of the reader's that it can be read as; the exact one first."""
    reads = reader.branches if isinstance(reader, Union) else (reader,)
    writes = writer.branches if isinstance(writer, Union) else (writer,)
    targets = [_target(branch, reads, place) for branch in writes]
    if all(target is None for target in targets):
        raise SchemaFaultError(f"{place}: {_called(writer)} cannot be read as {_called(reader)}")
    nullable = any(is_null(branch) for branch in reads)
    valued = [(targets[i]) for i, branch in enumerate(writes) if not is_null(branch)]
    several = isinstance(writer, Union) and len(writer.valued) > 1
    slots = [r for r in reads if not is_null(r)]
    type_ = arrow_type(reader)

    def convert(values: pa.Array) -> tuple[pa.Array, Mask]:
        bad = _none(values)
        absent = mask_of(values.is_null())
        columns = [pa.nulls(len(values), arrow_type(slot)) for slot in slots]
        children = values.flatten() if several else [values] * len(valued)
        for child, target in zip(children, valued, strict=True):
            here = mask_of(child.is_valid())
            if target is None:
                bad |= here
                continue
            made, misfits = target[1](child)
            bad |= misfits & here
            at = next(i for i, slot in enumerate(slots) if slot is target[0])
            columns[at] = _either(columns[at], made, here)
        if not nullable and isinstance(writer, Union) and any(is_null(b) for b in writes):
            bad |= absent
        if len(slots) == 1:
            return columns[0], bad
        return (struct_of(type_, columns, absent) if slots else pa.nulls(len(values))), bad

    return convert


def _target(writer: Node, reads: Sequence[Node], place: str) -> tuple[Node, Convert] | None:
    ordered = sorted(reads, key=lambda reader: _called(reader) != _called(writer))
    for reader in ordered:
        try:
            return reader, _resolve(writer, reader, place)
        except SchemaFaultError:
            continue
    return None


def _either(first: pa.Array, second: pa.Array, use_second: Mask) -> pa.Array:
    count = len(first)
    at = np.where(use_second, np.arange(count) + count, np.arange(count))
    return pa.concat_arrays([first, second]).take(positions(at))


def _lists(items: Convert, type_: pa.DataType) -> Convert:
    def convert(values: pa.Array) -> tuple[pa.Array, Mask]:
        made, misfits = items(values.flatten())
        offsets, absent = _shape(values)
        return pa.ListArray.from_arrays(offsets, made, type_, mask=absent), _rows_of(values, offsets, misfits)

    return convert


def _maps(items: Convert) -> Convert:
    def convert(values: pa.Array) -> tuple[pa.Array, Mask]:
        filled = values.take(pc.indices_nonzero(values.is_valid()))  # no span of a null is left behind
        made, misfits = items(filled.items)
        offsets = filled.offsets
        mapped = pa.MapArray.from_arrays(offsets, filled.keys, made)
        here = mask_of(values.is_valid())
        bad = _none(values)
        bad[np.flatnonzero(here)] = _rows_of(filled, offsets, misfits)
        return mapped.take(positions(np.cumsum(here) - 1, ~here)), bad

    return convert


def _shape(values: pa.Array) -> tuple[pa.Array, pa.Array]:
    sizes = pc.fill_null(pc.list_value_length(values), 0).to_numpy(zero_copy_only=False)
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    return numbers(offsets, pa.int32()), values.is_null()


def _rows_of(values: pa.Array, offsets: pa.Array, misfits: Mask) -> Mask:
    bad = _none(values)
    if misfits.any():
        starts = offsets.to_numpy()
        bad[np.searchsorted(starts, np.flatnonzero(misfits), side="right") - 1] = True
    return bad


def _enums(writer: Enum, reader: Enum) -> Convert:
    unknown = [symbol for symbol in writer.symbols if symbol not in reader.symbols]
    if not unknown:
        return _unchanged
    fallback = reader.default if reader.default in reader.symbols else None

    def convert(values: pa.Array) -> tuple[pa.Array, Mask]:
        missing = pc.fill_null(pc.is_in(values, pa.array(unknown)), False)
        if fallback is None:
            return values, mask_of(missing)
        return pc.if_else(missing, pa.scalar(fallback), values), _none(values)

    return convert


def _leaves(writer: Leaf, reader: Leaf, place: str) -> Convert:
    same = writer.kind == reader.kind and (writer.size, writer.name if writer.kind == "fixed" else "") == (
        reader.size,
        reader.name if reader.kind == "fixed" else "",
    )
    if not same and reader.kind not in _PROMOTIONS.get(writer.kind, ()):
        raise SchemaFaultError(f"{place}: {_called(writer)} cannot be read as {_called(reader)}")
    meaning = [(n.logical, n.precision, n.scale) for n in (writer, reader)]
    if meaning[0] == meaning[1]:
        return _unchanged if same or reader.logical else _promotion(reader)
    numbers = all(n.kind in ("int", "long") for n in (writer, reader))
    if numbers and not writer.logical:
        return lambda values: _gain_meaning(reader, values)
    if numbers and not reader.logical:
        return lambda values: (_without_meaning(writer, values), _none(values))
    raise SchemaFaultError(f"{place}: {_called(writer)} cannot be read as {_called(reader)}")


def _promotion(reader: Leaf) -> Convert:
    if reader.kind == "string":
        return _texts
    if reader.kind == "float":
        return lambda values: (
            values.cast(pa.float64(), safe=False).cast(pa.float32(), safe=False).cast(pa.float64()),
            _none(values),
        )
    type_ = arrow_type(reader)
    return lambda values: (values.cast(type_, safe=False), _none(values))


def _texts(values: pa.Array) -> tuple[pa.Array, Mask]:
    bad = _none(values)
    try:
        return values.cast(pa.string()), bad
    except pa.ArrowInvalid:
        texts: list[str | None] = []
        for i, value in enumerate(values.to_pylist()):
            try:
                texts.append(None if value is None else value.decode())
            except UnicodeDecodeError:
                texts.append(None)
                bad[i] = True
        return pa.array(texts, pa.string()), bad


def _gain_meaning(reader: Leaf, values: pa.Array) -> tuple[pa.Array, Mask]:
    least, greatest = bounds(reader)
    fits = pc.and_(pc.greater_equal(values, least), pc.less_equal(values, greatest))
    bad = ~mask_of(pc.fill_null(fits, True))
    return times_of(reader, pc.if_else(flags(bad), pa.scalar(None, pa.int64()), values)), bad


def _without_meaning(writer: Leaf, values: pa.Array) -> pa.Array:
    whole = values.cast(pa.int32()) if values.type in (pa.date32(), pa.time32("ms")) else values.cast(pa.int64())
    return pc.divide(whole.cast(pa.int64()), factor(writer))


def _unchanged(values: pa.Array) -> tuple[pa.Array, Mask]:
    return values, _none(values)


def _none(values: pa.Array) -> Mask:
    return np.zeros(len(values), np.bool_)


def _same_name(writer: Record | Enum, reader: Record | Enum) -> bool:
    return writer.name in (reader.name, *reader.aliases)


def _called(node: Node) -> str:
    """Name a type for people, and to see whether two are the same."""
    if isinstance(node, Leaf):
        return f"{node.name or node.kind}" + (f" ({node.logical})" if node.logical else "")
    if isinstance(node, Union):
        return f"[{', '.join(_called(branch) for branch in node.branches)}]"
    return (
        f"{type(node).__name__.lower()} {node.name}" if isinstance(node, Record | Enum) else type(node).__name__.lower()
    )


def _text(node: Node, within: tuple[Record, ...] = ()) -> str:
    """Everything that decides how values are written, on one line; a record around it by its distance."""
    if isinstance(node, Record):
        if node in within:
            return f"^{len(within) - within.index(node)}"
        inner = (*within, node)
        return f"{node.name}({','.join(f.name + ':' + _text(f.node, inner) for f in node.fields)})"
    if isinstance(node, Array):
        return f"[{_text(node.items, within)}]"
    if isinstance(node, Map):
        return f"{{{_text(node.values, within)}}}"
    if isinstance(node, Union):
        return "|".join(_text(branch, within) for branch in node.branches)
    return repr(node)
