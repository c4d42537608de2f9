"""What stands between rows and a model: arrays for its calls, and the rows that have none.

Invariants: every row keeps its place; a row that cannot become input has a reason, and zeros (or nothing) in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    import numpy.typing as npt

Array: TypeAlias = "npt.NDArray[Any]"
Given = TypeVar("Given")
Answer = TypeVar("Answer")


class Each(Protocol):
    """Call a function with each item, one after the other (as ``map`` does) or several at once.

    All items may be asked for before the first answer is given; answers come in the items' order.
    """

    def __call__(self, function: Callable[[Given], Answer], items: Iterable[Given], /) -> Iterator[Answer]: ...


@dataclass(frozen=True)
class Sequences:
    """Rows of different lengths, each with the width that it is padded to.

    :param widths: width per row; 0 for a row that has an error and is not given to the model.
    :param fill: gives the model's arrays for some rows (by position), all padded to one width.
    """

    widths: npt.NDArray[np.int64]
    fill: Callable[[npt.NDArray[np.int64], int], list[Array]]


@dataclass(frozen=True)
class Inputs:
    """Arrays for one call, first axis the rows, and the reason of each row that has none, by its position.

    :param arrays: one per input of the model; empty when the rows are sequences.
    :param errors: reasons by position.
    :param sequences: the rows, when they differ in length.
    """

    arrays: list[Array]
    errors: dict[int, str]
    sequences: Sequences | None = None


@dataclass(frozen=True)
class InputSpec:
    """One input of a session: its name, element type and shape (-1 where it may vary)."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


class Features(Protocol):
    """Turn rows into a model's inputs.

    ``row_bytes`` is the memory that a row needs as input (at most).
    """

    row_bytes: int

    @property
    def padding(self) -> dict[str, Any] | None:
        """How rows of different lengths are padded, on which their bits depend; None for rows of one size."""

    def needs(self, schema: pa.Schema) -> list[str]:
        """Return the columns to read, or raise SignatureError."""

    def read(self, rows: pa.Table) -> Inputs:
        """Return the arrays and the rows' errors."""

    def sample(self, fill: float, row_count: int = 2) -> list[Array]:
        """Return arrays of the same shapes and types, to try the model before the first row."""


class Several:
    """Several inputs, each with a reader of its own, in the order of the session's inputs."""

    padding = None

    def __init__(self, readers: Sequence[Features]) -> None:
        self.readers = readers
        self.row_bytes = sum(reader.row_bytes for reader in readers)

    def needs(self, schema: pa.Schema) -> list[str]:
        """Return the columns to read, or raise SignatureError."""
        return list(dict.fromkeys(name for reader in self.readers for name in reader.needs(schema)))

    def read(self, rows: pa.Table) -> Inputs:
        """Return the arrays and the rows' errors; of two the first input's."""
        read = [reader.read(rows) for reader in self.readers]
        errors = {row: reason for inputs in reversed(read) for row, reason in inputs.errors.items()}
        return Inputs([array for inputs in read for array in inputs.arrays], errors)

    def sample(self, fill: float, row_count: int = 2) -> list[Array]:
        """Return arrays of the same shapes and types."""
        return [array for reader in self.readers for array in reader.sample(fill, row_count)]
