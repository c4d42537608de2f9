"""Columns that have values already (CSV text, Parquet, images) → the declared types, row by row where they do not fit.

Decided once:

- CSV cells are text. ``int64``: digits with an optional minus; ``float64``: a decimal number, not nan or inf; ``bool``:
  true, false, 1, 0; ``timestamp``: ISO 8601 with a T, UTC where it has no offset. An empty cell is null. A column that
  nobody declared is ``int64`` or ``float64`` when every cell of the first block is one, else ``string``.
- Typed columns keep their own type unless another is declared; then only a widening within a kind is taken (int32 →
  int64, int → float, decimal → float, date → timestamp), else each value that is not null is ``wrong_type``.
- A column that the first block does not have goes to ``_extra`` as JSON.
"""

from __future__ import annotations

import base64
import datetime as dt
import json
import math
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from airflow_ai_provider.core.ingest.json_rows import ARROW

_TEXT_FORMS = {
    "int64": r"^-?[0-9]+$",
    "float64": r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$",
    "bool": r"^(?i:true|false|1|0)$",
    "timestamp": r"^[0-9]{4}-[0-9]{2}-[0-9]{2}(T.*)?$",
}
_WIDENINGS: Mapping[str, tuple[Callable[[pa.DataType], bool], ...]] = {
    "int64": (pt.is_integer,),
    "float64": (pt.is_integer, pt.is_floating, pt.is_decimal),
    "string": (pt.is_string, pt.is_large_string),
    "bool": (pt.is_boolean,),
    "timestamp": (pt.is_timestamp, pt.is_date),
    "json": (pt.is_string, pt.is_large_string),
}


def infer_text(column: pa.ChunkedArray) -> str:
    """Find the type of a CSV column that nobody declared."""
    for kind in ("int64", "float64"):
        if column.null_count < len(column) and cast_text(column, kind)[1] == []:
            return kind
    return "string"


def cast_text(column: pa.ChunkedArray, kind: str) -> tuple[pa.Array, list[int]]:
    """Read texts as a type.

    :return: the values (null where the text does not fit) and the positions where it does not.
    """
    texts = column.combine_chunks()
    if kind in ("string", "json"):
        return texts.cast(pa.string()), []
    fits = pc.match_substring_regex(texts, _TEXT_FORMS[kind])
    fitting = pc.if_else(pc.fill_null(fits, False), texts, pa.scalar(None, texts.type))
    values = _cast(fitting, _reader(kind), ARROW[kind])
    return values, _lost(texts, values)


def cast_typed(column: pa.ChunkedArray, target: pa.DataType, kind: str | None) -> tuple[pa.Array, list[int]]:
    """Widen typed values to the declared type (``kind``), or to the type that the first block had (``kind`` None).

    :return: the values (null where one does not fit) and the positions where it does not.
    """
    values = column.combine_chunks()
    if isinstance(values, pa.ChunkedArray):  # combine_chunks keeps chunks apart when 2 GiB would not fit into one
        values = pa.concat_arrays(values.chunks)
    if values.type == target:
        return values, []
    if pt.is_null(values.type):
        return pa.nulls(len(values), target), []
    allowed = _WIDENINGS[kind] if kind else (lambda found: found == target,)
    if not any(test(values.type) for test in allowed):
        return pa.nulls(len(values), target), pc.indices_nonzero(values.is_valid()).to_pylist()
    safe = not (pt.is_floating(target) or pt.is_timestamp(target))  # rounding is what float64 and µs mean
    cast = _cast(values, lambda part: part.cast(target, safe=safe), target)
    return cast, _lost(values, cast)


def row_json(row: Mapping[str, Any]) -> bytes:
    """Write one row as a JSON object: what quarantine keeps of a row that had no bytes of its own."""
    return json.dumps({k: _plain(v) for k, v in row.items()}, ensure_ascii=False, separators=(",", ":")).encode()


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, dt.date | dt.time):
        return value.isoformat()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Decimal | dt.timedelta):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def _reader(kind: str) -> Callable[[pa.Array], pa.Array]:
    return _read_times if kind == "timestamp" else lambda part: part.cast(ARROW[kind])


def _read_times(texts: pa.Array) -> pa.Array:
    zoned = pc.match_substring_regex(texts, r"(Z|[+-][0-9]{2}:?[0-9]{2})$")
    # a date has no T, and its last dash is not an offset
    zoned = pc.and_(zoned, pc.match_substring(texts, "T"))
    utc = ARROW["timestamp"]
    none = pa.scalar(None, texts.type)
    aware = pc.if_else(zoned, texts, none).cast(utc)
    naive = pc.if_else(zoned, none, texts).cast(pa.timestamp("us")).cast(utc)
    return pc.coalesce(aware, naive)


def _cast(values: pa.Array, cast: Callable[[pa.Array], pa.Array], target: pa.DataType) -> pa.Array:
    try:
        return cast(values)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        parts = [_cast_one(values.slice(i, 1), cast, target) for i in range(len(values))]
        return pa.concat_arrays(parts) if parts else pa.nulls(0, target)


def _cast_one(value: pa.Array, cast: Callable[[pa.Array], pa.Array], target: pa.DataType) -> pa.Array:
    try:
        return cast(value)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return pa.nulls(1, target)


def _lost(before: pa.Array, after: pa.Array) -> list[int]:
    if before.null_count == after.null_count:
        return []
    positions: list[int] = pc.indices_nonzero(pc.and_(before.is_valid(), after.is_null())).to_pylist()
    return positions
