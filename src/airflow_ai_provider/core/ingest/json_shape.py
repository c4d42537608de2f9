"""Read many JSON objects of one shape at once, column by column, with numpy: fast, and never the judge.

How: objects of one producer differ in their values alone; what stands between the values (names, colons, commas,
spaces) is the same in each. One object shows that shape. In every other one, what should stand before a value is
compared, byte by byte, the next quote tells where the value ends, and it must be one of its column's type. What
differs, in any way, is left *undecided*: :mod:`.json_rows` reads that payload by itself.

Invariants: a decided row has the values that :mod:`.json_rows` gives; a payload's bytes decide about itself alone; no
position leads outside the payloads' own bytes and the slack around them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from airflow_ai_provider.core.ingest.column import bits, flags, mask_of, numbers
from airflow_ai_provider.core.ingest.digit import (
    REACH,
    Ints,
    Mask,
    Text,
    Values,
    read_float64,
    read_int64,
    read_timestamp,
)

ROWS = 8192
"""Payloads that are read together: enough that each step is worth its call, few enough for the processor's cache."""
MAX_BYTES = 16 * 1024 * 1024
"""Bytes of so many payloads; longer ones are read one by one, where their parser is at its best."""
MAX_SHAPES = 8
MAX_LITERAL = 1024
MAX_FIELDS = 256
_SLACK = 2 * MAX_LITERAL + 4 * REACH
_WORTH = 16
"""One of so many rows must be undecided for another shape to be worth learning."""
_FEW = 32
"""Rows of other than ASCII bytes that are worth asking one by one."""
_TRIES = 4
"""Rows from which a shape may be learned: the first one may be broken."""
_QUOTE, _BACKSLASH, _SPACE, _LETTER_N = b'"\\ n'
_NAME = re.compile(rb' *([{,]) *"([^"\\]*)" *: *')
_VALUE = re.compile(rb'"[^"\\]*"|[^ ",:{}\[\]\\]+')
_END = re.compile(rb" *\} *")
_ARROW: Mapping[str, pa.DataType] = {
    "int64": pa.int64(),
    "float64": pa.float64(),
    "string": pa.string(),
    "bool": pa.bool_(),
    "timestamp": pa.timestamp("us", tz="UTC"),
}
_Build: TypeAlias = Callable[[Ints], pa.Array]
"""Makes a field's column of the rows that turned out to be decided."""


@dataclass(frozen=True)
class Shape:
    """What the objects of one producer have in common.

    :param names: of the fields, in order.
    :param literals: what stands before each value, and behind the last one.
    """

    names: tuple[str, ...]
    literals: tuple[bytes, ...]


@dataclass(frozen=True)
class ShapedRows:
    """Rows of one shape.

    :param at: their positions among the payloads, in order.
    :param columns: their values, one column for each that the batch has.
    """

    at: Ints
    columns: Mapping[str, pa.Array]


class ShapeReader:
    """Read payloads by the shapes that earlier ones have shown.

    :param columns: column → ``int64``, ``float64``, ``string``, ``bool`` or ``timestamp``, in the order of the output.
    """

    def __init__(self, columns: Mapping[str, str]) -> None:
        self._columns = dict(columns)
        self._shapes: list[Shape] = []
        self._hits: Counter[Shape] = Counter()
        self._scratch = _Scratch()
        self._usable = bool(columns) and set(columns.values()) <= set(_READERS)

    def read(self, payloads: pa.BinaryArray) -> list[ShapedRows]:
        """Read what can be read; a row of none of the answers is undecided."""
        if not self._usable or not len(payloads) or _size(payloads) > MAX_BYTES:
            return []
        chunk = _Chunk(payloads, self._scratch)
        undecided, found = chunk.plain, []
        tried = 0
        while undecided.any() and (tried < len(self._shapes) or self._learn(payloads, undecided)):
            shape = self._shapes[tried]
            rows = self._read(shape, chunk, np.flatnonzero(undecided))
            found += [rows] if len(rows.at) else []
            undecided[rows.at] = False
            self._hits[shape] += len(rows.at)
            tried += 1
        self._shapes.sort(key=lambda shape: -self._hits[shape])
        if tried == MAX_SHAPES and 2 * np.count_nonzero(undecided) > len(payloads):
            self._usable = False  # to try so many shapes costs more than it saves
        return found

    def _learn(self, payloads: pa.BinaryArray, undecided: Mask) -> bool:
        """Learn another shape, if there are rows enough for it to be worth it."""
        if len(self._shapes) == MAX_SHAPES or np.count_nonzero(undecided) * _WORTH < len(payloads):
            return False
        for at in np.flatnonzero(undecided)[:_TRIES].tolist():
            shape = learn(payloads[at].as_py(), self._columns)
            if shape is not None and shape not in self._shapes:
                self._shapes.append(shape)
                return True
        return False

    def _read(self, shape: Shape, chunk: _Chunk, rows: Ints) -> ShapedRows:
        walk = _Walk(chunk, rows)
        builds: dict[str, _Build] = {}
        for name, literal, after in zip(shape.names, shape.literals, shape.literals[1:], strict=False):
            walk.expect(literal)
            builds[name] = _READERS[self._columns[name]](walk, after)
        walk.expect(shape.literals[-1])
        kept = np.flatnonzero(walk.ok & (walk.at == walk.end))
        columns = {
            name: builds[name](kept) if name in builds else pa.nulls(len(kept), _ARROW[kind])
            for name, kind in self._columns.items()
        }
        return ShapedRows(rows[kept], columns)


