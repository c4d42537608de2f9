"""Rows as the arrays that a model takes.

Invariants: every row keeps its place; a row that cannot become input (null, not finite, not an image) is a row error
and its place holds zeros; a column that cannot fit at all is a SignatureError before the first row.

What a model takes is read from its signature (MLflow's) and, where a tensor has no names, from its metadata:
``features`` (names of the columns), ``image`` (``{"resize": bool, "mean": [...], "std": [...]}``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from airflow_ai_provider.core.batch import Pin
from airflow_ai_provider.errors import SignatureError

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Inputs:
    """Arrays for one call, first axis the rows, and the reason of each row that has none, by its position."""

    arrays: list[Array]
    errors: dict[int, str]


@dataclass(frozen=True)
class InputSpec:
    """One input of a session: its name, element type and shape (-1 where it may vary)."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


class Features(Protocol):
    """Turn rows into a model's inputs."""

    row_bytes: int

    def needs(self, schema: pa.Schema) -> list[str]:
        """Return the columns to read, or raise SignatureError."""

    def read(self, rows: pa.Table) -> Inputs:
        """Return the arrays and the rows' errors."""

    def sample(self, fill: float, row_count: int = 2) -> list[Array]:
        """Return arrays of the same shapes and types, to try the model before the first row."""


def features_of(pin: Pin, specs: Sequence[InputSpec]) -> Features:
    """Choose how rows become inputs.

    :param pin: with the signature and metadata.
    :param specs: the session's inputs; empty when it does not say (torch): then the signature decides.
    :raises SignatureError: when no reading fits; no retry helps.
    """
    inputs = list(pin.signature["inputs"])
    named = pin.metadata.get("features")
    if inputs[0].get("type") != "tensor":
        columns = [Column(i["name"], str(i.get("type")), not i.get("required", True)) for i in inputs]
        if len(specs) > 1:
            return SeparateColumns(columns, specs)
        return Matrix(columns, specs[0].dtype if specs else np.dtype(np.float32))
    if len(inputs) > 1:
        raise SignatureError(
            f"model {pin.name} takes {len(inputs)} tensors; one is supported. Wrap the model so that it takes one "
            "tensor, or give it a signature of columns.",
            name=pin.name,
        )
    tensor = inputs[0]["tensor-spec"]
    shape = tuple(int(size) for size in tensor["shape"])
    dtype = specs[0].dtype if specs else np.dtype(tensor["dtype"])
    if any(size < 1 for size in shape[1:]) or len(shape) < 2:
        raise SignatureError(
            f"model {pin.name} takes a tensor of shape {shape}: only the first size may vary. Log it with a signature "
            "that names the other sizes.",
            name=pin.name,
            shape=shape,
        )
    if named and len(shape) == 2 and len(named) == shape[1]:
        return Matrix([Column(name, "double", False) for name in named], dtype)
    return Tensor(shape[1:], dtype, list(named or [n for n in [inputs[0].get("name")] if n]), pin)


@dataclass(frozen=True)
class Column:
    """One column of a signature; an optional one may be absent or null (then it is NaN)."""

    name: str
    type: str
    optional: bool


class Matrix:
    """Named columns, side by side, as one matrix of numbers."""

    def __init__(self, columns: Sequence[Column], dtype: np.dtype[Any]) -> None:
        self._columns, self._dtype = list(columns), dtype
        self.row_bytes = len(columns) * dtype.itemsize
        texts = [c.name for c in columns if c.type in ("string", "binary", "datetime")]
        if texts or dtype.kind not in "fiu":
            raise SignatureError(
                f"the model takes one matrix of {dtype}, its signature has {texts[:5]} that are no numbers. Export it "
                "with one input per column.",
                columns=texts,
            )

    def needs(self, schema: pa.Schema) -> list[str]:
        return _needed(self._columns, schema, lambda column: True)

    def read(self, rows: pa.Table) -> Inputs:
        matrix = np.empty((rows.num_rows, len(self._columns)), self._dtype)
        holes = np.zeros(rows.num_rows, bool)
        present = set(rows.column_names)
        for position, column in enumerate(self._columns):
            if column.name not in present:
                matrix[:, position] = np.nan
                continue
            values, missing = _numbers(rows[column.name], self._dtype, np.nan if column.optional else 0)
            with np.errstate(over="ignore", invalid="ignore"):
                matrix[:, position] = values
            if missing is not None and not column.optional:
                holes |= missing
        errors: dict[int, str] = {}
        wrong = holes if self._dtype.kind != "f" or np.isfinite(matrix).all() else holes | self._unfit(matrix)
        if wrong.any():
            for row in np.flatnonzero(wrong).tolist():
                errors[row] = self._reason(rows, matrix, row)
            matrix[wrong] = 0
        return Inputs([matrix], errors)

    def sample(self, fill: float, row_count: int = 2) -> list[Array]:
        return [np.full((row_count, len(self._columns)), fill, self._dtype)]

    def _unfit(self, matrix: Array) -> npt.NDArray[np.bool_]:
        optional = np.array([column.optional for column in self._columns])
        fits = np.isfinite(matrix) | (np.isnan(matrix) & optional)
        unfit: npt.NDArray[np.bool_] = ~fits.all(axis=1)
        return unfit

    def _reason(self, rows: pa.Table, matrix: Array, row: int) -> str:
        for position, column in enumerate(self._columns):
            if column.name not in rows.column_names:
                continue
            value = rows[column.name][row].as_py()
            if value is None:
                if not column.optional:
                    return f"null_value: {column.name} is null"
            elif not np.isfinite(matrix[row, position]):
                return f"not_finite: {column.name}={value!r} is no finite {self._dtype}"
        raise AssertionError("a row without a fault was asked for its reason")


