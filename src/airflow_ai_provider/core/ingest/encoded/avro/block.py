"""Read many Avro bodies of one schema at once, field by field, with numpy: fast, and never the judge.

How: all bodies lie in one buffer; each field is read for every body at that body's own position, so a broken body
cannot move its neighbours, and no native parser ever sees the bytes. What breaks a rule of :mod:`.avro_row`, or is rare
enough not to be worth columns, is left *undecided*: the caller reads that body by itself.

Invariants: a position never passes its body's end (a step that would is undone and the body undecided); columns hold
the decided bodies only; memory is that of the block and a few numbers per body.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from airflow_ai_provider.core.ingest.column import flags, mask_of, numbers, positions
from airflow_ai_provider.core.ingest.encoded.avro.schema import (
    Array,
    Enum,
    Leaf,
    Map,
    Node,
    Record,
    Union,
    arrow_type,
    is_null,
    parts,
    recurs,
)
from airflow_ai_provider.core.ingest.encoded.avro.values import UUID, bounds, struct_of, times_of, unscaled_limit

Ints: TypeAlias = npt.NDArray[np.int64]
Mask: TypeAlias = npt.NDArray[np.bool_]
Build: TypeAlias = Callable[[Mask], pa.Array]
"""Makes a column of the rows that a mask names."""

CHUNK = 16_384
"""Bodies that go through all fields together: their numbers stay in the processor's cache."""
SLACK = 16
"""Bytes behind the last body, so that a number may be loaded from any position without asking."""

_U = np.uint64
_HIGH, _LOW = _U(0x8080808080808080), _U(0x7F7F7F7F7F7F7F7F)
_FOLDS = (
    (_U(0x007F007F007F007F), _U(0x7F007F007F007F00), _U(1)),
    (_U(0x00003FFF00003FFF), _U(0x3FFF00003FFF0000), _U(2)),
    (_U(0x000000000FFFFFFF), _U(0x0FFFFFFF00000000), _U(4)),
)


class _MisfitError(Exception):
    """Some rows turned out not to fit when their column was made."""

    def __init__(self, rows: Mask) -> None:
        super().__init__("rows do not fit")
        self.rows = rows


@dataclass
class _Block:
    """The bytes, and the same bytes seen as numbers that begin at every byte."""

    data: npt.NDArray[np.uint8]

    def __post_init__(self) -> None:
        self.buffer = pa.py_buffer(self.data)
        self.words = self._seen_as("<u8", 8)
        self.floats = self._seen_as("<f4", 4)
        self.doubles = self._seen_as("<f8", 8)

    def _seen_as(self, kind: str, size: int) -> npt.NDArray[Any]:
        return np.ndarray((len(self.data) - size + 1,), kind, self.data.data, strides=(1,))


@dataclass
class _Cursor:
    """Where each row stands: ``at`` and ``end`` are positions, ``ok`` says whether it is still decided."""

    at: Ints
    end: Ints
    ok: Mask

    def move(self, at: Ints) -> None:
        """Go on to ``at``; a row for which that is past its end stays there, undecided."""
        over = at > self.end
        if over.any():
            self.ok &= ~over
            at = np.minimum(at, self.end)
        self.at = at

    def part(self, rows: Ints) -> _Cursor:
        return _Cursor(self.at[rows], self.end[rows], self.ok[rows])

    def put_back(self, rows: Ints, part: _Cursor) -> None:
        self.at[rows], self.ok[rows] = part.at, part.ok


def can_read(node: Node) -> bool:
    """True when a schema's bodies can be read this way: no lists, maps or recursion, no decimal above 38 digits."""
    if isinstance(node, Array | Map) or recurs(node):
        return False
    if isinstance(node, Leaf) and node.logical == "decimal":
        return node.precision <= 38
    return all(can_read(part) for part in parts(node))


def read_bodies(record: Record, data: npt.NDArray[np.uint8], starts: Ints, ends: Ints) -> tuple[pa.Table, Mask]:
    """Read bodies that lie in one buffer, in the order of their positions.

    :param data: the buffer, with :data:`SLACK` bytes behind the last body.
    :param starts: where each body begins; ``ends`` where it ends. No body overlaps the next.
    :return: the values of the decided bodies, in order; and which bodies are decided.
    """
    block = _Block(data)
    names = [f.name for f in record.fields]
    tables, masks = [], []
    for first in range(0, max(len(starts), 1), CHUNK):
        part = slice(first, first + CHUNK)
        end = ends[part]
        cursor = _Cursor(starts[part].copy(), end, np.ones(len(end), np.bool_))
        builds = [_read(field.node, block, cursor) for field in record.fields]
        ok = cursor.ok & (cursor.at == end)
        columns = _build_all(builds, ok)
        tables.append(pa.Table.from_arrays(columns, names=names) if names else pa.table({}))
        masks.append(ok)
    return pa.concat_tables(tables), np.concatenate(masks)


def _build_all(builds: Sequence[Build], ok: Mask) -> list[pa.Array]:
    """Make the columns; a row that does not fit after all is taken from all of them."""
    while True:
        try:
            return [build(ok) for build in builds]
        except _MisfitError as misfit:
            ok &= ~misfit.rows


