"""One column that holds a whole tensor per row: an encoded image, or a list of numbers.

Invariants: every row keeps its place; a row whose list is missing, of another length, or holds what is no number of the
model's type is a row error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from airflow_ai_provider.core.batch import Pin
from airflow_ai_provider.core.infer.column import Mask, as_numpy, as_one
from airflow_ai_provider.core.infer.inputs import Array, Inputs
from airflow_ai_provider.errors import SignatureError

if TYPE_CHECKING:
    import numpy.typing as npt


class Tensor:
    """An encoded image, or a list of so many numbers, per row.

    :param shape: of one row.
    :param names: columns that may hold it, the first that does is taken; without one, ``bytes`` or the only one of
        a fitting type.
    :param guess: false takes no column but those of ``names``.
    """

    padding = None

    def __init__(
        self, shape: tuple[int, ...], dtype: np.dtype[Any], names: list[str], pin: Pin, *, guess: bool = True
    ) -> None:
        self._shape, self._dtype, self._names, self._guess = shape, dtype, names, guess
        self._image = dict(pin.metadata.get("image") or {})
        self._column = ""
        self.row_bytes = int(np.prod(shape)) * dtype.itemsize

    def needs(self, schema: pa.Schema) -> list[str]:
        """Return the column to read, or raise SignatureError."""
        fitting = [f.name for f in schema if self._fits(f.type) and not f.name.startswith("_")]
        guesses = ["bytes"] if self._guess else []
        chosen = [name for name in [*self._names, *guesses] if name in fitting] or (fitting if self._guess else [])
        if not chosen or (len(fitting) > 1 and chosen == fitting and chosen[0] not in self._names):
            raise SignatureError(
                f"the model takes a tensor of shape {self._shape} per row{self._asked()}, and of the columns "
                f"{schema.names} {fitting or 'none'} could hold it (encoded images, or lists of numbers). Name the "
                'column in the model\'s metadata: log_model(..., metadata={"features": ["bytes"]}); for a matrix name '
                "all columns.",
                columns=list(schema.names),
            )
        self._column = chosen[0]
        return [self._column]

    def read(self, rows: pa.Table) -> Inputs:
        """Return the tensors and the rows' errors."""
        if not self._column or self._column not in rows.column_names:
            self.needs(rows.schema)
        column = rows[self._column]
        if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
            from airflow_ai_provider.core.infer.image import decode_images

            array, errors = decode_images(column, self._shape, self._image)
            return Inputs([array.astype(self._dtype, copy=False)], errors)
        return self._lists(column)

    def sample(self, fill: float, row_count: int = 2) -> list[Array]:
        """Return tensors of one number."""
        return [np.full((row_count, *self._shape), fill, self._dtype)]

    def _asked(self) -> str:
        return "" if self._guess else f" from column {self._names[0]}"

    def _fits(self, kind: pa.DataType) -> bool:
        if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            return len(self._shape) in (2, 3)
        return holds_lists(kind)

    def _lists(self, column: pa.ChunkedArray) -> Inputs:
        size = int(np.prod(self._shape))
        lists = read_lists(column, self._dtype)
        errors = lists.faults(self._column)
        for row in np.flatnonzero(lists.lengths != size).tolist():
            said = f"wrong_shape: {self._column} holds {lists.lengths[row]} numbers, the model takes {size}"
            errors[row] = said if row not in lists.nulls else errors[row]
        if not errors and len(lists.values) == size * len(column):
            array = lists.values
        else:
            array = np.zeros((len(column), size), self._dtype)
            good = np.array([row for row in range(len(column)) if row not in errors], np.int64)
            array[good] = lists.padded(good, size, 0)
        return Inputs([array.reshape(-1, *self._shape)], errors)


@dataclass(frozen=True)
class Lists:
    """Lists of numbers, one after the other.

    :param values: the numbers of all lists, in the model's type.
    :param starts: where each row's list begins.
    :param lengths: how many numbers it has; 0 for a null.
    :param nulls: rows without a list.
    :param unfit: rows with a number that is null, not finite or not of the model's type.
    """

    values: Array
    starts: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    nulls: frozenset[int]
    unfit: frozenset[int]

    def faults(self, name: str) -> dict[int, str]:
        """Say of each row that has no list of numbers why."""
        said = f"not_finite: {name} holds a number that is null or not finite"
        if self.values.dtype.kind != "f":
            said = f"wrong_type: {name} holds what is no {self.values.dtype}"
        return dict.fromkeys(self.unfit, said) | dict.fromkeys(self.nulls, f"null_value: {name} is null")

    def padded(self, rows: npt.NDArray[np.int64], width: int, pad: float) -> Array:
        """Return some rows side by side, filled up to one width; longer ones are cut."""
        lengths = np.minimum(self.lengths[rows], width)
        places = np.arange(width)
        inside = places < lengths[:, None]
        array = np.full((len(rows), width), pad, self.values.dtype)
        array[inside] = self.values[(self.starts[rows][:, None] + places)[inside]]
        return array


def holds_lists(kind: pa.DataType) -> bool:
    """Tell whether a column of this type holds a list of numbers per row."""
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return bool(lists and (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)))


def read_lists(column: pa.ChunkedArray, dtype: np.dtype[Any]) -> Lists:
    """Read a column of lists (of :func:`holds_lists`) as numbers of one type."""
    array = as_one(column)
    if pa.types.is_fixed_size_list(array.type):
        array = array.cast(pa.list_(array.type.value_type))
    offsets = as_numpy(array.offsets).astype(np.int64)
    given = array.values.slice(offsets[0], offsets[-1] - offsets[0])
    starts, lengths = offsets[:-1] - offsets[0], np.diff(offsets)
    nulls = np.zeros(len(array), bool)
    if array.null_count:
        nulls = array.is_null().to_numpy(zero_copy_only=False)
        lengths = np.where(nulls, 0, lengths)  # a null list may still span numbers
    values, bad = _typed(given, dtype)
    unfit: Mask = np.zeros(len(array), bool)
    if bad.any():
        before = np.concatenate([[0], np.cumsum(bad)])
        unfit = before[starts + lengths] > before[starts]
    return Lists(values, starts, lengths, _rows(nulls), _rows(unfit))


def _typed(given: pa.Array, dtype: np.dtype[Any]) -> tuple[Array, Mask]:
    """Return numbers in another type, and which are not what they were."""
    bad: Mask = np.zeros(len(given), bool)
    if given.null_count:
        bad = given.is_null().to_numpy(zero_copy_only=False)
        given = given.fill_null(pa.scalar(0, given.type))
    plain = as_numpy(given)
    with np.errstate(over="ignore", invalid="ignore"):
        values = plain.astype(dtype, copy=False)
        if dtype.kind == "f":
            bad = bad | ~np.isfinite(values)
        elif not np.can_cast(plain.dtype, dtype):
            bad = bad | (values != plain)
    return values, bad


def _rows(mask: Mask) -> frozenset[int]:
    return frozenset(np.flatnonzero(mask).tolist())
