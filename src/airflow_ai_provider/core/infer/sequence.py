"""Rows of different lengths: lists of tokens (or numbers), padded to widths that depend on nothing but the row.

Invariants: a row's width is the least of a fixed ladder that holds it, whatever rows stand beside it, so its bits do
not depend on its neighbours; what is made up to fill it is masked; a row that is empty or too long is a row error.

What a model takes is read from its signature: tensors of shape ``(-1, -1)``, each from the column of its name. An input
that the rows have no column for is made when its name says how: ``attention_mask`` (1 for a token, 0 for filling),
``token_type_ids`` (zeros), ``position_ids`` (0, 1, 2 …). Metadata ``sequence``: ``longest`` (the most tokens that the
model takes; 512), ``pad`` (what fills up; 0), ``widths`` (a ladder of one's own), ``truncate`` (cut what is too long),
``vocabulary`` (how many tokens there are: a row with another is a row error, and reaches no GPU that would not notice).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pyarrow as pa

from airflow_ai_provider.core.infer.apart import MISFIT
from airflow_ai_provider.core.infer.inputs import Array, Inputs, InputSpec, Sequences
from airflow_ai_provider.core.infer.tensor import Lists, holds_lists, read_lists
from airflow_ai_provider.errors import SignatureError

if TYPE_CHECKING:
    import numpy.typing as npt

_LONGEST, _LEAST = 512, 8
Rows: TypeAlias = "npt.NDArray[np.int64]"
# From the lengths of some rows and their width; by the names that transformers give their inputs.
_MADE: dict[str, Callable[[Rows, int], Array]] = {
    "attention_mask": lambda lengths, width: np.arange(width) < lengths[:, None],
    "token_type_ids": lambda lengths, width: np.zeros((len(lengths), width)),
    "position_ids": lambda lengths, width: np.tile(np.arange(width), (len(lengths), 1)),
}


@dataclass(frozen=True)
class Padding:
    """The widths that rows are padded to.

    :param widths: ascending; a row takes the first that holds it.
    :param pad: what fills up.
    :param truncate: cut rows that are longer than the last width; otherwise they are row errors.
    :param vocabulary: how many tokens the model knows, from 0 on; 0 does not check.
    """

    widths: tuple[int, ...]
    pad: float
    truncate: bool
    vocabulary: int = 0

    @classmethod
    def of(cls, given: Mapping[str, Any], steps: int) -> Padding:
        """Read a model's metadata.

        :param given: its ``sequence``.
        :param steps: widths between a power of two and the next; more waste less and make smaller calls.
        :raises SignatureError: when it makes no sense; no retry helps.
        """
        widths = tuple(given.get("widths") or ladder(int(given.get("longest") or _LONGEST), steps))
        rising = all(isinstance(w, int) and w > before for w, before in zip(widths, (0, *widths), strict=False))
        unknown = sorted(set(given) - {"widths", "longest", "pad", "truncate", "vocabulary"})
        vocabulary = given.get("vocabulary", 0)
        is_count = isinstance(vocabulary, int) and not isinstance(vocabulary, bool) and vocabulary >= 0
        if not rising or unknown or not is_count:
            said = "widths must be whole numbers above 0, ascending" if is_count else "vocabulary must count tokens"
            raise SignatureError(
                f"the model's metadata says sequence={dict(given)!r}: {f'{unknown} is not known' if unknown else said}"
                ". It takes longest, pad, widths, truncate and vocabulary: correct it and log the model again.",
                sequence=dict(given),
            )
        return cls(widths, given.get("pad", 0), bool(given.get("truncate")), vocabulary)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON: what a prediction's bits depend on besides the model."""
        return {"widths": list(self.widths), "pad": self.pad, "truncate": self.truncate}


