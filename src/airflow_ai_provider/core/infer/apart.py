"""Rows that a model cannot take, found by giving it fewer and fewer of them.

1. a call that the model refuses is not blamed on its rows before the model has answered a sample that it takes
2. the call is halved until the rows that are refused stand alone: each is a row error, the others are answered

Invariants: which rows are blamed depends on the rows alone, not on what stands beside them or on time; a row that is
not blamed has the answer that it would have had without the others; memory that runs out is nobody's fault here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from airflow_ai_provider.core.infer.inputs import Array
from airflow_ai_provider.errors import AiProviderError, EngineUnavailableError, SignatureError

MISFIT = "misfit"
"""What the reason of a row begins with that the model itself refused."""


@dataclass(frozen=True)
class Apart:
    """Call a model, and take a call that it refuses apart.

    :param call: the model: arrays in, arrays out, first axis the rows.
    :param sample: gives the model's answer to rows that it surely takes; raises SignatureError when there is none.
    :param errors: where the reasons go, by position; a row that has one keeps it.
    """

    call: Callable[[list[Array]], list[Array]]
    sample: Callable[[], Sequence[Array]]
    errors: dict[int, str]

    def run(self, arrays: list[Array], positions: Sequence[int]) -> list[Array]:
        """Return the outputs for all rows; in the place of a row that is refused stands the sample's.

        :param positions: of each of the rows, for its error.
        :raises EngineUnavailableError: the model refuses the sample too; a retry may help.
        """
        try:
            return self.call(arrays)
        except (AiProviderError, MemoryError):
            raise
        except Exception as error:  # runtimes have classes per status code, models' own code may raise anything
            return self._search(arrays, positions, error, self._answer_to_the_sample(error))

    def _search(
        self, arrays: list[Array], positions: Sequence[int], refusal: Exception, blank: list[Array]
    ) -> list[Array]:
        if len(positions) == 1:
            reason = f"{MISFIT}: the model cannot take this row: {type(refusal).__name__}: {first_line(refusal)}"
            self.errors.setdefault(int(positions[0]), reason)
            return blank
        middle = len(positions) // 2
        halves = []
        for half in (slice(None, middle), slice(middle, None)):
            given = [array[half] for array in arrays]
            try:
                halves.append(self.call(given))
            except (AiProviderError, MemoryError):
                raise
            except Exception as error:  # as above
                halves.append(self._search(given, positions[half], error, blank))
        return [np.concatenate(column) for column in zip(*halves, strict=True)]

    def _answer_to_the_sample(self, refusal: Exception) -> list[Array]:
        try:
            return [np.asarray(output)[:1] for output in self.sample()]
        except SignatureError as error:
            raise EngineUnavailableError(
                f"the model refused some rows ({type(refusal).__name__}: {first_line(refusal)}) and now refuses the "
                "sample too that it answered when it was opened, so no row is blamed. On a GPU one number outside what "
                "the model takes, such as an unknown token, can end the whole process's use of it: see whether the "
                "rows are predicted with device 'cpu', or name the vocabulary in the model's metadata. The retry opens "
                "the model anew and goes on after the last finished part."
            ) from error


def first_line(error: BaseException) -> str:
    """Return the beginning of what an error says, in one line."""
    said = str(error).strip().splitlines()
    return said[0][:300] if said else "no text"
