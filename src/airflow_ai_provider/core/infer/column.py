"""Named columns as numbers (or texts) for a model.

Invariants: a row with a null, a number that is not finite, or one that the model's type cannot hold is a row error; a
column that is missing or holds texts where numbers are needed is a SignatureError before the first row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pyarrow as pa

from airflow_ai_provider.core.infer.inputs import Array, Features, Inputs, InputSpec, Several
from airflow_ai_provider.errors import SignatureError

if TYPE_CHECKING:
    import numpy.typing as npt

Mask: TypeAlias = "npt.NDArray[np.bool_]"


@dataclass(frozen=True)
class Column:
    """One column of a signature; an optional one may be absent or null (then it is NaN, or an empty text)."""

    name: str
    type: str
    optional: bool


class Matrix:
    """Named columns, side by side, as one matrix of numbers."""

    padding = None

    def __init__(self, columns: Sequence[Column], dtype: np.dtype[Any]) -> None:
        # no NaN among whole numbers: there a value that may be absent has nothing to stand for it
        self._columns = [Column(c.name, c.type, c.optional and dtype.kind == "f") for c in columns]
        self._dtype = dtype
        self.row_bytes = len(columns) * dtype.itemsize
        texts = [c.name for c in columns if c.type in ("string", "binary", "datetime")]
        if texts or dtype.kind not in "fiu":
            raise SignatureError(
                f"the model takes one matrix of {dtype}, its signature has {texts[:5]} that are no numbers. Export it "
                "with one input per column.",
                columns=texts,
            )

    def needs(self, schema: pa.Schema) -> list[str]:
        """Return the columns to read, or raise SignatureError."""
        return _needed(self._columns, schema, lambda column: True)

    def read(self, rows: pa.Table) -> Inputs:
        """Return the matrix and the rows' errors."""
        matrix = np.empty((rows.num_rows, len(self._columns)), self._dtype)
        wrong = np.zeros(rows.num_rows, bool)
        present = set(rows.column_names)
        for position, column in enumerate(self._columns):
            if column.name not in present:
                matrix[:, position] = np.nan
                continue
            unfit = _place(rows[column.name], column, matrix[:, position])
            wrong = wrong if unfit is None else wrong | unfit
        if self._dtype.kind == "f" and not np.isfinite(matrix).all():
            wrong |= self._unfit(matrix)
        errors: dict[int, str] = {}
        if wrong.any():
            for row in np.flatnonzero(wrong).tolist():
                errors[row] = self._reason(rows, row)
            matrix[wrong] = 0
        return Inputs([matrix], errors)

    def sample(self, fill: float, row_count: int = 2) -> list[Array]:
        """Return a matrix of one number."""
        return [np.full((row_count, len(self._columns)), fill, self._dtype)]

    def _unfit(self, matrix: Array) -> Mask:
        optional = np.array([column.optional for column in self._columns])
        fits = np.isfinite(matrix) | (np.isnan(matrix) & optional)
        unfit: Mask = ~fits.all(axis=1)
        return unfit

    def _reason(self, rows: pa.Table, row: int) -> str:
        for column in self._columns:
            if column.name in rows.column_names:
                fault = _fault(column, rows[column.name][row].as_py(), self._dtype)
                if fault:
                    return fault
        raise AssertionError("a row without a fault was asked for its reason")


class Scalar:
    """One column as an input of its own, texts too: a column of one, or a vector where the session takes one."""

    padding = None

    def __init__(self, column: Column, spec: InputSpec) -> None:
        self._is_number = spec.dtype.kind in "fiub"
        self._column = Column(column.name, column.type, column.optional and spec.dtype.kind not in "iub")
        self._dtype = spec.dtype
        self._shape = (-1,) if len(spec.shape) == 1 else (-1, 1)
        self.row_bytes = 8

    def needs(self, schema: pa.Schema) -> list[str]:
        """Return the column to read, or raise SignatureError."""
        return _needed([self._column], schema, lambda column: self._is_number)

    def read(self, rows: pa.Table) -> Inputs:
        """Return the column and the rows' errors."""
        column = self._column
        if column.name not in rows.column_names:
            return Inputs([self._full(rows.num_rows, np.nan)], {})
        given = rows[column.name]
        if not self._is_number:
            array = given.cast(pa.string()).fill_null("").to_numpy(zero_copy_only=False)
            wrong = np.zeros(len(given), bool) if column.optional else _nulls(given)
        else:
            array = np.empty(len(given), self._dtype)
            unfit = _place(given, column, array)
            wrong = np.zeros(len(given), bool) if unfit is None else unfit
            if self._dtype.kind == "f":
                wrong = wrong | ~(np.isfinite(array) | (np.isnan(array) & column.optional))
            array[wrong] = 0
        rows_at_fault = np.flatnonzero(wrong).tolist()
        errors = {row: _fault(column, given[row].as_py(), self._dtype) for row in rows_at_fault}
        return Inputs([array.reshape(self._shape)], errors)

    def sample(self, fill: float, row_count: int = 2) -> list[Array]:
        """Return one number, or empty texts."""
        return [self._full(row_count, fill)]

    def _full(self, row_count: int, fill: float) -> Array:
        return np.full((row_count, *self._shape[1:]), fill if self._is_number else "", self._dtype)