def _read(node: Node, block: _Block, cursor: _Cursor) -> Build:
    if isinstance(node, Record):
        return _read_record(node, block, cursor)
    if isinstance(node, Union):
        return _read_union(node, block, cursor)
    if isinstance(node, Enum):
        return _read_enum(node, block, cursor)
    assert isinstance(node, Leaf)
    return _LEAVES[node.kind](node, block, cursor)


def _read_record(node: Record, block: _Block, cursor: _Cursor) -> Build:
    builds = [_read(field.node, block, cursor) for field in node.fields]
    type_ = arrow_type(node)
    return lambda keep: struct_of(type_, [build(keep) for build in builds], np.zeros(int(keep.sum()), np.bool_))


def _read_union(node: Union, block: _Block, cursor: _Cursor) -> Build:
    chosen = _read_number(block, cursor)
    cursor.ok &= (chosen >= 0) & (chosen < len(node.branches))
    branches: list[tuple[Mask, Build]] = []
    for index, branch in enumerate(node.branches):
        if is_null(branch):
            continue
        mine = (chosen == index) & cursor.ok
        if mine.all():
            branches.append((mine, _read(branch, block, cursor)))
            continue
        rows = np.flatnonzero(mine)
        part = cursor.part(rows)
        build = _read(branch, block, part)
        cursor.put_back(rows, part)
        branches.append((mine, _spread(build, mine, rows)))
    if len(branches) == 1:
        return branches[0][1]
    if not branches:
        return lambda keep: pa.nulls(int(keep.sum()))
    type_ = arrow_type(node)
    some = np.logical_or.reduce([mine for mine, _ in branches])
    return lambda keep: struct_of(type_, [build(keep) for _, build in branches], ~some[keep])


def _spread(build: Build, mine: Mask, rows: Ints) -> Build:
    """A column over all rows, null but where ``mine``, from one over the rows that are."""

    def spread(keep: Mask) -> pa.Array:
        try:
            values = build(keep[rows])
        except _MisfitError as misfit:
            everywhere = np.zeros(len(keep), np.bool_)
            everywhere[rows] = misfit.rows
            raise _MisfitError(everywhere) from None
        here = mine[keep]
        return values.take(positions(np.cumsum(here) - 1, ~here))

    return spread


def _read_enum(node: Enum, block: _Block, cursor: _Cursor) -> Build:
    index = _read_number(block, cursor)
    cursor.ok &= (index >= 0) & (index < len(node.symbols))
    symbols = pa.array(node.symbols, pa.string())
    return lambda keep: symbols.take(positions(index[keep]))


def _read_null(node: Leaf, block: _Block, cursor: _Cursor) -> Build:
    return lambda keep: pa.nulls(int(keep.sum()))


def _read_boolean(node: Leaf, block: _Block, cursor: _Cursor) -> Build:
    value = block.data[cursor.at]
    cursor.ok &= value < 2
    cursor.move(cursor.at + 1)
    return lambda keep: flags(value[keep] == 1)


def _read_whole(node: Leaf, block: _Block, cursor: _Cursor) -> Build:
    value = _read_number(block, cursor)
    least, greatest = bounds(node)
    if node.kind == "int" or node.logical:
        cursor.ok &= (value >= least) & (value <= greatest)
    if node.logical:
        return lambda keep: times_of(node, numbers(value[keep], pa.int64()))
    return lambda keep: numbers(value[keep], pa.int64())


def _read_float(node: Leaf, block: _Block, cursor: _Cursor) -> Build:
    # a row at its end loads bytes that are not its own; moving on then leaves it undecided
    with np.errstate(invalid="ignore"):  # a signalling NaN is as good a NaN as any
        value = (block.floats if node.kind == "float" else block.doubles)[cursor.at].astype(np.float64)
    cursor.move(cursor.at + (4 if node.kind == "float" else 8))
    return lambda keep: numbers(value[keep], pa.float64())


def _read_sized(node: Leaf, block: _Block, cursor: _Cursor) -> Build:
    size = _read_number(block, cursor)
    fits = (size >= 0) & (size <= cursor.end - cursor.at)
    if not fits.all():
        cursor.ok &= fits
        size = np.where(fits, size, 0)
    return _spans(node, block, cursor, size)


def _read_fixed(node: Leaf, block: _Block, cursor: _Cursor) -> Build:
    size = np.minimum(node.size, cursor.end - cursor.at)
    cursor.ok &= size == node.size
    return _spans(node, block, cursor, size)


def _spans(node: Leaf, block: _Block, cursor: _Cursor, size: Ints) -> Build:
    start = cursor.at
    cursor.at = start + size
    if node.logical == "decimal":
        return _decimals(node, block, cursor, start, size)
    if node.kind == "string":
        return lambda keep: _texts(node, _gather(block, start, size, keep), keep)
    if node.kind == "bytes":
        return lambda keep: _gather(block, start, size, keep)

    def fixed(keep: Mask) -> pa.Array:
        values = _gather(block, start, size, keep)
        return pa.Array.from_buffers(pa.binary(node.size), len(values), [None, values.buffers()[2]])

    return fixed


