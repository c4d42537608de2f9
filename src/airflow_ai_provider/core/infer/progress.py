"""A line now and then while rows are predicted, and one at the end; the same as numbers for who collects metrics.

Numbers: ``rows_per_s`` since the start, ``gpu_used_bytes`` and ``gpu_busy_percent`` where a GPU can be read.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from airflow_ai_provider.core.infer.gauge import GpuLoad


class Progress:
    """Tell how far a long job is, at most every few seconds.

    :param say: takes one line.
    :param row_count: rows there are in all.
    :param every_s: seconds between two lines.
    :param now: monotonic clock, in seconds.
    :param gauge: reads how full and busy the device is; None when that is not known.
    :param measured: takes the name and value of each number, whenever there is a line.
    """

    def __init__(
        self,
        say: Callable[[str], None],
        row_count: int,
        *,
        every_s: float = 5.0,
        now: Callable[[], float] = time.monotonic,
        gauge: Callable[[], GpuLoad | None] = lambda: None,
        measured: Callable[[str, float], None] = lambda name, value: None,
    ) -> None:
        self._gauge, self._measured = gauge, measured
        self._say, self._row_count, self._every_s, self._now = say, row_count, every_s, now
        self._started = self._last = now()
        self._done = self._kept = 0

    def kept(self, row_count: int) -> None:
        """Count rows that an earlier try has predicted: they are done, but tell nothing about the speed."""
        self._kept += row_count

    def start(self) -> None:
        """Start the clock anew: what was done before, such as a warm-up, says nothing about the speed."""
        self._started = self._last = self._now()

    def advance(self, row_count: int) -> None:
        """Count rows that were predicted now, and say so when it is time."""
        self._done += row_count
        now = self._now()
        if now - self._last < self._every_s:
            return
        self._last = now
        rate = self._done / max(now - self._started, 1e-9)
        done = self._done + self._kept
        left = (self._row_count - done) / max(rate, 1e-9)
        self._say(
            f"{done:,} of {self._row_count:,} rows ({done / max(self._row_count, 1):.0%}), {rate:,.0f} rows/s, "
            f"about {left:,.0f} s left{self._measure(rate)}"
        )

    def finish(self, failed: int, where: str) -> None:
        """Say what came of it."""
        spent = self._now() - self._started
        rate = self._done / max(spent, 1e-9)
        kept = f", {self._kept:,} of them by an earlier try" if self._kept else ""
        self._say(
            f"{self._row_count:,} rows in {spent:.1f} s ({rate:,.0f} rows/s) on {where}: "
            f"{self._row_count - failed:,} predicted, {failed:,} failed{kept}{self._measure(rate)}"
        )

    def _measure(self, rate: float) -> str:
        load = self._gauge()
        self._measured("rows_per_s", rate)
        if load is None:
            return ""
        self._measured("gpu_used_bytes", load.used_bytes)
        self._measured("gpu_busy_percent", load.busy_percent)
        return f"; {load}"