def separate_columns(columns: Sequence[Column], specs: Sequence[InputSpec]) -> Features:
    """Read each column as the input of its name.

    :raises SignatureError: when the names are not the same; no retry helps.
    """
    by_name = {column.name: column for column in columns}
    if sorted(by_name) != sorted(spec.name for spec in specs):
        raise SignatureError(
            f"the model's inputs are {sorted(spec.name for spec in specs)}, its signature has {list(by_name)}. "
            "Name the inputs as the columns, or export the model with one matrix.",
            inputs=sorted(spec.name for spec in specs),
        )
    return Several([Scalar(by_name[spec.name], spec) for spec in specs])


def _place(given: pa.ChunkedArray, column: Column, target: Array) -> Mask | None:
    """Copy a column's numbers to where the model reads them; return which rows it cannot (None: it can all)."""
    dtype = target.dtype
    values, missing = _numbers(given, dtype, np.nan if column.optional else 0)
    with np.errstate(over="ignore", invalid="ignore"):
        target[:] = values
    unfit = None if column.optional else missing
    if dtype.kind in "iub" and (values.dtype.kind == "f" or not np.can_cast(values.dtype, dtype)):
        # a half, or more than the type holds: numpy would cut it without a word
        with np.errstate(invalid="ignore"):
            changed = target != values
        unfit = changed if unfit is None else unfit | changed
    return unfit


def _fault(column: Column, value: Any, dtype: np.dtype[Any]) -> str:
    """Say why a value cannot be input; empty when it can."""
    if value is None:
        return "" if column.optional else f"null_value: {column.name} is null"
    with np.errstate(over="ignore", invalid="ignore"):
        number = np.asarray(float(value), dtype if dtype.kind == "f" else np.float64)
    if np.isnan(number) and column.optional:
        return ""
    if not np.isfinite(number):
        return f"not_finite: {column.name}={value!r} is no finite {dtype}"
    if dtype.kind == "f":
        return ""
    least, most = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    fits = float(number).is_integer() and least <= int(value) <= most
    return "" if fits else f"wrong_type: {column.name}={value!r} is no {dtype}"


def _needed(columns: Sequence[Column], schema: pa.Schema, is_number: Callable[[Column], bool]) -> list[str]:
    """Return the columns that are there; raise when a required one is not, or is no number."""
    missing = [c.name for c in columns if c.name not in schema.names and not c.optional]
    if missing:
        raise SignatureError(
            f"the rows have no column {', '.join(missing[:5])}{' …' if len(missing) > 5 else ''}, which the model's "
            f"signature requires; they have {', '.join(schema.names)}. Add the columns at ingest, or pin a model that "
            "takes these rows.",
            missing=missing,
        )
    found = [column for column in columns if column.name in schema.names]
    texts = [f"{c.name} ({schema.field(c.name).type})" for c in found if is_number(c) and not _numeric(schema, c.name)]
    if texts:
        raise SignatureError(
            f"the model's signature has numbers where the rows have {', '.join(texts[:5])}. Declare these columns as "
            "numbers in the expectation suite (expect_column_values_to_be_of_type).",
            columns=texts,
        )
    return [column.name for column in found]


def _numeric(schema: pa.Schema, name: str) -> bool:
    kind = schema.field(name).type
    numbers = (pa.types.is_floating, pa.types.is_integer, pa.types.is_boolean, pa.types.is_decimal, pa.types.is_null)
    return any(check(kind) for check in numbers)


def _numbers(column: pa.ChunkedArray, dtype: np.dtype[Any], hole: float) -> tuple[Array, Mask | None]:
    """Return a column's values and which are null (None when none is); a null holds ``hole``."""
    array = as_one(column)
    kind = array.type
    if not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
        # decimals as float64 first: cast to whole numbers they would lose their fraction without a word
        plain = dtype if dtype.kind in "fb" or not pa.types.is_decimal(kind) else np.dtype(np.float64)
        array = array.cast(pa.from_numpy_dtype(plain), safe=False)
    if array.null_count == 0:
        return as_numpy(array), None
    missing = _nulls(array)
    if pa.types.is_integer(array.type) and dtype.kind == "f":
        array = array.cast(pa.float64(), safe=False)
    hole = hole if pa.types.is_floating(array.type) else 0
    return as_numpy(array.fill_null(pa.scalar(hole, array.type))), missing


def _nulls(array: pa.Array | pa.ChunkedArray) -> Mask:
    missing: Mask = array.is_null().to_numpy(zero_copy_only=False) if len(array) else np.zeros(0, bool)
    return missing


def as_one(column: pa.ChunkedArray) -> pa.Array:
    """Return a column as one array; where it lies in one piece it is not copied."""
    array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # an empty or very large column stays chunked
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    return array


def as_numpy(array: pa.Array) -> Array:
    """Look at numbers where they lie. (pyarrow's to_numpy would import pandas, a second of a cold start.)"""
    if pa.types.is_boolean(array.type):  # bits, which nothing looks at where they lie
        return array.to_numpy(zero_copy_only=False) if len(array) else np.empty(0, bool)
    return np.from_dlpack(array) if len(array) else np.empty(0, np.float32)
