"""Say how far a run is: one line about every five seconds, and one at the end."""

from __future__ import annotations

import time
from collections.abc import Callable


class Progress:
    """Report rows read, their speed, the time left, and what became of them.

    :param total: rows of the span; 0 when it is not known. Kafka counts offsets, of which some hold no row.
    :param say: takes one line.
    :param clock: seconds, monotonic.
    :param every_s: seconds between lines.
    """

    def __init__(
        self,
        total: int,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        every_s: float = 5.0,
    ) -> None:
        self._total, self._say, self._clock, self._every_s = total, say, clock, every_s
        self._began = self._spoke = clock()
        self.read = 0

    def note(self, read: int, accepted: int, quarantined: int) -> None:
        """Count rows just read; speaks when it is time."""
        self.read += read
        now = self._clock()
        if now - self._spoke >= self._every_s:
            self._spoke = now
            speed = self.read / max(now - self._began, 1e-9)
            left = f", about {max(self._total - self.read, 0) / speed:.0f} s left" if self._total and speed else ""
            of = f" of {self._total:,}" if self._total else ""
            self._say(
                f"read {self.read:,}{of} rows ({speed:,.0f} rows/s{left}): "
                f"{accepted:,} accepted, {quarantined:,} quarantined"
            )

    def end(self, accepted: int, quarantined: int) -> None:
        """Say the final line."""
        took = max(self._clock() - self._began, 1e-9)
        self._say(
            f"read {self.read:,} rows in {took:.1f} s ({self.read / took:,.0f} rows/s): "
            f"{accepted:,} accepted, {quarantined:,} quarantined"
        )