def learn(payload: bytes, columns: Mapping[str, str]) -> Shape | None:
    """Take the shape from one payload: a flat object, each of its fields a column, once, and nothing escaped."""
    names: list[str] = []
    literals: list[bytes] = []
    at = 0
    while name := _NAME.match(payload, at):
        value = _VALUE.match(payload, name.end())
        if value is None or (name[1] == b"{") != (not names):
            return None
        names.append(name[2].decode(errors="replace"))
        literals.append(payload[at : name.end()])
        at = value.end()
    literals.append(payload[at:])
    whole = 0 < len(names) <= MAX_FIELDS and _END.fullmatch(literals[-1]) and max(map(len, literals)) <= MAX_LITERAL
    known = len(set(names)) == len(names) and set(names) <= set(columns)
    return Shape(tuple(names), tuple(literals)) if whole and known else None


class _Chunk:
    """Payloads in a buffer of their own.

    ``plain`` are the rows that have neither escapes nor control characters and are UTF-8.
    """

    def __init__(self, payloads: pa.BinaryArray, scratch: _Scratch) -> None:
        _, offsets, values = payloads.buffers()
        count = len(payloads)
        edges = np.frombuffer(offsets, np.int32)[payloads.offset : payloads.offset + count + 1].astype(np.int64)
        first, last = int(edges[0]), int(edges[-1])
        data = scratch.take("data", last - first + 2 * _SLACK, np.uint8)
        body = data[_SLACK : _SLACK + last - first]
        body[:] = np.frombuffer(values, np.uint8)[first:last]
        edges += _SLACK - first
        marks = scratch.take("marks", len(data), np.bool_)
        self.text = Text(data, marks)
        self.starts, self.ends = edges[:-1], edges[1:]
        self.plain = _plain(payloads, body, edges - _SLACK, marks[: len(body)])


