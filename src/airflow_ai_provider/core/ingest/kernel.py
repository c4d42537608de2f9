"""Verdicts of the common expectations by Arrow's own functions: what Great Expectations would say, but sooner.

Invariants: a kernel answers only where its answer is known to be Great Expectations' own, for these arguments and this
column's type; everywhere else it declines (None), and Great Expectations is asked. ``tests/properties`` holds each one
against Great Expectations itself.
"""

from __future__ import annotations

import datetime as dt
import math
import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from airflow_ai_provider.core.ingest.column import flags, mask_of

Mask: TypeAlias = "pa.Array | pa.ChunkedArray"
Kernel: TypeAlias = Callable[[pa.ChunkedArray, Mapping[str, Any]], "Mask | None"]
_EXACT = 2**53
"""Below it a float is the integer that it stands for; from here on comparisons depend on who converts what."""


def find_broken(type_: str, arguments: Mapping[str, Any], column: pa.ChunkedArray) -> Mask | None:
    """Find the rows that break an expectation.

    :param arguments: the expectation's own arguments, as Great Expectations has read them.
    :param column: the values, Arrow-typed as :mod:`.decode` leaves them.
    :return: true for each row that breaks it; None when only Great Expectations can tell.
    """
    kernel = _KERNELS[type_][1]
    broken = kernel(column, arguments)
    return None if broken is None else pc.fill_null(broken, False)


