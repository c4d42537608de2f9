"""JSON payloads → typed columns, exact for every input byte.

Decided once, and held on the fast path and on the slow one alike:

- One payload is one complete JSON object, alone. Blank, trailing bytes, a byte order mark, invalid or overlong UTF-8,
  a lone surrogate, NaN and Infinity, an array or a number at the top: ``broken_json``. No payload: ``tombstone``.
- More than 16 MiB, or objects and arrays nested deeper than 100: ``broken_json``, before a parser sees it.
- A key given twice: the last one counts, as in Python and JavaScript.
- ``int64``: an integer literal within 64 bits; 1.0, 1e3, true, "1" and 2**63 are ``wrong_type``. -0 is 0.
- ``float64``: any number, rounded to the nearest; one beyond its range is ``wrong_type``. -0.0 keeps its sign.
- ``string`` and ``bool``: just these. ``timestamp``: RFC 3339 text; without an offset it is UTC; past the microsecond
  it is rounded. ``json``: any value, as its own text.
- null and an absent field are both null; whether that is allowed is for the expectations to say.
- A field that is no column is kept as JSON text in ``_extra``; so is one whose name begins with an underscore, for
  those are the provider's own.

No payload can shift or change another's row: objects of one shape are read together (:mod:`.json_shape`), each at its
own place; all others are decoded one by one.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter
from typing import Annotated, Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from airflow_ai_provider.core.ingest.column import positions
from airflow_ai_provider.core.ingest.json_shape import ROWS, ShapedRows, ShapeReader

MAX_DEPTH = 100
MAX_PAYLOAD = 16 * 1024 * 1024
MAX_COLUMNS = 1000
"""Columns inferred at most; fields beyond go to ``_extra``: a topic of random keys must not make a million columns."""

ARROW: Mapping[str, pa.DataType] = {
    "int64": pa.int64(),
    "float64": pa.float64(),
    "string": pa.string(),
    "bool": pa.bool_(),
    "timestamp": pa.timestamp("us", tz="UTC"),
    "json": pa.string(),
}
_INT = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
_TYPES: Mapping[str, Any] = {
    "int64": _INT | None,
    "float64": float | None,
    "string": str | None,
    "bool": bool | None,
    "timestamp": dt.datetime | None,
    "json": msgspec.Raw,
}
_FIRST_US, _LAST_US = -62_135_596_800_000_000, 253_402_300_799_999_999
"""0001-01-01 and the last microsecond of 9999, since 1970: beyond them Python has no time."""
_NULL = msgspec.Raw(b"null")
_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])
_MISFIT = (msgspec.MsgspecError, ValueError, TypeError, RecursionError, OverflowError)


@dataclass(frozen=True)
class JsonBlock:
    """What one block of payloads gave.

    :param columns: column → values, one for each payload that is a row, in order.
    :param extras: fields that are no column, as JSON text, for each such payload.
    :param faults: position → why that payload is not a row.
    """

    columns: dict[str, pa.Array]
    extras: pa.StringArray
    faults: dict[int, list[str]]


class _Found:
    """What a block's payloads gave besides values, by position."""

    def __init__(self, count: int) -> None:
        self._count = count
        self.faults: dict[int, list[str]] = {}
        self.extras: dict[int, str] = {}

    def block(self, columns: dict[str, pa.Array]) -> JsonBlock:
        if self.extras:
            kept = (i for i in range(self._count) if i not in self.faults)
            extras = pa.array(list(map(self.extras.get, kept)), pa.string())
        else:
            extras = pa.nulls(self._count - len(self.faults), pa.string())
        return JsonBlock(columns, extras, self.faults)