def ladder(longest: int, steps: int) -> tuple[int, ...]:
    """Return the widths up to ``longest``: so many between a power of two and the next, at least 8, whole numbers."""
    widths, width = [], _LEAST
    while width < longest:
        widths.append(width)
        width += max(1, (1 << (width.bit_length() - 1)) // steps)
    return (*widths, max(1, longest))


class SequenceInputs:
    """Read lists of different lengths; meets :class:`~airflow_ai_provider.core.infer.inputs.Features`.

    :param specs: the model's inputs, all of shape ``(-1, -1)`` or of a fixed width that rows are filled up to.
    :param columns: column of each input, by the input's name; those that are not there are made.
    :param padding: the widths.
    """

    def __init__(self, specs: Sequence[InputSpec], columns: Mapping[str, str], padding: Padding) -> None:
        self._specs, self._columns, self._padding = list(specs), dict(columns), padding
        self._present: list[str] = []
        self.row_bytes = padding.widths[-1] * sum(spec.dtype.itemsize for spec in specs)
        self.padding: dict[str, Any] | None = padding.to_dict()

    def needs(self, schema: pa.Schema) -> list[str]:
        """Return the columns to read, or raise SignatureError."""
        found = {spec.name for spec in self._specs if self._columns[spec.name] in schema.names}
        missing = [spec.name for spec in self._specs if spec.name not in found and spec.name not in _MADE]
        unfit = [name for name in found if not holds_lists(schema.field(self._columns[name]).type)]
        if missing or unfit or not found:
            what = [f"{self._columns[name]} of type {schema.field(self._columns[name]).type}" for name in sorted(unfit)]
            raise SignatureError(
                f"the model takes lists of numbers of any length in {', '.join(self._columns[m] for m in missing)}"
                f"{', '.join(what)}; the rows have {', '.join(schema.names)}. Add the columns at ingest (lists of "
                'numbers), or name them in the model\'s metadata: log_model(..., metadata={"features": ["tokens"]}), '
                "in the order of its inputs.",
                missing=missing,
                columns=what,
            )
        self._present = [spec.name for spec in self._specs if spec.name in found]
        return [self._columns[name] for name in self._present]

    def read(self, rows: pa.Table) -> Inputs:
        """Return the rows as sequences, and the errors of those that are none."""
        if not self._present:
            self.needs(rows.schema)
        by_name = {spec.name: spec for spec in self._specs}
        lists = {n: read_lists(rows[self._columns[n]], by_name[n].dtype) for n in self._present}
        lengths = lists[self._present[0]].lengths
        errors = self._errors(lists, lengths)
        widths = np.asarray(self._padding.widths)
        places = np.minimum(np.searchsorted(widths, lengths), len(widths) - 1)
        own = widths[places].astype(np.int64)
        own[list(errors)] = 0
        return Inputs([], errors, Sequences(own, lambda chosen, width: self._fill(lists, lengths, chosen, width)))

    def sample(self, fill: float, row_count: int = 2) -> list[Array]:
        """Return rows of one token, repeated, to try the model with."""
        width = self._padding.widths[min(1, len(self._padding.widths) - 1)]
        lengths = np.full(row_count, width, np.int64)
        return [
            (_MADE[spec.name](lengths, width) if spec.name in _MADE else np.full((row_count, width), abs(fill))).astype(
                spec.dtype
            )
            for spec in self._specs
        ]

    def _errors(self, lists: Mapping[str, Lists], lengths: Rows) -> dict[int, str]:
        first, most = self._columns[self._present[0]], self._padding.widths[-1]
        errors = {row: f"wrong_shape: {first} is an empty list" for row in np.flatnonzero(lengths == 0).tolist()}
        if not self._padding.truncate:
            for row in np.flatnonzero(lengths > most).tolist():
                errors[row] = f"wrong_shape: {first} holds {lengths[row]} numbers, the model takes at most {most}"
        for name in self._present[1:]:
            other = lists[name].lengths
            for row in np.flatnonzero(other != lengths).tolist():
                said = f"wrong_shape: {first} holds {lengths[row]} numbers, {self._columns[name]} {other[row]}"
                errors.setdefault(row, said)
        for name in reversed(self._present):
            errors |= lists[name].faults(self._columns[name])
        return self._unknown(lists) | errors

    def _unknown(self, lists: Mapping[str, Lists]) -> dict[int, str]:
        """Name the tokens that the model does not know."""
        most, tokens = self._padding.vocabulary, next((n for n in self._present if n not in _MADE), None)
        if not most or tokens is None:
            return {}
        values, starts, name = lists[tokens].values, lists[tokens].starts, self._columns[tokens]
        places = np.flatnonzero((values < 0) | (values >= most))
        rows = np.searchsorted(starts, places, side="right") - 1
        inside = places - starts[rows] < self._padding.widths[-1]  # what is cut off reaches no model
        # backwards, so that a row's error names its first one
        found = zip(rows[inside][::-1].tolist(), values[places[inside]][::-1].tolist(), strict=True)
        return {
            row: f"{MISFIT}: {name} holds {value}, the model knows the tokens 0 to {most - 1}" for row, value in found
        }

    def _fill(self, lists: Mapping[str, Lists], lengths: Rows, chosen: Rows, width: int) -> list[Array]:
        cut = np.minimum(lengths[chosen], width)
        return [
            lists[spec.name].padded(chosen, width, self._padding.pad if spec.name not in _MADE else 0)
            if spec.name in lists
            else _MADE[spec.name](cut, width).astype(spec.dtype)
            for spec in self._specs
        ]
