"""How the rows of a part are shared among workers that predict at once.

Invariants: every row is in one chunk, in the rows' order; a chunk is whole calls of the model, but where a row's bits
do not depend on them the last ones are ever smaller; how rows are cut never depends on time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from airflow_ai_provider.core.infer.engine import Engine
from airflow_ai_provider.core.infer.inputs import Answer, Given

_CHUNK_ROWS, _CHUNK_BYTES = 16_384, 32 << 20
_WORTH_BYTES = 256 << 10


def chunk_rows(row_count: int, batch_size: int, row_bytes: int, workers: int) -> int:
    """Return how many rows one call of an engine gets: whole batches, enough to be worth a call, not all in one
    worker's hands, and no more than the memory for its input allows."""
    fair = max(1, row_count // (2 * workers))
    wanted = min(_CHUNK_ROWS, fair, max(1, _CHUNK_BYTES // max(1, row_bytes)))
    return batch_size * max(1, wanted // batch_size)


def chunk_lengths(row_count: int, batch_size: int, engine: Engine, *, is_last: bool) -> Iterator[int]:
    """Cut a part for the workers, each chunk for one of them; a part without a row is one chunk.

    :param is_last: no part comes after it, so a worker with nothing to do would wait for the others: the chunks become
        smaller towards the end, down to what is worth a call.
    """
    whole = least = chunk_rows(row_count, batch_size, engine.row_bytes, engine.workers)
    if is_last and engine.steady and engine.tunable and engine.workers > 1:
        least = min(whole, max(1, _WORTH_BYTES // max(1, engine.row_bytes)))
    while True:
        length = min(row_count, whole, max(least, row_count // (2 * engine.workers)))
        yield length
        row_count -= length
        if not row_count:
            return


def shared_rows(row_bytes: int) -> int:
    """Return how many rows the workers share when they share the calls: of more rows more have the same width."""
    return max(1, min(_CHUNK_ROWS, 2 * _CHUNK_BYTES // max(1, row_bytes)))


@dataclass
class Abreast:
    """Make calls on all workers at once; meets :class:`~airflow_ai_provider.core.infer.inputs.Each`.

    :param workers: who makes them.
    """

    workers: ThreadPoolExecutor
    seconds: float = 0.0
    """What the calls have taken together."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, function: Callable[[Given], Answer], items: Iterable[Given], /) -> Iterator[Answer]:
        """Yield the answers in the items' order; an error drops the calls that have not begun."""

        def timed(item: Given) -> Answer:
            started = time.perf_counter()
            answer = function(item)
            with self._lock:
                self.seconds += time.perf_counter() - started
            return answer

        return self.workers.map(timed, items)
