"""A pinned model opened on this machine: its files fetched and held, a GPU leased, then the engine.

1. the files: from this machine's cache or the registry, proved against the pin, held until the engine is closed
2. a GPU, where there is one and it is not refused: the first free one
3. the engine; when it turns out to run on the CPU, the GPU is given back at once

Invariants: plain values, so a worker can be sent to other processes; what was opened is closed in reverse order.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from airflow_ai_provider.core.batch import Pin
from airflow_ai_provider.core.infer import cache, lease
from airflow_ai_provider.core.infer.engine import Engine, open_engine
from airflow_ai_provider.core.infer.tuning import AS_IT_IS, Tuning

log = logging.getLogger(__name__)
_GB = 1_000_000_000


@dataclass(frozen=True)
class Worker:
    """What a machine that predicts keeps where.

    :param cache_dir: folder of model files, shared by the machine's processes.
    :param cache_gb: files of models that nobody uses are removed beyond so many gigabytes; 0 sets no limit.
    :param lease_dir: folder of the GPUs' locks, the same for all processes of the machine; empty locks nothing.
    :param patience_s: how long to wait for a GPU when all are taken.
    """

    cache_dir: str
    cache_gb: float = 0.0
    lease_dir: str = ""
    patience_s: float = 3600.0

    @contextmanager
    def engine(
        self,
        pin: Pin,
        device: str,
        registry: str | Callable[[], str] = "",
        *,
        tuning: Tuning = AS_IT_IS,
        owner: str = "",
    ) -> Iterator[Engine]:
        """Open a pinned model, and close it in the end.

        :param device: as :func:`~airflow_ai_provider.core.infer.engine.open_engine` takes it.
        :param registry: tracking URI of the registry, or what gives it; asked only when the files are not here.
        :param tuning: how the model is made faster; what it compiles is kept beside the models.
        :param owner: who leases a GPU, for those who wait for it.
        :raises DeviceBusyError: all GPUs stayed taken; a retry may help. Also what fetching and opening raise.
        """
        limit = int(self.cache_gb * _GB) or None
        with ExitStack() as stack:
            folder = stack.enter_context(cache.held(pin, self.cache_dir, registry, byte_limit=limit))
            leasing = stack.enter_context(ExitStack())  # left after the engine, which is entered later
            devices = lease.visible_devices() if self.lease_dir and device != "cpu" else []
            if devices:
                leasing.enter_context(lease.leased(devices, self.lease_dir, owner=owner, patience_s=self.patience_s))
            builds = cache.builds_of(pin.digest, self.cache_dir)
            engine = stack.enter_context(open_engine(pin, folder, device, tuning, builds))
            if engine.device == "cpu":
                leasing.close()
            yield engine


class WarmEngines:
    """Keep the engine that was used last open for the next batch of the same model and device, in one process.

    For processes that predict piece by piece (a cluster's workers), where loading would cost more than predicting.
    """

    def __init__(self) -> None:
        self._key = ("", "", AS_IT_IS)
        self._opened = ExitStack()
        self._engine: Engine | None = None

    def engine(
        self,
        worker: Worker,
        pin: Pin,
        device: str,
        registry: str = "",
        *,
        tuning: Tuning = AS_IT_IS,
        owner: str = "",
    ) -> Engine:
        """Return an open engine, which stays this object's to close; another model, device or tuning closes the one
        before.

        Parameters and errors are those of :meth:`Worker.engine`.
        """
        if self._engine is None or self._key != (pin.digest, device, tuning):
            self.close()
            self._engine = self._opened.enter_context(worker.engine(pin, device, registry, tuning=tuning, owner=owner))
            self._key = (pin.digest, device, tuning)
        return self._engine

    @contextmanager
    def lent(self, *asked: Any, **more: Any) -> Iterator[Engine]:
        """Give the engine of :meth:`engine` to one user, and keep it open after it, unless the user fails."""
        try:
            yield self.engine(*asked, **more)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close what is open."""
        self._engine = None
        self._opened.close()