class JsonRows:
    """Decode payloads into fixed columns.

    :param columns: column → type, one of ``int64 float64 string bool timestamp json``, in the order of the output.
    """

    def __init__(self, columns: Mapping[str, str]) -> None:
        self.columns = dict(columns)
        self._nested = "json" in self.columns.values()
        self._attributes = [f"c{i}" for i in range(len(self.columns))]
        fields = [
            (attribute, _TYPES[kind], _NULL if kind == "json" else None)
            for attribute, kind in zip(self._attributes, self.columns.values(), strict=True)
        ]
        rename = dict(zip(self._attributes, self.columns, strict=True))
        # gc=False: 100,000 rows of plain values per block need no cycle collector
        self._row = msgspec.defstruct("Row", fields, rename=rename, forbid_unknown_fields=True, gc=False)
        self._fast = msgspec.json.Decoder(self._row)
        self._shapes = ShapeReader(self.columns)
        self._one = {kind: msgspec.json.Decoder(type_) for kind, type_ in _TYPES.items()}

    def decode(self, payloads: pa.BinaryArray | pa.ChunkedArray | Sequence[bytes | None]) -> JsonBlock:
        """Decode a block; every payload ends up either kept or at fault."""
        column = payloads if isinstance(payloads, pa.Array | pa.ChunkedArray) else pa.array(payloads, pa.binary())
        found, parts, first = _Found(len(column)), [], 0
        # by chunk: rows are turned into columns while they are still in the processor's cache
        for chunk in _chunks(column):
            parts.append(self._columns_of(chunk, first, found))
            first += len(chunk)
        columns = {name: pa.concat_arrays([p[name] for p in parts]) for name in self.columns} if parts else {}
        block = found.block(columns or self._arrays([]))
        return self.decode_slowly(column.to_pylist()) if self._left_the_calendar(block) else block

    def _columns_of(self, chunk: pa.BinaryArray, first: int, found: _Found) -> Mapping[str, pa.Array]:
        """The columns of one chunk: of rows that have a known shape, and of those that are read one by one.

        :param first: its first row's number in the block.
        """
        shaped = self._shapes.read(chunk)
        left = np.ones(len(chunk), np.bool_)
        for group in shaped:
            left[group.at] = False
        if not left.any() and len(shaped) == 1:
            return shaped[0].columns
        at = np.flatnonzero(left)
        rows, kept = self._one_by_one(chunk, at.tolist(), first, found)
        if not shaped:
            return self._arrays(rows)
        return _in_order([*shaped, ShapedRows(np.array(kept, np.int64), self._arrays(rows))] if rows else shaped)

    def _one_by_one(
        self, chunk: pa.BinaryArray, at: Sequence[int], first: int, found: _Found
    ) -> tuple[list[Any], list[int]]:
        """Decode rows; ``map`` goes on behind a row that failed, and never leaves C otherwise.

        :return: the rows that fit, and their positions in the chunk.
        """
        payloads = chunk if len(at) == len(chunk) else chunk.take(pa.array(at, pa.int64()))
        views = _views(payloads)
        plain = not self._nested and (pc.max(pc.binary_length(payloads)).as_py() or 0) <= MAX_PAYLOAD
        decode: Callable[[Any], Any] = self._fast.decode if plain else self._guarded
        decoded = map(decode, views)
        rows: list[Any] = []
        failed: list[int] = []
        while True:
            try:
                rows.extend(decoded)
                gone = set(failed)
                return rows, [place for place in at if place not in gone] if gone else list(at)
            except _MISFIT:
                number = len(rows) + len(failed)
                view = views[number]
                row, extra, reasons = self._slow(None if view is None else bytes(view))
                if reasons:
                    failed.append(at[number])
                    found.faults[first + at[number]] = reasons
                else:
                    rows.append(row)
                    if extra is not None:
                        found.extras[first + at[number]] = extra

    def _guarded(self, payload: memoryview | None) -> Any:
        text = None if payload is None else bytes(payload)
        _demand_plain(text)
        return self._fast.decode(text)  # type: ignore[arg-type]  # None has raised

    def decode_slowly(self, payloads: Sequence[bytes | None]) -> JsonBlock:
        """Decode every payload field by field: what :meth:`decode` must equal."""
        rows, extras, faults = [], [], {}
        for position, payload in enumerate(payloads):
            row, extra, reasons = self._slow(payload)
            if reasons:
                faults[position] = reasons
            else:
                rows.append(row)
                extras.append(extra)
        return JsonBlock(self._arrays(rows), pa.array(extras, pa.string()), faults)

    def _slow(self, payload: bytes | None) -> tuple[Any, str | None, list[str]]:
        fields, fault = read_fields(payload)
        if fields is None:
            return None, None, [fault]
        values, reasons = [], []
        for name, kind in self.columns.items():
            raw = fields.pop(name, _NULL)
            try:
                value = self._one[kind].decode(raw)
                values.append(_as_utc(value) if kind == "timestamp" and value else value)
            except _MISFIT as error:
                reasons.append(f"wrong_type: {name}={_brief(raw)} is not {kind} ({error})")
        extra = None
        if fields and not reasons:
            parts = (msgspec.json.encode(k) + b":" + bytes(v) for k, v in fields.items())
            extra = (b"{" + b",".join(parts) + b"}").decode()
        return (None if reasons else self._row(*values)), extra, reasons

    def _arrays(self, rows: list[Any]) -> dict[str, pa.Array]:
        arrays = {}
        for attribute, (name, kind) in zip(self._attributes, self.columns.items(), strict=True):
            values = list(map(attrgetter(attribute), rows))
            if kind == "json":
                texts = (bytes(raw) for raw in values)
                values = [None if text == b"null" else text.decode() for text in texts]
            arrays[name] = pa.array(values, ARROW[kind])
        return arrays

    def _left_the_calendar(self, block: JsonBlock) -> bool:
        """True when a time is outside the years 1 to 9999 in UTC; the slow path then names the row."""
        for name in (name for name, kind in self.columns.items() if kind == "timestamp"):
            span = pc.min_max(block.columns[name].cast(pa.int64())).as_py()
            if span["min"] is not None and not _FIRST_US <= span["min"] <= span["max"] <= _LAST_US:
                return True
        return False


