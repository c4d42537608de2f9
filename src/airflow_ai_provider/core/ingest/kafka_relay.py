"""Consumers that take over from each other: one topic partition is read while the next one is on its way.

Invariants: topic partitions are read in the order given, each by a consumer of its own; at most two are open; all are
closed on leaving.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Generic, Protocol, TypeVar

from airflow_ai_provider.core.batch import Slice


class Client(Protocol):
    """What is asked of a consumer here."""

    def close(self) -> None: ...


C = TypeVar("C", bound=Client)


class Relay(Generic[C]):
    """A consumer for each topic partition, in turn; one more at most fetches ahead, so that no reader waits for it.

    :param open_: makes a consumer that fetches a slice.
    """

    def __init__(self, slices: Iterable[Slice], open_: Callable[[Slice], C]) -> None:
        self._waiting, self._open = deque(slices), open_
        self._ahead: C | None = None
        self._taken: C | None = None

    def begin(self) -> None:
        """Let the next one fetch, if it does not yet."""
        if self._ahead is None and self._waiting:
            self._ahead = self._open(self._waiting.popleft())

    def take(self) -> C:
        """Return the next one, and close the one before."""
        self.begin()
        ahead, self._ahead = self._ahead, None
        assert ahead is not None  # as many are taken as there are slices
        if self._taken is not None:
            self._taken.close()
        self._taken = ahead
        return ahead

    def __enter__(self) -> Relay[C]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for consumer in (self._taken, self._ahead):
            if consumer is not None:
                consumer.close()
