"""Numbers and times from their text, for many rows at once: eight characters of a row are one machine word.

Invariants: what is said to fit has the value that the JSON path's own parser gives, to the last bit; whatever is rare
or doubtful is said not to fit, and read by that parser; a position outside the text's slack is never loaded.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from airflow_ai_provider.core.ingest.column import positions

Ints: TypeAlias = npt.NDArray[np.int64]
Words: TypeAlias = npt.NDArray[np.uint64]
Mask: TypeAlias = npt.NDArray[np.bool_]

REACH = 32
"""Bytes before and behind a text that reading it may load."""
_U = np.uint64
_ZEROS, _OVER_9, _HIGH = _U(0x3030303030303030), _U(0x7676767676767676), _U(0x8080808080808080)
_ONES, _DOTS = _U(0x0101010101010101), _U(0x2E2E2E2E2E2E2E2E)
_MINUS, _DOT, _ZERO, _PLUS, _LETTER_Z = b"-.0+Z"
_POWERS = 10 ** np.arange(17, dtype=np.int64)
_EXACT_POWERS = 10.0 ** np.arange(9)
_MOST = _U(2**63 - 1)
_NUMBER = r"^-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?$"
_DATE = (_U(0xFF0000FF00000000), _U(0x2D00002D00000000), _U(0x00FFFF00FFFFFFFF))
_CLOCK = (_U(0x0000FF0000FF0000), _U(0x00003A0000540000), _U(0xFFFF00FFFF00FFFF))
_SECOND = (_U(0x00000000000000FF), _U(0x000000000000003A), _U(0x0000000000FFFF00))
"""``2026-01-``, ``31T23:59``, ``:59``: where each word of a time has its marks, which marks, and where its digits."""
_MONTH_STARTS = np.arange("0001-01", "10000-02", dtype="datetime64[M]").astype("datetime64[D]").astype(np.int64)
_LONGEST = 400
"""Characters of a number that Arrow is asked to read."""


class Text:
    """Bytes, and the same bytes as words that begin at every byte.

    :param data: with :data:`REACH` bytes before the first text and behind the last.
    """

    def __init__(self, data: npt.NDArray[np.uint8]) -> None:
        self.data, self.buffer = data, pa.py_buffer(data)
        self.words: Words = np.ndarray((len(data) - 7,), "<u8", data.data, strides=(1,))

    def is_at(self, at: Ints, literal: bytes) -> Mask:
        """Tell at which positions a literal stands."""
        size = len(literal)
        if size < 8:
            mask = _U((1 << 8 * size) - 1)
            short: Mask = (self.words[at] & mask) == _U(int.from_bytes(literal, "little"))
            return short
        found: Mask = np.ones(len(at), np.bool_)
        for offset in [*range(0, size - 8, 8), size - 8]:
            found &= self.words[at + offset] == _U(int.from_bytes(literal[offset : offset + 8], "little"))
        return found

    def spans(self, start: Ints, end: Ints, rows: Ints) -> pa.Array:
        """Copy the spans of some rows together: of an array of spans and the gaps between them, every second is taken.

        :param rows: whose spans lie inside the texts, each behind the one before.
        """
        count = len(rows)
        edges = np.empty(2 * count, np.int32)
        edges[0::2], edges[1::2] = start[rows], end[rows]
        spans = pa.Array.from_buffers(pa.binary(), max(2 * count - 1, 0), [None, pa.py_buffer(edges), self.buffer])
        return spans.take(positions(np.arange(0, 2 * count, 2)))


def read_int64(text: Text, at: Ints, end: Ints) -> tuple[Ints, Mask]:
    """Read integers as JSON writes them, within 64 bits.

    :return: values, and which rows fit.
    """
    minus = text.data[at] == _MINUS
    first = at + minus
    size = end - first
    fits = (size > 0) & (size <= 19) & ((size == 1) | (text.data[first] != _ZERO))
    value = np.zeros(len(at), np.uint64)
    for low in (0, 8, 16):
        count = np.clip(size - low, 0, 8)
        if low and not count.any():
            break
        part, plain = _digits(text.words[end - low - count], count)
        value += part * _U(10**low)
        fits &= plain
    fits &= value <= _MOST
    return _signed(value.view(np.int64), minus), fits


def read_float64(text: Text, at: Ints, end: Ints, among: Mask) -> tuple[npt.NDArray[np.float64], Mask]:
    """Read numbers as JSON writes them, rounded to the nearest.

    Up to eight digits before the dot and eight behind it, below 2**53 without it: an integer and a power of ten that a
    float64 holds exactly, whose quotient is rounded once, as it should be. Others go to Arrow's parser.

    :param among: rows that are worth asking it.
    :return: values, and which rows fit.
    """
    minus = text.data[at] == _MINUS
    first = at + minus
    size = end - first
    word = text.words[first]
    dots = word ^ _DOTS
    dots = (dots - _ONES) & ~dots & _HIGH
    whole_count = np.minimum((np.bitwise_count((dots & (~dots + _U(1))) - _U(1)) >> 3).astype(np.int64), size)
    part_count = np.maximum(size - whole_count - 1, 0)
    whole, plain = _digits(word, np.clip(whole_count, 0, 8))
    fits = plain & (whole_count > 0) & ((whole_count == 1) | (text.data[first] != _ZERO)) & (part_count <= 8)
    fits &= (size == whole_count) | ((part_count > 0) & (text.data[first + np.clip(whole_count, 0, 8)] == _DOT))
    part_count = np.minimum(part_count, 8)
    part, plain = _digits(text.words[end - part_count], part_count)
    digits = whole.view(np.int64) * _POWERS[part_count] + part.view(np.int64)
    fits &= plain & (digits <= 2**53)
    value = _signed(digits / _EXACT_POWERS[part_count], minus)
    others = np.flatnonzero(among & ~fits)
    if len(others):
        value[others], fits[others] = _read_long(text, at[others], end[others])
    return value, fits


def read_timestamp(text: Text, at: Ints, end: Ints) -> tuple[Ints, Mask]:
    """Read ``2026-01-31T23:59:59``, with up to six digits of the second's fraction, in UTC or without an offset.

    :return: microseconds since 1970, and which rows fit.
    """
    size = end - at - _offset_size(text, at, end)
    date, fits = _marked(text.words[at], *_DATE)
    clock, fine = _marked(text.words[at + 8], *_CLOCK)
    fits &= fine
    second, fine = _marked(text.words[at + 16], *_SECOND)
    fits &= fine
    second //= 100_000
    day, minute = clock // 1_000_000, clock % 1000
    hour = clock // 1000 - day * 1000
    month = date // 10_000 * 12 + date % 10_000 // 10 - 13  # since January of the year 1
    fits &= (date >= 10_000) & (date % 10_000 > 9) & (date % 10_000 < 130)
    month[~fits] = 0
    start = _MONTH_STARTS[month]
    fits &= (day > 0) & (day <= _MONTH_STARTS[month + 1] - start) & (hour < 24) & (minute < 60) & (second < 60)
    count = np.clip(size - 20, 0, 6)
    fits &= (size == 19) | ((size == count + 20) & (count > 0) & (text.data[at + 19] == _DOT))
    part, fine = _digits(text.words[at + 20], count)
    micros = part.view(np.int64) * _POWERS[6 - count]
    return (((start + day - 1) * 24 + hour) * 60 + minute) * 60_000_000 + second * 1_000_000 + micros, fits & fine


def _offset_size(text: Text, at: Ints, end: Ints) -> Ints:
    zoned: Ints = (text.data[end - 1] == _LETTER_Z).astype(np.int64)
    longer = (end - at > 24) & (text.data[end - 6] == _PLUS)
    if longer.any():
        zoned[longer & text.is_at(end - 6, b"+00:00")] = 6
    return zoned


def _read_long(text: Text, at: Ints, end: Ints) -> tuple[npt.NDArray[np.float64], Mask]:
    """Read numbers that have more digits, or an exponent."""
    found = np.full(len(at), np.nan)
    leads = text.data[at + (text.data[at] == _MINUS)] - np.uint8(_ZERO)  # below "0" it wraps around
    rows = np.flatnonzero((leads < 10) & (end > at) & (end - at <= _LONGEST))
    try:
        texts = text.spans(at, end, rows).cast(pa.string())
        written = pc.match_substring_regex(texts, _NUMBER)  # Arrow reads more than JSON may write
        values = pc.if_else(written, texts, pa.scalar(None, pa.string())).cast(pa.float64())
        found[rows] = pc.fill_null(values, np.nan).to_numpy(zero_copy_only=False)
    except pa.ArrowInvalid:
        return found, np.zeros(len(at), np.bool_)
    return found, np.isfinite(found)


def _digits(words: Words, count: Ints) -> tuple[Words, Mask]:
    """Read the first ``count`` (0 to 8) bytes of each word as digits; tells which are."""
    bare = (words ^ _ZEROS) << ((8 - count) << 3).astype(np.uint64)
    return _combined(bare), (((bare + _OVER_9) | bare) & _HIGH) == 0


def _marked(words: Words, where: np.uint64, marks: np.uint64, digits: np.uint64) -> tuple[Ints, Mask]:
    """Read eight bytes with marks between digits as one number, a mark as 0; tells which have just these marks."""
    bare = (words ^ _ZEROS) & digits
    fits = ((words & where) == marks) & ((((bare + _OVER_9) | bare) & _HIGH) == 0)
    return _combined(bare).view(np.int64), fits


def _combined(digits: Words) -> Words:
    """Eight digits, one a byte, the first lowest, to the number that they are."""
    pairs = digits * _U(10) + (digits >> _U(8))
    high = (pairs & _U(0x000000FF000000FF)) * _U(0x000F424000000064)
    low = ((pairs >> _U(16)) & _U(0x000000FF000000FF)) * _U(0x0000271000000001)
    number: Words = (high + low) >> _U(32)
    return number


def _signed(value: Any, minus: Mask) -> Any:
    return np.where(minus, -value, value) if minus.any() else value
