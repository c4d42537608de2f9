"""A share of a batch's parts, for tasks that predict one batch side by side.

Invariants: pure and cheap to import; the shards of one count take every part once, however many parts there are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from airflow_ai_provider.errors import SpecError

MOST = 1024
"""More mapped tasks of one task than this are refused by Airflow's own default."""


@dataclass(frozen=True)
class Shard:
    """One of several shares of a batch: every ``count``-th part, from part ``index`` on.

    :param index: which one, from 1 to ``count``.
    :param count: how many there are.
    :raises SpecError: on creation, when there is no such shard; a retry does not help.
    """

    index: int = 1
    count: int = 1

    def __post_init__(self) -> None:
        if not (1 <= self.count <= MOST and 1 <= self.index <= self.count):
            _refuse(f"{self.index}/{self.count}")

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read ``2/4``: the second of four.

        :raises SpecError: when it is not written so, or there is no such shard; a retry does not help.
        """
        found = re.fullmatch(r"\s*(\d{1,4})\s*/\s*(\d{1,4})\s*", text) if isinstance(text, str) else None
        return cls(int(found[1]), int(found[2])) if found else _refuse(text)

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def takes(self, number: int) -> bool:
        """Tell whether part ``number`` (from 0) belongs to this shard."""
        return number % self.count == self.index - 1


WHOLE = Shard()


def shards(count: int) -> list[str]:
    """Name all shards of a batch, to map a task over: ``["1/4", "2/4", "3/4", "4/4"]``.

    :param count: how many, from 1 to 1024.
    :raises SpecError: when there cannot be so many; a retry does not help.
    """
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MOST:
        _refuse(f"1/{count}")
    return [str(Shard(index, count)) for index in range(1, count + 1)]


def _refuse(text: object) -> Shard:
    raise SpecError(
        f"shard {text!r} is not a share of a batch. Write K/N with K from 1 to N and N up to {MOST}: 2/4 is the second "
        "of four.",
        faults=[("shard", f"{text!r} is not K/N")],
    )
