"""Numbers and times from their text, for many rows at once: eight characters of a row are one machine word.

Invariants: what is said to fit has the value that the JSON path's own parser gives, to the last bit; whatever is rare
or doubtful is said not to fit, and read by that parser; a position outside the text's slack is never loaded.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from airflow_ai_provider.core.ingest.column import positions

Ints: TypeAlias = npt.NDArray[np.int64]
Words: TypeAlias = npt.NDArray[np.uint64]
Mask: TypeAlias = npt.NDArray[np.bool_]

REACH = 40
"""Bytes before and behind a text that reading it may load."""
_U = np.uint64
_ZEROS, _OVER_9, _HIGH = _U(0x3030303030303030), _U(0x7676767676767676), _U(0x8080808080808080)
_TEN, _EIGHT, _SIXTEEN, _HALF = _U(10), _U(8), _U(16), _U(32)
_PAIRS, _HIGH_PAIRS, _LOW_PAIRS = _U(0x000000FF000000FF), _U(0x000F424000000064), _U(0x0000271000000001)
_ONES, _DOTS = _U(0x0101010101010101), _U(0x2E2E2E2E2E2E2E2E)
_QUOTE, _MINUS, _DOT, _ZERO, _PLUS, _LETTER_Z = b'"-.0+Z'
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
    """Bytes, and the quotes in them.

    :param data: with :data:`REACH` bytes before the first text and behind the last, and 128 more at the end.
    :param marks: room for as many marks: a fresh megabyte would cost more than what is done with it.
    """

    def __init__(self, data: npt.NDArray[np.uint8], marks: Mask) -> None:
        self.data, self.buffer = data, pa.py_buffer(data)
        whole = len(data) // 64 * 64  # what is behind is slack
        np.equal(data, _QUOTE, out=marks)
        self._quotes = np.packbits(marks[:whole], bitorder="little").view(np.uint64)
        self._filled: Ints | None = None

    def window(self, at: Ints, width: int) -> Window:
        """Copy so many bytes of each row, from ``at`` on, side by side."""
        spans = np.ndarray((len(self.data) - width + 1,), f"V{width}", self.data.data, strides=(1,))
        return Window(spans[at])

    def next_quote(self, at: Ints) -> Ints:
        """Find the first quote at or behind each position; where there is none, the end of the bytes."""
        word, shift = at >> 6, (at & 63).view(np.uint64)
        near = (self._quotes[word] >> shift) | (self._quotes[word + 1] << (_U(64) - shift))
        found = at + _first_bit(near)
        far = np.flatnonzero(near == 0)
        if len(far):
            if self._filled is None:
                self._filled = np.append(np.flatnonzero(self._quotes), len(self._quotes) - 1)
            # the 64 positions from ``at`` on are known to be none: no quote of that word lies before them
            word = self._filled[np.searchsorted(self._filled[:-1], (at[far] >> 6) + 1)]
            found[far] = (word << 6) + _first_bit(self._quotes[word])
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


class Window:
    """Bytes of rows side by side: what stands at the same place of each is one column, and costs no gathering.

    :param bytes_: the same number of bytes of each row.
    """

    def __init__(self, bytes_: npt.NDArray[np.void]) -> None:
        self._bytes, self._width = bytes_, bytes_.dtype.itemsize

    def byte(self, place: int) -> npt.NDArray[np.uint8]:
        """The byte at a place, of each row."""
        return np.ndarray(self._bytes.shape, np.uint8, self._bytes.data, place, (self._width,))

    def word(self, place: int) -> Words:
        """The eight bytes from a place on, the first lowest, of each row."""
        return np.ndarray(self._bytes.shape, "<u8", self._bytes.data, place, (self._width,))

    def is_at(self, place: int, literal: bytes) -> Mask:
        """Tell in which rows a literal stands at a place; the window reaches eight bytes behind the place at least."""
        size = len(literal)
        if size < 8:
            mask = _U((1 << 8 * size) - 1)
            short: Mask = (self.word(place) & mask) == _U(int.from_bytes(literal, "little"))
            return short
        found: Mask = self.word(place) == _U(int.from_bytes(literal[:8], "little"))
        for offset in [*range(8, size - 8, 8), size - 8] if size > 8 else ():
            found &= self.word(place + offset) == _U(int.from_bytes(literal[offset : offset + 8], "little"))
        return found


class Values(NamedTuple):
    """One value of each row.

    :param text: where they lie.
    :param window: their bytes side by side, :data:`REACH` from ``place`` on.
    :param place: where in it each begins.
    :param start: where in the text each begins.
    :param size: how many bytes each has; of a row that went astray, any number.
    """

    text: Text
    window: Window
    place: int
    start: Ints
    size: Ints

    def bare_words(self, count: int) -> tuple[list[Words], Ints, Mask]:
        """So many words of each value, 8 bytes apart, behind its minus; the bytes left, and which have one."""
        minus = self.window.byte(self.place) == _MINUS
        words = [self.window.word(self.place + 8 * i) for i in range(count)]
        if not minus.any():
            return words, self.size, minus
        shift = minus.astype(np.uint64) << _U(3)
        words.append(self.window.word(self.place + 8 * count))
        # a shift by 64 leaves nothing
        moved = [(low >> shift) | (high << (_U(64) - shift)) for low, high in pairwise(words)]
        return moved, self.size - minus, minus


def read_int64(values: Values) -> tuple[Ints, Mask]:
    """Read integers as JSON writes them, within 64 bits.

    :return: values, and which rows fit.
    """
    words, size, minus = values.bare_words(3)
    fits = (size > 0) & (size <= 19) & ((size == 1) | (words[0] & _U(0xFF) != _ZERO))
    longest = size.max(initial=0)
    value, plain = _digits(words[0], np.minimum(size, 8))
    fits &= plain
    for number, word in enumerate(words[1:], 1):
        if longest > 8 * number:
            count = np.minimum(np.maximum(size - 8 * number, 0), 8)
            part, plain = _digits(word, count)
            value = value * _POWERS[count].view(np.uint64) + part
            fits &= plain
    fits &= value <= _MOST
    return _signed(value.view(np.int64), minus), fits


def read_float64(values: Values, among: Mask) -> tuple[npt.NDArray[np.float64], Mask]:
    """Read numbers as JSON writes them, rounded to the nearest.

    Up to seven digits before the dot and eight behind it, or eight digits, below 2**53 without the dot: an integer and
    a power of ten that a float64 holds exactly, whose quotient is rounded once, as it should be. Others go to Arrow's
    parser.

    :param among: rows that are worth asking it.
    :return: values, and which rows fit.
    """
    (word, behind), size, minus = values.bare_words(2)
    dots = word ^ _DOTS
    whole_count = np.minimum(_first_bit((dots - _ONES) & ~dots & _HIGH) >> 3, size)
    part_count = size - whole_count - 1
    # behind the whole digits stands nothing, or the dot, which is the first, and one digit at least
    fits = (part_count < 0) | ((part_count > 0) & (part_count <= 8) & (whole_count < 8))
    fits &= (whole_count > 0) & ((whole_count == 1) | (word & _U(0xFF) != _ZERO))
    part_count = np.minimum(np.maximum(part_count, 0), 8)
    shift = (whole_count << 3).view(np.uint64)
    if size.max(initial=0) <= 9:
        # eight digits at the most: without the dot they are one word
        kept = (_U(1) << shift) - _U(1)
        bare = (word & kept) | (((word >> _U(8)) | (behind << _U(56))) & ~kept)
        whole, plain = _digits(bare, whole_count + part_count)
        digits = whole.view(np.int64)
    else:
        whole, plain = _digits(word, whole_count)
        shift += _U(8)
        part, fine = _digits((word >> shift) | (behind << (_U(64) - shift)), part_count)
        digits = whole.view(np.int64) * _POWERS[part_count] + part.view(np.int64)
        fits &= fine & (digits <= 2**53)
    fits &= plain
    value = _signed(digits / _EXACT_POWERS[part_count], minus)
    others = np.flatnonzero(among & ~fits)
    if len(others):
        start = values.start[others]
        value[others], fits[others] = _read_long(values.text, start, start + values.size[others])
    return value, fits


def read_timestamp(values: Values) -> tuple[Ints, Mask]:
    """Read ``2026-01-31T23:59:59``, with up to six digits of the second's fraction, in UTC or without an offset.

    :return: microseconds since 1970, and which rows fit.
    """
    window, place = values.window, values.place
    size = values.size - _offset_size(values)
    date, fits = _marked(window.word(place), *_DATE)
    clock, fine = _marked(window.word(place + 8), *_CLOCK)
    fits &= fine
    second, fine = _marked(window.word(place + 16), *_SECOND)
    fits &= fine
    second //= 100_000
    hours = clock // 1000
    day = hours // 1000
    minute, hour = clock - hours * 1000, hours - day * 1000
    year = date // 10_000
    month = date - year * 10_000  # times ten
    fits &= (year > 0) & (month > 9) & (month < 130)
    month = (year * 12 + month // 10 - 13) * fits  # since January of the year 1
    start = _MONTH_STARTS[month]
    fits &= (day > 0) & (day <= _MONTH_STARTS[month + 1] - start) & (hour < 24) & (minute < 60) & (second < 60)
    count = np.minimum(np.maximum(size - 20, 0), 6)
    fits &= (size == 19) | ((size == count + 20) & (count > 0) & (window.byte(place + 19) == _DOT))
    part, fine = _digits(window.word(place + 20), count)
    micros = part.view(np.int64) * _POWERS[6 - count]
    return (((start + day - 1) * 24 + hour) * 60 + minute) * 60_000_000 + second * 1_000_000 + micros, fits & fine


def _offset_size(values: Values) -> Ints:
    data, end = values.text.data, values.start + values.size
    zoned: Ints = (data[end - 1] == _LETTER_Z).astype(np.int64)
    rows = np.flatnonzero(values.size > 24)
    rows = rows[data[end[rows] - 6] == _PLUS]
    if len(rows):
        zoned[rows[values.text.window(end[rows] - 6, 8).is_at(0, b"+00:00")]] = 6
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
    bare = (words ^ _ZEROS) << ((8 - count) << 3).view(np.uint64)
    return _combined(bare), (((bare + _OVER_9) | bare) & _HIGH) == 0


def _marked(words: Words, where: np.uint64, marks: np.uint64, digits: np.uint64) -> tuple[Ints, Mask]:
    """Read eight bytes with marks between digits as one number, a mark as 0; tells which have just these marks."""
    bare = (words ^ _ZEROS) & digits
    fits = ((words & where) == marks) & ((((bare + _OVER_9) | bare) & _HIGH) == 0)
    return _combined(bare).view(np.int64), fits


def _combined(digits: Words) -> Words:
    """Eight digits, one a byte, the first lowest, to the number that they are."""
    pairs = digits * _TEN
    pairs += digits >> _EIGHT
    number: Words = pairs & _PAIRS
    number *= _HIGH_PAIRS
    pairs >>= _SIXTEEN
    pairs &= _PAIRS
    pairs *= _LOW_PAIRS
    number += pairs
    number >>= _HALF
    return number


def _first_bit(words: Words) -> Ints:
    """The number of the lowest bit that is set; 64 where none is."""
    found: Ints = np.bitwise_count((words - _U(1)) & ~words).astype(np.int64)
    return found


def _signed(value: Any, minus: Mask) -> Any:
    return np.where(minus, -value, value) if minus.any() else value