def _chunks(column: pa.BinaryArray | pa.ChunkedArray) -> Iterator[pa.BinaryArray]:
    """Cut or join the pieces of a column into arrays of so many rows as are read together."""
    held: list[pa.BinaryArray] = []
    for piece in column.chunks if isinstance(column, pa.ChunkedArray) else [column]:
        for first in range(0, len(piece), ROWS):
            held.append(piece.slice(first, ROWS))
            if sum(map(len, held)) >= ROWS:
                whole = pa.concat_arrays(held) if len(held) > 1 else held[0]
                yield whole.slice(0, ROWS)
                held = [whole.slice(ROWS)] if len(whole) > ROWS else []
    if held:
        yield pa.concat_arrays(held) if len(held) > 1 else held[0]


def _in_order(groups: Sequence[ShapedRows]) -> Mapping[str, pa.Array]:
    """Bring the columns of groups of rows together, in the rows' order."""
    if len(groups) == 1:
        return groups[0].columns
    order = positions(np.argsort(np.concatenate([group.at for group in groups]), kind="stable"))
    return {name: pa.concat_arrays([group.columns[name] for group in groups]).take(order) for name in groups[0].columns}


def _views(column: pa.BinaryArray) -> list[memoryview | None]:
    """Return the payloads where they lie, without a copy of each."""
    if len(column) == 0:
        return []
    _, ends, data = column.buffers()
    bounds = memoryview(ends).cast("i")[column.offset : column.offset + len(column) + 1].tolist()
    bytes_ = memoryview(data) if data is not None else memoryview(b"")
    views: list[memoryview | None] = [bytes_[a:b] for a, b in pairwise(bounds)]
    if column.null_count:
        for at in pc.indices_nonzero(column.is_null()).to_pylist():
            views[at] = None
    return views


def read_fields(payload: bytes | None) -> tuple[dict[str, msgspec.Raw] | None, str]:
    """Split one payload into its fields, each still JSON text.

    :return: the fields, and an empty text; or None and why the payload is not one JSON object.
    """
    if payload is None:
        return None, "tombstone: the record has no payload"
    try:
        _demand_plain(payload)
        return _FIELDS.decode(payload), ""
    except _MISFIT as error:
        return None, f"broken_json: {error}"


def infer(payloads: Iterable[bytes | None], declared: Mapping[str, str]) -> dict[str, str]:
    """Find columns that nobody declared, in order of appearance.

    Integers only → ``int64``; integers and floats → ``float64``; only texts → ``string``; only true and false →
    ``bool``; anything else (mixtures, objects, integers beyond 64 bits, only nulls) → ``json``, which keeps the text.
    """
    kinds: dict[str, set[str]] = {}
    for payload in payloads:
        fields, _ = read_fields(payload)
        for name, raw in (fields or {}).items():
            if name in declared or not is_column(name) or (name not in kinds and len(kinds) >= MAX_COLUMNS):
                continue
            kinds.setdefault(name, set()).add(_kind(bytes(raw)))
    return {name: _merge(found) for name, found in kinds.items()}


def is_column(name: str) -> bool:
    """True when a field may be a column: named, and not in the provider's own name space."""
    return bool(name) and not name.startswith("_")


def _merge(found: set[str]) -> str:
    found = found - {"null"}
    if found == {"int64", "float64"}:
        return "float64"
    return found.pop() if len(found) == 1 else "json"


def _kind(text: bytes) -> str:
    first = text[:1]
    if first == b'"':
        return "string"
    if first in (b"t", b"f"):
        return "bool"
    if first == b"n":
        return "null"
    if first in (b"{", b"["):
        return "json"
    if text.strip(b"-0123456789"):
        return "float64" if abs(float(text)) != float("inf") else "json"
    return "int64" if len(text) < 19 or (len(text) <= 20 and -(2**63) <= int(text) < 2**63) else "json"


def _demand_plain(payload: bytes | None) -> None:
    if payload is None:
        raise TypeError("no payload")
    if len(payload) > MAX_PAYLOAD:
        raise ValueError(f"{len(payload)} bytes; at most {MAX_PAYLOAD} are read")
    if not payload.isascii():
        payload.decode()
    if payload.count(b"{") + payload.count(b"[") > MAX_DEPTH and _depth(payload) > MAX_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DEPTH}")


def _depth(payload: bytes) -> int:
    depth = deepest = 0
    in_text = escaped = False
    for byte in payload:
        if in_text:
            in_text = escaped or byte != 0x22
            escaped = not escaped and byte == 0x5C
        elif byte == 0x22:
            in_text = True
        elif byte in (0x7B, 0x5B):
            depth += 1
            deepest = max(deepest, depth)
            if deepest > MAX_DEPTH:
                return deepest
        elif byte in (0x7D, 0x5D):
            depth -= 1
    return deepest


def _as_utc(value: dt.datetime) -> dt.datetime:
    return value.replace(tzinfo=dt.UTC) if value.tzinfo is None else value.astimezone(dt.UTC)


def _brief(raw: msgspec.Raw) -> str:
    view = memoryview(raw)
    text = bytes(view[:80]).decode(errors="replace")
    return text if len(view) <= 80 else text + "…"
