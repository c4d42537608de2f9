"""A machine of a cluster whose engine dies, for the tests of clusters; its processes import it by name."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from airflow_ai_provider.core.batch import ROW_ID
from airflow_ai_provider.core.infer.engine import Engine
from airflow_ai_provider.core.infer.worker import Worker
from airflow_ai_provider.testing import ArithmeticEngine


@dataclass(frozen=True)
class FragileWorker(Worker):
    """Open an engine that adds up, and is killed by some rows.

    :param victim: the row whose prediction kills the process.
    :param deaths: how often.
    :param graves: a folder; one file for each death.
    """

    victim: str = ""
    deaths: int = 0
    graves: str = ""

    @contextmanager
    def engine(self, *asked: Any, **more: Any) -> Iterator[Engine]:
        """Open it; nothing is fetched."""
        with ArithmeticEngine(["x", "y"], before=self._die) as engine:
            yield engine

    def _die(self, rows: pa.Table) -> None:
        died = len(list(Path(self.graves).iterdir()))
        if self.victim in rows[ROW_ID].to_pylist() and died < self.deaths:
            (Path(self.graves) / str(died)).touch()
            os.kill(os.getpid(), signal.SIGKILL)