class SeparateColumns:
    """One input per column, each of its own type (texts too), as a column of one."""

    def __init__(self, columns: Sequence[Column], specs: Sequence[InputSpec]) -> None:
        by_name = {spec.name: spec for spec in specs}
        missing = [column.name for column in columns if column.name not in by_name]
        if missing or len(columns) != len(specs):
            raise SignatureError(
                f"the model's inputs are {sorted(by_name)}, its signature has {[c.name for c in columns]}. "
                "Name the inputs as the columns, or export the model with one matrix.",
                inputs=sorted(by_name),
            )
        self._columns = list(columns)
        self._specs = specs
        self.row_bytes = 8 * len(columns)

    def needs(self, schema: pa.Schema) -> list[str]:
        texts = {spec.name for spec in self._specs if spec.dtype.kind not in "fiub"}
        return _needed(self._columns, schema, lambda column: column.name not in texts)

    def read(self, rows: pa.Table) -> Inputs:
        errors: dict[int, str] = {}
        arrays = []
        for spec in self._specs:
            column = rows[spec.name]
            if spec.dtype.kind in "fiub":
                values, missing = _numbers(column, spec.dtype, 0)
                array = np.asarray(values).astype(spec.dtype)
                bad = ~np.isfinite(array) if spec.dtype.kind == "f" else np.zeros(len(array), bool)
                bad = bad if missing is None else bad | missing
                array[bad] = 0
            else:
                bad = column.is_null().to_numpy(zero_copy_only=False)
                array = column.cast(pa.string()).fill_null("").to_numpy(zero_copy_only=False)
            for row in np.flatnonzero(bad).tolist():
                value = column[row].as_py()
                fault = "null_value" if value is None else "not_finite"
                errors.setdefault(row, f"{fault}: {spec.name} is {'null' if value is None else repr(value)}")
            arrays.append(array.reshape(-1, 1))
        return Inputs(arrays, errors)

    def sample(self, fill: float, row_count: int = 2) -> list[Array]:
        return [np.full((row_count, 1), fill if spec.dtype.kind in "fiub" else "", spec.dtype) for spec in self._specs]


class Tensor:
    """One column that holds a whole tensor per row: an encoded image, or a list of numbers."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any], names: list[str], pin: Pin) -> None:
        self._shape, self._dtype, self._names = shape, dtype, names
        self._image = dict(pin.metadata.get("image") or {})
        self._column = ""
        self.row_bytes = int(np.prod(shape)) * dtype.itemsize

    def needs(self, schema: pa.Schema) -> list[str]:
        fitting = [f.name for f in schema if self._fits(f.type) and not f.name.startswith("_")]
        chosen = [name for name in [*self._names, "bytes"] if name in fitting] or fitting
        if not chosen or (len(fitting) > 1 and chosen == fitting):
            raise SignatureError(
                f"the model takes a tensor of shape {self._shape} per row, and of the columns {schema.names} "
                f"{fitting or 'none'} could hold it (encoded images, or lists of numbers). Name the column in the "
                'model\'s metadata: log_model(..., metadata={"features": ["bytes"]}); for a matrix name all columns.',
                columns=list(schema.names),
            )
        self._column = chosen[0]
        return [self._column]

    def read(self, rows: pa.Table) -> Inputs:
        if not self._column or self._column not in rows.column_names:
            self.needs(rows.schema)
        column = rows[self._column]
        if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
            from airflow_ai_provider.core.infer.image import decode_images

            array, errors = decode_images(column, self._shape, self._image)
            return Inputs([array.astype(self._dtype, copy=False)], errors)
        return self._lists(column)

    def sample(self, fill: float, row_count: int = 2) -> list[Array]:
        return [np.full((row_count, *self._shape), fill, self._dtype)]

    def _fits(self, kind: pa.DataType) -> bool:
        if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            return len(self._shape) in (2, 3)
        lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        return bool(lists and (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)))

    def _lists(self, column: pa.ChunkedArray) -> Inputs:
        size = int(np.prod(self._shape))
        array = np.zeros((len(column), size), self._dtype)
        errors: dict[int, str] = {}
        for row, value in enumerate(column):
            numbers = value.as_py()
            if numbers is None:
                errors[row] = f"null_value: {self._column} is null"
            elif len(numbers) != size:
                errors[row] = f"wrong_shape: {self._column} holds {len(numbers)} numbers, the model takes {size}"
            elif None in numbers or not np.isfinite(given := np.asarray(numbers, self._dtype)).all():
                errors[row] = f"not_finite: {self._column} holds a number that is null or not finite"
            else:
                array[row] = given
        return Inputs([array.reshape(-1, *self._shape)], errors)


def _needed(columns: Sequence[Column], schema: pa.Schema, is_number: Any) -> list[str]:
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


def _numbers(column: pa.ChunkedArray, dtype: np.dtype[Any], hole: float) -> tuple[Array, npt.NDArray[np.bool_] | None]:
    """Return a column's values and which are null (None when none is); a null holds ``hole``."""
    array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # an empty or very large column stays chunked
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    kind = array.type
    if not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
        array = array.cast(pa.from_numpy_dtype(dtype), safe=False)
    if array.null_count == 0:
        return _values(array), None
    missing = array.is_null().to_numpy(zero_copy_only=False)
    if pa.types.is_integer(array.type) and dtype.kind == "f":
        array = array.cast(pa.float64(), safe=False)
    hole = hole if pa.types.is_floating(array.type) else 0
    return _values(array.fill_null(pa.scalar(hole, array.type))), missing


def _values(array: pa.Array) -> Array:
    """Look at a column's numbers where they lie. (pyarrow's to_numpy would import pandas, a second of a cold start.)"""
    return np.from_dlpack(array) if len(array) else np.empty(0, np.float32)