class _Scratch:
    """Arrays that chunk after chunk uses: a fresh megabyte for each costs more than what is done with it."""

    def __init__(self) -> None:
        self._held: dict[str, npt.NDArray[Any]] = {}

    def take(self, name: str, size: int, kind: npt.DTypeLike) -> npt.NDArray[Any]:
        """Return an array with whatever the last chunk left in it."""
        if name not in self._held or len(self._held[name]) < size:
            self._held[name] = np.zeros(size + size // 8, kind)
        return self._held[name][:size]


def _plain(payloads: pa.BinaryArray, body: npt.NDArray[np.uint8], edges: Ints, marks: Mask) -> Mask:
    plain = np.ones(len(payloads), np.bool_) if payloads.null_count == 0 else mask_of(payloads.is_valid())
    if not len(body):
        return plain
    # least and greatest byte, each found in a pass that writes nothing: most chunks have no byte outside
    if body.min() < _SPACE:
        plain[_rows_of(np.less(body, _SPACE, out=marks), edges)] = False
    if np.equal(body, _BACKSLASH, out=marks).any():
        plain[_rows_of(marks, edges)] = False
    if body.max() > 0x7F:
        rows = np.unique(_rows_of(np.greater(body, 0x7F, out=marks), edges))
        if len(rows) > _FEW and _is_utf8(payloads):
            return plain
        plain[[i for i in rows.tolist() if not _is_utf8(payloads.slice(i, 1))]] = False
    return plain


def _rows_of(marked: Mask, edges: Ints) -> Ints:
    """The rows in which bytes are marked, once for each byte."""
    whole = len(marked) // 8 * 8
    eights = np.flatnonzero(marked[:whole].view(np.uint64) != 0)  # few are marked: most words are zero
    at = (eights[:, None] << 3) + np.arange(8)
    at = np.append(at[marked[at]], np.flatnonzero(marked[whole:]) + whole)
    return np.searchsorted(edges, at, "right") - 1


def _size(payloads: pa.BinaryArray) -> int:
    bounds = memoryview(payloads.buffers()[1]).cast("i")
    return int(bounds[payloads.offset + len(payloads)] - bounds[payloads.offset])


def _is_utf8(payloads: pa.BinaryArray) -> bool:
    try:
        payloads.cast(pa.string())
    except pa.ArrowInvalid:
        return False
    return True


class _Walk:
    """Where rows stand on their way through a shape.

    ``at`` is a position; ``ok`` says whether the row is still decided. A row that is not goes on with the others. One
    that is led past its end never comes to stand there again: all values that begin behind it are too short.
    """

    def __init__(self, chunk: _Chunk, rows: Ints) -> None:
        every = len(rows) == len(chunk.starts)
        self._text = chunk.text
        self.at = chunk.starts if every else chunk.starts[rows]
        self.end = chunk.ends if every else chunk.ends[rows]
        self.ok: Mask = np.ones(len(rows), np.bool_)

    def expect(self, literal: bytes) -> None:
        """Go on behind a literal."""
        self._place = len(literal)
        self._window = self._text.window(self.at, self._place + 1 + REACH)
        self.ok &= self._window.is_at(0, literal)
        self.at = self.at + self._place

    def read_text(self, after: bytes) -> tuple[Values, Mask | None]:
        """Go on behind a text, or null, which ``after`` follows.

        :return: the texts without their quotes, and which are null (None: none is).
        """
        opens = self._window.byte(self._place) == _QUOTE
        start = self.at + 1
        found = self._text.next_quote(start)
        stop = np.minimum(found, self.end)
        if (opens >= self.ok).all():  # but for rows that are undecided already
            self.at = stop + 1
            return Values(self._text, self._window, self._place + 1, start, stop - start), None
        bare = self._bare_size(found, after)
        self.ok &= opens | self._is(b"null", bare)
        self.at = np.where(opens, stop + 1, self.at + bare)
        return Values(self._text, self._window, self._place + 1, start, (stop - start) * opens), ~opens

    def read_bare(self, after: bytes) -> tuple[Values, Mask | None]:
        """Go on behind a value without quotes, which ``after`` follows.

        :return: the values, and which are null (None: none is).
        """
        start, size = self.at, self._bare_size(self._text.next_quote(self.at), after)
        self.at = start + size
        lacks: Mask = self._window.byte(self._place) == _LETTER_N
        missing = lacks & self._is(b"null", size) if lacks.any() else None
        return Values(self._text, self._window, self._place, start, size), missing

    def read_bool(self, after: bytes) -> tuple[Mask, Mask | None]:
        """Go on behind true, false or null.

        :return: which are true, and which are null (None: none is).
        """
        values, missing = self.read_bare(after)
        true = self._is(b"true", values.size)
        known = true | self._is(b"false", values.size)
        self.ok &= known if missing is None else known | missing
        return true, missing

    def _bare_size(self, quote: Ints, after: bytes) -> Ints:
        """The size of values without quotes that begin here; only what follows the last one has no quote."""
        end = np.minimum(quote - after.index(b'"'), self.end) if b'"' in after else self.end - len(after)
        return end - self.at

    def _is(self, literal: bytes, size: Ints) -> Mask:
        """Tell which values that begin at the window's place are a literal."""
        found: Mask = self._window.is_at(self._place, literal) & (size == len(literal))
        return found


def _read_string(walk: _Walk, after: bytes) -> _Build:
    values, missing = walk.read_text(after)

    def build(rows: Ints) -> pa.Array:
        texts = values.text.spans(values.start, values.start + values.size, rows)
        validity = None if missing is None else bits(~missing[rows])
        # the rows are known to be UTF-8
        return pa.Array.from_buffers(pa.string(), len(rows), [validity, *texts.buffers()[1:]])

    return build


def _read_bool(walk: _Walk, after: bytes) -> _Build:
    true, missing = walk.read_bool(after)
    return lambda rows: flags(true[rows], None if missing is None else missing[rows])


def _read_int64(walk: _Walk, after: bytes) -> _Build:
    values, missing = walk.read_bare(after)
    return _fitting(walk, *read_int64(values), missing, "int64")


def _read_float64(walk: _Walk, after: bytes) -> _Build:
    values, missing = walk.read_bare(after)
    return _fitting(walk, *read_float64(values, walk.ok), missing, "float64")


def _read_timestamp(walk: _Walk, after: bytes) -> _Build:
    values, missing = walk.read_text(after)
    return _fitting(walk, *read_timestamp(values), missing, "timestamp")


def _fitting(walk: _Walk, values: npt.NDArray[Any], fits: Mask, missing: Mask | None, kind: str) -> _Build:
    walk.ok &= fits if missing is None else fits | missing
    return lambda rows: numbers(values[rows], _ARROW[kind], None if missing is None else missing[rows])


_READERS: Mapping[str, Callable[[_Walk, bytes], _Build]] = {
    "int64": _read_int64,
    "float64": _read_float64,
    "string": _read_string,
    "bool": _read_bool,
    "timestamp": _read_timestamp,
}