def arguments_of(type_: str, given: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return the names of the arguments that a kernel reads; None when it knows the type or an argument not.

    :param given: the arguments as the suite has them.
    """
    if type_ not in _KERNELS:
        return None
    names = _KERNELS[type_][0]
    known = {*names, "column", "mostly"}
    return names if set(given) <= known and given.get("mostly", 1) == 1 else None


def _not_null(column: pa.ChunkedArray, arguments: Mapping[str, Any]) -> Mask | None:
    return pc.is_null(column)


def _null(column: pa.ChunkedArray, arguments: Mapping[str, Any]) -> Mask | None:
    return pc.is_valid(column)


def _between(column: pa.ChunkedArray, arguments: Mapping[str, Any]) -> Mask | None:
    low, high = arguments["min_value"], arguments["max_value"]
    given = [bound for bound in (low, high) if bound is not None]
    if pt.is_timestamp(column.type) and column.type.unit == "us":
        if not all(type(bound) is dt.datetime and bound.tzinfo is None for bound in given):
            return None
        plain = column.cast(pa.timestamp("us"))
    elif pt.is_int64(column.type) or pt.is_float64(column.type):
        # a float from 2**53 on is more than one integer: who compares, and as what, would decide
        if not all(type(bound) in (int, float) and abs(bound) < _EXACT for bound in given):
            return None
        plain = column
    else:
        return None
    return _outside(plain, low, high, arguments)


def _lengths_between(column: pa.ChunkedArray, arguments: Mapping[str, Any]) -> Mask | None:
    low, high = arguments["min_value"], arguments["max_value"]
    if not _is_text(column) or not all(type(b) is int and abs(b) < 2**31 for b in (low, high) if b is not None):
        return None
    return _outside(pc.utf8_length(column).cast(pa.int64()), low, high, arguments)


def _outside(values: pa.ChunkedArray, low: Any, high: Any, arguments: Mapping[str, Any]) -> Mask | None:
    strict = arguments["strict_min"], arguments["strict_max"]
    if not all(type(flag) is bool for flag in strict) or (low is None and high is None):
        return None
    if low is not None and high is not None and low > high:
        return None  # an error of Great Expectations' own
    inside = None
    if low is not None:
        over, round_ = (pc.greater, math.floor) if strict[0] else (pc.greater_equal, math.ceil)
        inside = over(values, _scalar(low, values.type, round_))
    if high is not None:
        below, round_ = (pc.less, math.ceil) if strict[1] else (pc.less_equal, math.floor)
        under = below(values, _scalar(high, values.type, round_))
        inside = under if inside is None else pc.and_(inside, under)
    return pc.invert(inside)  # NaN is neither above nor below: outside


def _scalar(bound: Any, type_: pa.DataType, to_integer: Callable[[float], int]) -> pa.Scalar:
    """Bring a bound to the column's type; of an integer column to the integer that divides it in the same place."""
    return pa.scalar(to_integer(bound) if pt.is_int64(type_) else bound, type_)


def _lengths_equal(column: pa.ChunkedArray, arguments: Mapping[str, Any]) -> Mask | None:
    value = arguments["value"]
    if not _is_text(column) or type(value) not in (int, float) or not math.isfinite(value):
        return None
    return pc.not_equal(pc.utf8_length(column).cast(pa.float64()), float(value))


def _not_in_set(column: pa.ChunkedArray, arguments: Mapping[str, Any]) -> Mask | None:
    values = arguments["value_set"]
    kind = str if _is_text(column) else int if pt.is_int64(column.type) else None
    # only sets whose members all have the column's own type: True is 1, and 1 is "1" to some
    if kind is None or not isinstance(values, list) or not values or any(type(v) is not kind for v in values):
        return None
    try:
        members = pa.array(values, column.type)
    except (pa.ArrowInvalid, OverflowError, UnicodeEncodeError):
        return None
    return pc.and_(pc.invert(pc.is_in(column, members)), pc.is_valid(column))


def _in_set(column: pa.ChunkedArray, arguments: Mapping[str, Any]) -> Mask | None:
    outside = _not_in_set(column, arguments)
    return None if outside is None else pc.and_(pc.invert(outside), pc.is_valid(column))


def _no_match(column: pa.ChunkedArray, arguments: Mapping[str, Any]) -> Mask | None:
    matched = _match(column, arguments)
    return None if matched is None else pc.invert(matched)


# What means the same to RE2 and to Python's re, for the texts that _match lets through: no group but a plain one, no
# escape but of punctuation and \n \t \r \d \D \w \W \b \B, no class within a class, no possessive quantifier.
_PLAIN_PATTERN = re.compile(r"(?:[^\\\[\](){}?*+]|\\[^A-Za-z0-9]|\\[ntrdDwWbB]|\[(?:[^\\\[\]]|\\[^A-Za-z0-9]|\\[ntrdDwW])+\]|\((?!\?)|\)|(?:[?*+]|\{[0-9]+(?:,[0-9]*)?\})(?![?*+{]))*")  # fmt: skip  # noqa: E501
_ASCII_ONLY = re.compile(r"\\[dDwWbB]")


def _match(column: pa.ChunkedArray, arguments: Mapping[str, Any]) -> Mask | None:
    """Match by RE2 where pandas, below Great Expectations, would; it asks Python's ``re`` for other texts."""
    pattern = arguments["regex"]
    if not _is_text(column) or not isinstance(pattern, str) or not _PLAIN_PATTERN.fullmatch(pattern):
        return None
    ascii_only, one_line = _ASCII_ONLY.search(pattern), "$" in pattern
    for text in _texts(column) if ascii_only or one_line else ():
        if (ascii_only and not text.isascii()) or (one_line and b"\n" in text):
            return None
    try:
        places = _places(pattern)
        return _match_places(column, places) if places is not None else pc.match_substring_regex(column, pattern)
    except (re.error, pa.ArrowInvalid, UnicodeEncodeError):
        return None


# a pattern of places, each one character: ^reading-[0-9]{9}$; its characters are ASCII, and so is all that it matches
_ATOM = r"(?:[A-Za-z0-9 _,;:/@#%&=<>~!'\"-]|\\[^A-Za-z0-9]|\[(?!\^)[^\\\[\]]+\])"
_PLACES = re.compile(rf"\^((?:{_ATOM}(?:\{{[0-9]{{1,2}}\}})?)+)\$", re.ASCII)
_PLACE = re.compile(rf"({_ATOM})(?:\{{([0-9]{{1,2}})\}})?", re.ASCII)


@lru_cache(maxsize=256)
def _places(pattern: str) -> npt.NDArray[np.bool_] | None:
    """For each place of a pattern, which bytes may stand there, as Python's ``re`` says; None: not such a pattern.

    :raises re.error: when the pattern is none.
    """
    re.compile(pattern)
    inner = _PLACES.fullmatch(pattern) if pattern.isascii() else None
    if inner is None:
        return None
    places = []
    for atom, count in _PLACE.findall(inner[1]):
        allowed = [byte < 128 and re.fullmatch(atom, chr(byte)) is not None for byte in range(256)]
        places += [allowed] * int(count or 1)
    return np.array(places, np.bool_) if places else None


def _match_places(column: pa.ChunkedArray, places: npt.NDArray[np.bool_]) -> pa.ChunkedArray:
    """Match texts of one length, place by place: sooner than a regular expression can."""
    return pa.chunked_array([_match_chunk(chunk, places) for chunk in column.chunks], pa.bool_())


def _match_chunk(texts: pa.Array, places: npt.NDArray[np.bool_]) -> pa.Array:
    count, width = len(texts), len(places)
    matched = mask_of(pc.fill_null(pc.equal(pc.binary_length(texts), width), False))
    rows = np.flatnonzero(matched)
    long_enough = texts if len(rows) == count else texts.filter(flags(matched))
    _, offsets, data = long_enough.buffers()
    if len(rows):
        first = int(np.frombuffer(offsets, np.int32)[long_enough.offset])
        bytes_ = np.frombuffer(data, np.uint8)[first : first + len(rows) * width].reshape(-1, width)
        # most places allow one run of characters, and most texts match: where one does not is looked for in them all
        lows = np.argmax(places, axis=1).astype(np.uint8)
        spans = (places.sum(axis=1) - 1).astype(np.uint8)
        misfits = (
            np.flatnonzero((bytes_ - lows) > spans)
            if _are_runs(places)
            else np.flatnonzero(~places[np.arange(width), bytes_])
        )
        matched[rows[misfits // width]] = False
    return flags(matched, mask_of(texts.is_null()) if texts.null_count else None)


def _are_runs(places: npt.NDArray[np.bool_]) -> bool:
    return bool((np.abs(np.diff(places.astype(np.int8), axis=1)).sum(axis=1) <= 2).all())


def _texts(column: pa.ChunkedArray) -> Iterator[bytes]:
    """Yield the bytes of all texts, joined; bytes under a null are among them, and only make a kernel decline."""
    for chunk in column.chunks:
        _, ends, data = chunk.buffers()
        if len(chunk) and data is not None:
            bounds = memoryview(ends).cast("i")
            first, end = bounds[chunk.offset], bounds[chunk.offset + len(chunk)]
            yield data.slice(first, end - first).to_pybytes()


def _not_unique(column: pa.ChunkedArray, arguments: Mapping[str, Any]) -> Mask | None:
    if not (_is_text(column) or pt.is_int64(column.type) or pt.is_timestamp(column.type)):
        return None  # 0.0 and -0.0, NaN and NaN: whether they are the same is not ours to say
    values = column.combine_chunks()
    if isinstance(values, pa.ChunkedArray):  # 2 GiB of text do not fit into one array
        return None
    codes = pc.fill_null(values.dictionary_encode().indices, -1).to_numpy(zero_copy_only=False)
    counts = np.bincount(codes[codes >= 0], minlength=1)
    return flags((codes >= 0) & (counts[codes] > 1))


def _is_text(column: pa.ChunkedArray) -> bool:
    return bool(pt.is_string(column.type))


_RANGE = ("min_value", "max_value", "strict_min", "strict_max")
_KERNELS: Mapping[str, tuple[tuple[str, ...], Kernel]] = {
    "expect_column_values_to_not_be_null": ((), _not_null),
    "expect_column_values_to_be_null": ((), _null),
    "expect_column_values_to_be_between": (_RANGE, _between),
    "expect_column_values_to_be_in_set": (("value_set",), _not_in_set),
    "expect_column_values_to_not_be_in_set": (("value_set",), _in_set),
    "expect_column_values_to_match_regex": (("regex",), _no_match),
    "expect_column_values_to_not_match_regex": (("regex",), _match),
    "expect_column_value_lengths_to_be_between": (_RANGE, _lengths_between),
    "expect_column_value_lengths_to_equal": (("value",), _lengths_equal),
    "expect_column_values_to_be_unique": ((), _not_unique),
}
