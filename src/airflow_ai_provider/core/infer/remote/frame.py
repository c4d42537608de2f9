"""Rows as columns of their own types, for servers that take a data frame as JSON.

Invariants: a value keeps its type and its precision; a row that has no such value is a row error; a null is sent only
where the signature says that the column is optional.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from airflow_ai_provider.core.batch import Pin
from airflow_ai_provider.core.infer.column import Column
from airflow_ai_provider.core.infer.inputs import Inputs
from airflow_ai_provider.core.infer.remote.wire import COLUMN_TYPES, Array
from airflow_ai_provider.errors import SignatureError

_WHOLE = ("long", "integer")


class Frame:
    """Read a signature of columns as one array per column, each of its own type.

    :param pin: with a signature of columns.
    """

    padding = None

    def __init__(self, pin: Pin) -> None:
        inputs = pin.signature["inputs"]
        self._columns = [Column(str(i["name"]), str(i.get("type")), not i.get("required", True)) for i in inputs]
        self.row_bytes = 16 * len(self._columns)

    @property
    def names(self) -> list[str]:
        """The columns, in the signature's order."""
        return [column.name for column in self._columns]

    def needs(self, schema: pa.Schema) -> list[str]:
        """Return the columns to read, or raise SignatureError."""
        faults = []
        for column in self._columns:
            if column.name not in schema.names:
                faults += [] if column.optional else [f"no column {column.name}"]
            elif column.type in COLUMN_TYPES and not _is_number(schema.field(column.name).type):
                faults.append(f"{column.name} of type {schema.field(column.name).type} instead of {column.type}")
        if faults:
            raise SignatureError(
                f"the rows do not have what the model's signature requires: {', '.join(faults[:5])}"
                f"{' …' if len(faults) > 5 else ''}. They have {', '.join(schema.names)}. Declare the columns in the "
                "expectation suite, or pin a model that takes these rows.",
                columns=faults,
            )
        return [column.name for column in self._columns if column.name in schema.names]

    def read(self, rows: pa.Table) -> Inputs:
        """Return one array per column, and the rows' errors."""
        errors: dict[int, str] = {}
        arrays = []
        for column in self._columns:
            if column.name in rows.column_names:
                arrays.append(_values(rows[column.name].combine_chunks(), column, errors))
            else:
                arrays.append(np.full(rows.num_rows, None, object))
        return Inputs(arrays, errors)

    def sample(self, fill: float, row_count: int = 2) -> list[Array]:
        """Return rows of the same types, to try the model before the first row."""
        return [_filled(column, fill, row_count) for column in self._columns]


def _filled(column: Column, fill: float, row_count: int) -> Array:
    if column.type in COLUMN_TYPES:
        return np.full(row_count, fill, COLUMN_TYPES[column.type])
    value: Any = "1970-01-01T00:00:00" if column.type == "datetime" else b"" if column.type == "binary" else ""
    return np.full(row_count, value, object)


def _is_number(kind: pa.DataType) -> bool:
    checks = (pa.types.is_floating, pa.types.is_integer, pa.types.is_boolean, pa.types.is_decimal, pa.types.is_null)
    return any(check(kind) for check in checks)


def _values(given: Any, column: Column, errors: dict[int, str]) -> Array:
    """Return a column's values as JSON has them, and note the rows that have none."""
    array = given if isinstance(given, pa.Array) else pa.concat_arrays(given.chunks)
    if column.type not in COLUMN_TYPES:
        values = _objects(array.to_pylist())
        if not column.optional:
            _note(errors, pc.is_null(array), lambda row: f"null_value: {column.name} is null")
        return values
    numbers = pc.cast(array, pa.float64(), safe=False) if not pa.types.is_integer(array.type) else array
    missing = pc.is_null(numbers, nan_is_null=False)
    if not column.optional:
        _note(errors, missing, lambda row: f"null_value: {column.name} is null")
    if pa.types.is_floating(numbers.type):
        finite = pc.is_finite(numbers)
        wrong = pc.invert(finite) if not column.optional else pc.is_inf(numbers)
        _note(errors, wrong, lambda row: f"not_finite: {column.name}={array[row].as_py()!r} is no finite number")
        if column.type in _WHOLE:
            uneven = pc.and_(finite, pc.not_equal(pc.floor(numbers), numbers))
            _note(errors, uneven, lambda row: f"wrong_type: {column.name}={array[row].as_py()!r} is no whole number")
    return _typed(numbers, column)


def _typed(numbers: pa.Array, column: Column) -> Array:
    dtype = np.dtype(COLUMN_TYPES[column.type])
    is_hole = pc.fill_null(pc.invert(pc.is_finite(numbers)), True).to_numpy(zero_copy_only=False)
    plain = pc.fill_null(numbers, 0).to_numpy(zero_copy_only=False)
    with np.errstate(invalid="ignore", over="ignore"):
        # A float32 is written as the number that it was, not as the nearest that it can hold.
        typed: Array = plain.astype(np.float64 if dtype.kind == "f" else dtype)
    if not is_hole.any():
        return typed
    values = _objects(typed.tolist())
    values[is_hole] = None
    return values


def _objects(values: Sequence[Any]) -> Array:
    array = np.empty(len(values), object)
    array[:] = values
    return array


def _note(errors: dict[int, str], wrong: pa.Array, reason: Any) -> None:
    for row in np.flatnonzero(pc.fill_null(wrong, False).to_numpy(zero_copy_only=False)).tolist():
        errors.setdefault(row, reason(row))