def _gather(block: _Block, start: Ints, size: Ints, keep: Mask) -> pa.Array:
    """Copy spans of the buffer together: of an array of spans and the gaps between them, every second is taken."""
    edges = np.empty(2 * len(start), np.int32)
    edges[0::2], edges[1::2] = start, start + size
    spans = pa.Array.from_buffers(pa.binary(), max(len(edges) - 1, 0), [None, pa.py_buffer(edges), block.buffer])
    return spans.take(positions(2 * np.flatnonzero(keep)))


def _texts(node: Leaf, values: pa.Array, keep: Mask) -> pa.Array:
    try:
        texts = values.cast(pa.string())
    except pa.ArrowInvalid:
        bad = np.array([not _is_utf8(value) for value in values.to_pylist()], np.bool_)
    else:
        if node.logical != "uuid":
            return texts
        bad = ~mask_of(pc.match_substring_regex(texts, UUID))
        if not bad.any():
            return texts
    rows = np.zeros(len(keep), np.bool_)
    rows[np.flatnonzero(keep)[bad]] = True
    raise _MisfitError(rows)


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def _decimals(node: Leaf, block: _Block, cursor: _Cursor, start: Ints, size: Ints) -> Build:
    """Up to 16 bytes, most significant first, to the 16 bytes of a decimal128, least significant first."""
    cursor.ok &= (size > 0) & (size <= 16)
    sign = np.where(block.data[start] > 0x7F, 0xFF, 0).astype(np.uint8)
    bytes_ = np.empty((len(start), 16), np.uint8)
    for i in range(16):
        inside = i < size
        bytes_[:, i] = np.where(inside, block.data[np.where(inside, start + size - 1 - i, 0)], sign)
    low, high = bytes_.view("<u8")[:, 0], bytes_.view("<i8")[:, 1]
    cursor.ok &= ~_exceeds(high, low, unscaled_limit(node))

    def build(keep: Mask) -> pa.Array:
        kept = np.ascontiguousarray(bytes_[keep])
        return pa.Array.from_buffers(arrow_type(node), len(kept), [None, pa.py_buffer(kept)])

    return build


def _exceeds(high: npt.NDArray[np.int64], low: npt.NDArray[np.uint64], limit: int) -> Mask:
    """Tell which 128-bit numbers lie outside ±limit."""
    top, bottom = (np.int64(v >> 64) for v in (limit, -limit))
    top_low, bottom_low = (_U(v & 0xFFFF_FFFF_FFFF_FFFF) for v in (limit, -limit))
    above = (high > top) | ((high == top) & (low > top_low))
    below = (high < bottom) | ((high == bottom) & (low < bottom_low))
    result: Mask = above | below
    return result


def _read_number(block: _Block, cursor: _Cursor) -> Ints:
    """Read a zigzag varint of at most 64 bits at every row's position."""
    at = cursor.at
    first = block.data[at]
    if not (first & 0x80).any():
        cursor.move(at + 1)
        small = first.astype(np.int64)
        return (small >> 1) ^ -(small & 1)
    word = block.words[at]
    stop = ~word & _HIGH
    stop &= ~stop + _U(1)  # the high bit of the byte that ends the number; 0: none of these eight does
    count = (np.bitwise_count(stop - _U(1)).astype(np.int64) + 1) >> 3
    value = word & (stop - _U(1)) & _LOW
    needless = (word & (stop - (stop >> _U(7))) == 0) & (count > 1)
    for keep, move, by in _FOLDS:
        value = (value & keep) | ((value & move) >> by)
    rows = np.flatnonzero(stop == 0)
    if len(rows):
        needless[rows] = _finish_long(block, at, rows, value, count)
    if needless.any():
        cursor.ok &= ~needless
    cursor.move(at + count)
    number: Ints = ((value >> _U(1)) ^ (~(value & _U(1)) + _U(1))).view(np.int64)
    return number


def _finish_long(block: _Block, at: Ints, rows: Ints, value: npt.NDArray[np.uint64], count: Ints) -> Mask:
    """Add the ninth and tenth byte of long numbers; tells which of them are not well written."""
    ninth, tenth = block.data[at[rows] + 8].astype(_U), block.data[at[rows] + 9].astype(_U)
    more = ninth > 0x7F
    value[rows] |= (ninth & _U(0x7F)) << _U(56)
    value[rows] |= np.where(more, tenth & _U(1), _U(0)) << _U(63)
    count[rows] = np.where(more, 10, 9)
    wrong: Mask = np.where(more, tenth != 1, ninth == 0)
    return wrong


_LEAVES: dict[str, Callable[[Leaf, _Block, _Cursor], Build]] = {
    "null": _read_null,
    "boolean": _read_boolean,
    "int": _read_whole,
    "long": _read_whole,
    "float": _read_float,
    "double": _read_float,
    "bytes": _read_sized,
    "string": _read_sized,
    "fixed": _read_fixed,
}
