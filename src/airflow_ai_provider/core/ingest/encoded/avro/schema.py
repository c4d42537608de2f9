"""An Avro schema's JSON → a checked tree of nodes, and the Arrow type that each node's values get.

Invariants: a schema is refused as a whole, with every reason naming its place, before any value is read; the tree is
bounded (:data:`MAX_SCHEMA_DEPTH`, :data:`MAX_SCHEMA_NODES` with named types written out), so that a small schema cannot
become a million columns. A record that contains itself is kept as JSON text where it does: Arrow has no such type.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import pyarrow as pa

MAX_SCHEMA_DEPTH = 64
MAX_SCHEMA_NODES = 10_000
MISSING: Any = type("Missing", (), {"__repr__": lambda _: "no default"})()
"""Stands for "no default": null is one."""

_PRIMITIVES = ("null", "boolean", "int", "long", "float", "double", "bytes", "string")
# logical type → the physical types it may stand on; on any other it is ignored, as the specification says
_LOGICAL = {
    "date": ("int",),
    "time-millis": ("int",),
    "time-micros": ("long",),
    "timestamp-millis": ("long",),
    "timestamp-micros": ("long",),
    "timestamp-nanos": ("long",),
    "local-timestamp-millis": ("long",),
    "local-timestamp-micros": ("long",),
    "local-timestamp-nanos": ("long",),
    "decimal": ("bytes", "fixed"),
    "uuid": ("string",),
}
_ARROW = {
    "null": pa.null(),
    "boolean": pa.bool_(),
    "int": pa.int64(),
    "long": pa.int64(),
    "float": pa.float64(),
    "double": pa.float64(),
    "bytes": pa.binary(),
    "string": pa.string(),
    "date": pa.date32(),
    "time-millis": pa.time32("ms"),
    "time-micros": pa.time64("us"),
    "timestamp-millis": pa.timestamp("us", tz="UTC"),
    "timestamp-micros": pa.timestamp("us", tz="UTC"),
    "timestamp-nanos": pa.timestamp("ns", tz="UTC"),
    "local-timestamp-millis": pa.timestamp("us"),
    "local-timestamp-micros": pa.timestamp("us"),
    "local-timestamp-nanos": pa.timestamp("ns"),
}


class SchemaFaultError(ValueError):
    """A schema cannot be used; the caller says which one."""


@dataclass(frozen=True)
class Leaf:
    """A value without parts.

    :param kind: ``null boolean int long float double bytes string fixed``.
    :param logical: the logical type that holds for it, or an empty text.
    :param size: bytes of a ``fixed``.
    :param name: name of a ``fixed``, without its namespace.
    """

    kind: str
    logical: str = ""
    size: int = 0
    precision: int = 0
    scale: int = 0
    name: str = ""


@dataclass(frozen=True)
class Enum:
    """One of a list of texts."""

    name: str
    symbols: tuple[str, ...]
    default: str | None = None
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Array:
    """A list."""

    items: Node


@dataclass(frozen=True)
class Map:
    """A mapping from text."""

    values: Node


@dataclass(frozen=True)
class Union:
    """One of several types; ``[null, T]`` is a nullable T."""

    branches: tuple[Node, ...]

    @property
    def valued(self) -> tuple[Node, ...]:
        """The branches but for null."""
        return tuple(b for b in self.branches if not is_null(b))


@dataclass(frozen=True)
class Field:
    """One field of a record."""

    name: str
    node: Node
    default: Any = MISSING
    aliases: tuple[str, ...] = ()


@dataclass(eq=False)
class Record:
    """Named fields; equal only to itself, for it may contain itself."""

    name: str
    aliases: tuple[str, ...] = ()
    fields: list[Field] = field(default_factory=list)


Node: TypeAlias = Leaf | Enum | Array | Map | Union | Record


def is_null(node: Node) -> bool:
    """True for the type that has no values but null."""
    return isinstance(node, Leaf) and node.kind == "null"


def parse(text: str, references: Mapping[str, str] | None = None) -> Record:
    """Read a schema.

    :param references: name → schema text of the types it uses from elsewhere, each after those it uses itself.
    :return: the record; a schema of another type becomes a record with the one field ``value``.
    :raises SchemaFaultError: saying where and why.
    """
    names: dict[str, Node] = {}
    for other in (references or {}).values():
        _Parser(names).node(_load(other), "", "reference", 0)
    node = _Parser(names).node(_load(text), "", "schema", 0)
    record = node if isinstance(node, Record) else Record("", (), [Field("value", node)])
    if sum(1 for _ in _written_out(record, ())) > MAX_SCHEMA_NODES:
        raise SchemaFaultError(f"written out it has more than {MAX_SCHEMA_NODES} types")
    return record


def arrow_type(node: Node, within: tuple[Record, ...] = ()) -> pa.DataType:
    """Return the Arrow type of a node's values.

    Integers are int64 and floats float64, so that a promotion between schemas changes no column's type; so are
    timestamps in microseconds whatever unit they were sent in (nanoseconds stay). A union of several types is a struct
    with one nullable field per type.

    :param within: the records around it.
    """
    if isinstance(node, Leaf):
        return _leaf_type(node)
    if isinstance(node, Enum):
        return pa.string()
    if isinstance(node, Array):
        return pa.list_(arrow_type(node.items, within))
    if isinstance(node, Map):
        return pa.map_(pa.string(), arrow_type(node.values, within))
    if isinstance(node, Union):
        valued = node.valued
        if len(valued) < 2:
            return arrow_type(valued[0], within) if valued else pa.null()
        types = [arrow_type(branch, within) for branch in valued]
        return pa.struct([pa.field(n, t) for n, t in zip(branch_names(node), types, strict=True)])
    if node in within:
        return pa.string()
    return pa.struct([pa.field(f.name, arrow_type(f.node, (*within, node))) for f in node.fields])


def branch_names(union: Union) -> list[str]:
    """Name the types of a union: what they are, or their own name; a number tells two of the same name apart."""
    names: list[str] = []
    for branch in union.valued:
        name = branch.name if isinstance(branch, Record | Enum) else ""
        name = name or (branch.name or branch.kind if isinstance(branch, Leaf) else type(branch).__name__.lower())
        names.append(name if name not in names else f"{name}_{len(names)}")
    return names


def recurs(node: Node, within: tuple[Record, ...] = ()) -> bool:
    """True when a node contains itself, or a record around it."""
    if isinstance(node, Record) and node in within:
        return True
    inner = (*within, node) if isinstance(node, Record) else within
    return any(recurs(part, inner) for part in parts(node))


def parts(node: Node) -> list[Node]:
    """The nodes directly inside a node."""
    if isinstance(node, Record):
        return [f.node for f in node.fields]
    if isinstance(node, Union):
        return list(node.branches)
    if isinstance(node, Array):
        return [node.items]
    return [node.values] if isinstance(node, Map) else []


def _written_out(node: Node, within: tuple[Record, ...]) -> Iterator[Node]:
    yield node
    if isinstance(node, Record):
        if node in within:
            return
        within = (*within, node)
    for count, part in enumerate(parts(node)):
        if count > MAX_SCHEMA_NODES:
            return
        yield from _written_out(part, within)


def _leaf_type(leaf: Leaf) -> pa.DataType:
    if leaf.logical == "decimal":
        make = pa.decimal128 if leaf.precision <= 38 else pa.decimal256
        return make(leaf.precision, leaf.scale)
    if leaf.kind == "fixed":
        return pa.binary(leaf.size)
    return _ARROW.get(leaf.logical) or _ARROW[leaf.kind]


def _load(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        if text in _PRIMITIVES:  # some registries keep a bare name
            return text
        raise SchemaFaultError(f"it is not JSON ({error})") from error


class _Parser:
    """Reads one text; names are shared between the texts of one schema."""

    def __init__(self, names: dict[str, Node]) -> None:
        self._names = names
        self._count = 0

    def node(self, spec: Any, space: str, place: str, depth: int) -> Node:
        self._count += 1
        if depth > MAX_SCHEMA_DEPTH or self._count > MAX_SCHEMA_NODES:
            raise SchemaFaultError(f"{place}: nested deeper than {MAX_SCHEMA_DEPTH}, or too large")
        if isinstance(spec, str):
            return self._named(spec, space, place)
        if isinstance(spec, list):
            return self._union(spec, space, place, depth)
        if not isinstance(spec, dict) or "type" not in spec:
            raise SchemaFaultError(f"{place}: {_short(spec)} is not a type")
        kind = spec["type"]
        if kind in ("record", "error"):
            return self._record(spec, space, place, depth)
        if kind == "enum":
            return self._enum(spec, space, place)
        if kind == "fixed":
            return self._fixed(spec, space, place)
        if kind == "array":
            return Array(self.node(spec.get("items"), space, f"{place}[]", depth + 1))
        if kind == "map":
            return Map(self.node(spec.get("values"), space, f"{place}{{}}", depth + 1))
        node = self.node(kind, space, place, depth + 1)
        return _logical(node, spec) if isinstance(node, Leaf) and not node.logical else node

    def _named(self, name: str, space: str, place: str) -> Node:
        if name in _PRIMITIVES:
            return Leaf(name)
        for full in (f"{space}.{name}", name) if space and "." not in name else (name,):
            if full in self._names:
                return self._names[full]
        raise SchemaFaultError(f"{place}: nothing is named {name!r}")

    def _union(self, spec: list[Any], space: str, place: str, depth: int) -> Node:
        branches = tuple(self.node(s, space, f"{place}|{i}", depth + 1) for i, s in enumerate(spec))
        if not branches or any(isinstance(b, Union) for b in branches):
            raise SchemaFaultError(f"{place}: a union is empty or stands directly in a union")
        kinds = [b.kind if isinstance(b, Leaf) and b.kind != "fixed" else type(b).__name__ for b in branches]
        twice = [k for k in kinds if k not in ("Record", "Enum", "Leaf") and kinds.count(k) > 1]
        if twice:
            raise SchemaFaultError(f"{place}: a union has {twice[0]} twice")
        return Union(branches)

    def _record(self, spec: Mapping[str, Any], space: str, place: str, depth: int) -> Node:
        name, space = self._name(spec, space, place)
        record = Record(name, _aliases(spec))
        self._add(f"{space}.{name}" if space else name, record, place)
        fields = spec.get("fields")
        if not isinstance(fields, list):
            raise SchemaFaultError(f"{place}: record {name!r} has no list of fields")
        for each in fields:
            if not isinstance(each, dict) or not isinstance(each.get("name"), str) or "type" not in each:
                raise SchemaFaultError(f"{place}.{name}: {_short(each)} is not a field")
            own = f"{place}.{each['name']}"
            if any(f.name == each["name"] for f in record.fields):
                raise SchemaFaultError(f"{own}: the field is there twice")
            node = self.node(each["type"], space, own, depth + 1)
            record.fields.append(Field(each["name"], node, each.get("default", MISSING), _aliases(each)))
        return record

    def _enum(self, spec: Mapping[str, Any], space: str, place: str) -> Node:
        name, space = self._name(spec, space, place)
        symbols = spec.get("symbols")
        if not isinstance(symbols, list) or not all(isinstance(s, str) for s in symbols) or not symbols:
            raise SchemaFaultError(f"{place}: enum {name!r} has no symbols")
        node = Enum(name, tuple(symbols), spec.get("default"), _aliases(spec))
        return self._add(f"{space}.{name}" if space else name, node, place)

    def _fixed(self, spec: Mapping[str, Any], space: str, place: str) -> Node:
        name, space = self._name(spec, space, place)
        size = spec.get("size")
        if not isinstance(size, int) or isinstance(size, bool) or not 0 < size < 2**31:
            raise SchemaFaultError(f"{place}: fixed {name!r} has size {_short(size)}")
        node = _logical(Leaf("fixed", size=size, name=name), spec)
        return self._add(f"{space}.{name}" if space else name, node, place)

    def _name(self, spec: Mapping[str, Any], space: str, place: str) -> tuple[str, str]:
        name = spec.get("name")
        if not isinstance(name, str) or not name:
            raise SchemaFaultError(f"{place}: {_short(spec.get('type'))} has no name")
        given, _, short = name.rpartition(".")
        own = spec.get("namespace")
        return short, given or (own if isinstance(own, str) else space)

    def _add(self, full: str, node: Node, place: str) -> Node:
        if full in self._names:
            raise SchemaFaultError(f"{place}: {full!r} is named twice")
        self._names[full] = node
        return node


def _logical(leaf: Leaf, spec: Mapping[str, Any]) -> Leaf:
    logical = spec.get("logicalType")
    if not isinstance(logical, str) or leaf.kind not in _LOGICAL.get(logical, ()):
        return leaf
    if logical != "decimal":
        return Leaf(leaf.kind, logical, leaf.size, name=leaf.name)
    precision, scale = spec.get("precision"), spec.get("scale", 0)
    if type(precision) is not int or type(scale) is not int or not (1 <= precision <= 76 and 0 <= scale <= precision):
        return leaf
    return Leaf(leaf.kind, logical, leaf.size, precision, scale, leaf.name)


def _aliases(spec: Mapping[str, Any]) -> tuple[str, ...]:
    found = spec.get("aliases")
    return tuple(a.rpartition(".")[2] for a in found if isinstance(a, str)) if isinstance(found, list) else ()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"
