"""Work that follows the main thread by one step.

Invariants: steps are done one at a time, in the order they were given; at most one is under way, so memory is bounded
by one step; a step's error comes out of the next call, and no later step is begun.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType


class Behind:
    """Do steps on one other thread; leaving the context waits for the step that is under way."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ingest")
        self._step: Future[None] | None = None

    def __enter__(self) -> Behind:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._thread.shutdown()

    def do(self, step: Callable[[], None]) -> None:
        """Begin a step when the one before is done; raises what that one raised."""
        self.wait()
        self._step = self._thread.submit(step)

    def wait(self) -> None:
        """Return when nothing is under way; raises what the last step raised."""
        step, self._step = self._step, None
        if step is not None:
            step.result()
