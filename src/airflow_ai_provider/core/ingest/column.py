"""numpy → Arrow without a copy, and without ``pa.array()``, which imports pandas (half a second) to test its argument.

Invariants: an array shares the memory it was made of: whoever made that does not change it afterwards.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa


def numbers(values: npt.NDArray[Any], type_: pa.DataType, missing: npt.NDArray[np.bool_] | None = None) -> pa.Array:
    """Make a column of numbers that have the type's own width; a row is null where ``missing``.

    :param type_: a type whose values lie side by side: numbers, dates, times.
    """
    return pa.Array.from_buffers(type_, len(values), [_valid(missing), pa.py_buffer(np.ascontiguousarray(values))])


def flags(values: npt.NDArray[np.bool_], missing: npt.NDArray[np.bool_] | None = None) -> pa.Array:
    """Make a column of booleans; a row is null where ``missing``."""
    return pa.Array.from_buffers(pa.bool_(), len(values), [_valid(missing), bits(values)])


def positions(at: npt.NDArray[Any], missing: npt.NDArray[np.bool_] | None = None) -> pa.Array:
    """Make positions for ``take``; a row is null where ``missing``."""
    return numbers(at.astype(np.int64, copy=False), pa.int64(), missing)


def bits(values: npt.NDArray[np.bool_]) -> pa.Buffer:
    """Pack booleans as Arrow does, for values and for validity."""
    return pa.py_buffer(np.packbits(values, bitorder="little"))


def mask_of(values: pa.Array | pa.ChunkedArray) -> npt.NDArray[np.bool_]:
    """Read a column of booleans without nulls."""
    found: npt.NDArray[np.bool_] = values.to_numpy(zero_copy_only=False)
    return found


def _valid(missing: npt.NDArray[np.bool_] | None) -> pa.Buffer | None:
    return None if missing is None else bits(~missing)
