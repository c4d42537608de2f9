"""numpy → Arrow without a copy, and without ``pa.array()``, which imports pandas (half a second) to test its argument.

Invariants: an array shares the memory it was made of: whoever made that does not change it afterwards.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa


def numbers(values: npt.NDArray[Any], type_: pa.DataType) -> pa.Array:
    """Make a column of numbers that have the type's own width.

    :param type_: a type whose values lie side by side: numbers, dates, times.
    """
    return pa.Array.from_buffers(type_, len(values), [None, pa.py_buffer(np.ascontiguousarray(values))])


def flags(values: npt.NDArray[np.bool_]) -> pa.Array:
    """Make a column of booleans."""
    return pa.Array.from_buffers(pa.bool_(), len(values), [None, _bits(values)])


def positions(at: npt.NDArray[Any], missing: npt.NDArray[np.bool_] | None = None) -> pa.Array:
    """Make positions for ``take``; a row is null where ``missing``."""
    whole = pa.py_buffer(np.ascontiguousarray(at, np.int64))
    return pa.Array.from_buffers(pa.int64(), len(at), [None if missing is None else _bits(~missing), whole])


def mask_of(values: pa.Array | pa.ChunkedArray) -> npt.NDArray[np.bool_]:
    """Read a column of booleans without nulls."""
    found: npt.NDArray[np.bool_] = values.to_numpy(zero_copy_only=False)
    return found


def _bits(values: npt.NDArray[np.bool_]) -> pa.Buffer:
    return pa.py_buffer(np.packbits(values, bitorder="little"))
