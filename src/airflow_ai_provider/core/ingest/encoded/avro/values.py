"""Avro values → Arrow arrays: what each type's values look like as a column, and which values a type cannot have.

Invariants: both ways of decoding (row by row, and whole columns) get their arrays and their bounds here, so a value
looks the same whichever way it came. Plain values are those that stand in the bytes: integers for dates and times,
``bytes`` for decimals, ``(branch, value)`` for a union of several types, pairs for a map.
"""

from __future__ import annotations

import base64
import decimal
import json
import math
from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from airflow_ai_provider.core.ingest.column import flags
from airflow_ai_provider.core.ingest.encoded.avro.schema import (
    Array,
    Enum,
    Leaf,
    Map,
    Node,
    Record,
    Union,
    arrow_type,
    branch_names,
    is_null,
)

_DAY_US = 86_400_000_000
_FIRST_DAY, _LAST_DAY = -719_162, 2_932_896  # 0001-01-01 and 9999-12-31, in days from 1970: what a calendar has
_FIRST_US, _LAST_US = _FIRST_DAY * _DAY_US, (_LAST_DAY + 1) * _DAY_US - 1

BOUNDS: dict[str, tuple[int, int]] = {
    "int": (-(2**31), 2**31 - 1),
    "long": (-(2**63), 2**63 - 1),
    "date": (_FIRST_DAY, _LAST_DAY),
    "time-millis": (0, 86_400_000 - 1),
    "time-micros": (0, _DAY_US - 1),
    "timestamp-millis": (-(-_FIRST_US // 1000), _LAST_US // 1000),
    "timestamp-micros": (_FIRST_US, _LAST_US),
    "timestamp-nanos": (-(2**63), 2**63 - 1),
}
"""Logical or physical type → the least and the greatest value; outside it no calendar could show the value."""
BOUNDS |= {f"local-{name}": BOUNDS[name] for name in ("timestamp-millis", "timestamp-micros", "timestamp-nanos")}

UUID = r"^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$"
_EXACT = decimal.Context(prec=100)


def bounds(leaf: Leaf) -> tuple[int, int]:
    """Least and greatest value of an ``int`` or ``long``."""
    return BOUNDS[leaf.logical or leaf.kind]


def factor(leaf: Leaf) -> int:
    """What a value is multiplied by for its column: milliseconds become microseconds."""
    return 1000 if leaf.logical in ("timestamp-millis", "local-timestamp-millis") else 1


def unscaled_limit(leaf: Leaf) -> int:
    """The greatest unscaled value of a decimal."""
    return int(10**leaf.precision) - 1


def array_of(node: Node, values: Sequence[Any], within: tuple[Record, ...] = ()) -> pa.Array:
    """Make a column of plain values.

    :param values: None where a value is null or not there.
    :param within: the records around the node.
    """
    if isinstance(node, Leaf):
        return _leaves(node, values)
    if isinstance(node, Enum):
        return pa.array(values, pa.string())
    if isinstance(node, Array):
        offsets, missing = _offsets(values)
        items = array_of(node.items, list(chain.from_iterable(v for v in values if v is not None)), within)
        return pa.ListArray.from_arrays(offsets, items, pa.list_(items.type), mask=missing)
    if isinstance(node, Map):
        return _maps(node, values, within)
    if isinstance(node, Union):
        return _unions(node, values, within)
    if node in within:
        return pa.array([None if v is None else _json(plain(node, v)) for v in values], pa.string())
    columns = [
        array_of(f.node, [None if v is None else v[i] for v in values], (*within, node))
        for i, f in enumerate(node.fields)
    ]
    return struct_of(arrow_type(node, within), columns, [v is None for v in values])


def struct_of(
    type_: pa.StructType, columns: Sequence[pa.Array], missing: Sequence[bool] | npt.NDArray[np.bool_]
) -> pa.Array:
    """Put columns side by side; also none of them, which Arrow's own way refuses."""
    if not columns:
        return pa.array([None if m else {} for m in missing], type_)
    return pa.StructArray.from_arrays(columns, fields=list(type_), mask=flags(np.asarray(missing, np.bool_)))


def plain(node: Node, value: Any) -> Any:
    """Turn a plain value into what JSON can say: bytes as base64, a decimal as text, NaN as text."""
    if value is None:
        return None
    if isinstance(node, Record):
        return {f.name: plain(f.node, v) for f, v in zip(node.fields, value, strict=True)}
    if isinstance(node, Array):
        return [plain(node.items, v) for v in value]
    if isinstance(node, Map):
        return {k: plain(node.values, v) for k, v in value}
    if isinstance(node, Union):
        if len(node.valued) < 2:
            return plain(node.valued[0], value)
        return plain(node.valued[value[0]], value[1])
    if isinstance(value, bytes):
        if isinstance(node, Leaf) and node.logical == "decimal":
            return str(_decimal(node, value))
        return base64.b64encode(value).decode()
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _leaves(leaf: Leaf, values: Sequence[Any]) -> pa.Array:
    type_ = arrow_type(leaf)
    if leaf.logical == "decimal":
        return pa.array([None if v is None else _decimal(leaf, v) for v in values], type_)
    if leaf.kind in ("int", "long") and leaf.logical:
        return times_of(leaf, pa.array(values, pa.int64()))
    return pa.array(values, type_)


def times_of(leaf: Leaf, values: pa.Array) -> pa.Array:
    """Integers within :func:`bounds`, not yet multiplied → the logical type's column."""
    type_ = arrow_type(leaf)
    by = factor(leaf)
    if by != 1:
        values = pc.multiply(values, by)
    if pa.types.is_date32(type_) or pa.types.is_time32(type_):
        values = values.cast(pa.int32())
    return values.cast(type_)


def _decimal(leaf: Leaf, value: bytes) -> decimal.Decimal:
    return decimal.Decimal(int.from_bytes(value, "big", signed=True)).scaleb(-leaf.scale, _EXACT)


def _maps(node: Map, values: Sequence[Any], within: tuple[Record, ...]) -> pa.Array:
    offsets, _ = _offsets(values)
    pairs = list(chain.from_iterable(v for v in values if v is not None))
    keys = pa.array([k for k, _ in pairs], pa.string())
    items = array_of(node.values, [v for _, v in pairs], within)
    made = pa.MapArray.from_arrays(offsets, keys, items)
    # MapArray.from_arrays takes no mask; a position of None gives the null
    at = pa.array([None if v is None else i for i, v in enumerate(values)], pa.int64())
    return made.take(at) if any(v is None for v in values) else made


def _unions(node: Union, values: Sequence[Any], within: tuple[Record, ...]) -> pa.Array:
    valued = node.valued
    if not valued:
        return pa.nulls(len(values))
    if len(valued) == 1:
        return array_of(valued[0], values, within)
    columns = [
        array_of(branch, [v[1] if v is not None and v[0] == i else None for v in values], within)
        for i, branch in enumerate(valued)
    ]
    fields = [pa.field(name, column.type) for name, column in zip(branch_names(node), columns, strict=True)]
    return struct_of(pa.struct(fields), columns, [v is None for v in values])


def _offsets(values: Sequence[Any]) -> tuple[pa.Array, pa.Array]:
    sizes = (0 if v is None else len(v) for v in values)
    return (
        pa.array(accumulate(sizes, initial=0), pa.int32(), size=len(values) + 1),
        pa.array([v is None for v in values], pa.bool_()),
    )


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def nullable(node: Node) -> Node | None:
    """The T of ``[null, T]``, or None."""
    if isinstance(node, Union) and len(node.valued) == 1 and any(is_null(b) for b in node.branches):
        return node.valued[0]
    return None
