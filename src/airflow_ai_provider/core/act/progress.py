"""A line every few seconds about how far an action is.

Invariants: counts only; the clock is an argument; safe for several threads.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

EVERY_S = 5.0


class Progress:
    """Count what became of rows and say so now and then.

    :param name: the action.
    :param row_count: how many rows there are.
    :param say: gets one line at a time.
    :param clock: seconds that only grow.
    """

    def __init__(
        self, name: str, row_count: int, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._name, self._row_count, self._say, self._clock = name, row_count, say, clock
        self._lock = threading.Lock()
        self._start = self._last = clock()
        self._sent = 0
        self._states: dict[str, int] = {}

    def count(self, sent: int, states: Iterable[str]) -> None:
        """Add a chunk: how many were sent, and how all of it stands."""
        with self._lock:
            self._sent += sent
            for state in states:
                self._states[state] = self._states.get(state, 0) + 1
            if self._clock() - self._last >= EVERY_S:
                self._last = self._clock()
                self._say(self._line())

    def end(self) -> None:
        """Say the last line."""
        with self._lock:
            self._say(self._line())

    def _line(self) -> str:
        through = sum(self._states.values())
        passed_s = max(self._clock() - self._start, 1e-9)
        rate = through / passed_s
        left_s = (self._row_count - through) / rate if rate else 0.0
        counted = {"done": 0, "refused": 0, **self._states}
        standing = ", ".join(f"{count} {state}" for state, count in counted.items())
        return (
            f"{self._name}: {through} of {self._row_count} rows, {self._sent} sent, {standing}; "
            f"{rate:.0f} rows/s, {left_s:.0f} s left"
        )
