"""A small world for acting: a store with rows, a ledger, a receiver; and a way to die at any seam."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from airflow_ai_provider.core.act.effect import ActRun
from airflow_ai_provider.core.act.flow import act
from airflow_ai_provider.core.act.saga import compensate
from airflow_ai_provider.core.act.sender import Sender
from airflow_ai_provider.core.act.value import HttpAction, Undo
from airflow_ai_provider.core.batch import BatchRef
from airflow_ai_provider.core.ledger import Ledger
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.testing.ledger import MemoryLedger
from airflow_ai_provider.testing.sender import ScriptedSender

TICKET = HttpAction("ticket", "/tickets", undo=Undo("DELETE", "/tickets/{id}"))
PAGE = HttpAction("page", "/pages", undo=Undo("DELETE", "/pages/{id}"))


class Died(BaseException):
    """The process is gone: nothing may catch it as an ordinary error."""


class Mortal:
    """Pass calls on to a part of the world until the process dies; then every call fails, as nothing runs any more.

    :param part: what calls go to.
    :param life: shared by all parts of one process.
    """

    def __init__(self, part: Any, life: Life) -> None:
        self._part, self._life = part, life

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._part, name)
        return self._life.seam(name, value) if callable(value) else value


class Life:
    """Count the seams that a process passes and let it die before or after one of them."""

    def __init__(self, dies_at: int | None = None, after: bool = False) -> None:
        self.passed: list[str] = []
        self._dies_at, self._after, self._dead = dies_at, after, False
        self._lock = threading.Lock()

    def seam(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def at_the_seam(*args: Any, **kwargs: Any) -> Any:
            with self._lock:
                self.passed.append(name)
                is_last = len(self.passed) - 1 == self._dies_at
                if self._dead or (is_last and not self._after):
                    self._dead = True
                    raise Died(name)
                if not is_last:
                    return call(*args, **kwargs)
                self._dead = True
                call(*args, **kwargs)
                raise Died(name)

        return at_the_seam


class World:
    """What outlives a process: the store, the ledger, the receiver."""

    def __init__(self, folder: Path, ledger: Ledger | None = None, receiver: Sender | None = None) -> None:
        self.store = Store(str(folder / "store"))
        self.ledger: Ledger = ledger or MemoryLedger()
        self.receiver: Any = receiver or ScriptedSender()
        self.said: list[str] = []

    def rows(self, subjects: Sequence[str | None], batch_id: str = "orders-1", **columns: Sequence[Any]) -> BatchRef:
        """Land rows that were routed to act."""
        table = pa.table(
            {
                "_row_id": [f"{batch_id}/0/{n}" for n in range(len(subjects))],
                "subject": pa.array(subjects, pa.string()),
                **columns,
            }
        )
        writer = self.store.open_batch("p", "routes", batch_id)
        half = max(1, len(subjects) // 2)
        writer.write("act", table.slice(0, half))
        writer.write("act", table.slice(half))
        writer.write("hold", table.slice(0, 0))
        counts = {"predicted": len(subjects), "act": len(subjects)}
        pin = {"name": "triage", "version": "3", "alias": "champion", "digest": "sha256:1"}
        return writer.land(counts, {"key": "subject", "pin": pin}).only("act")

    def act(
        self,
        batches: Sequence[BatchRef],
        action: HttpAction = TICKET,
        *,
        run_id: str = "r1",
        step: int = 0,
        life: Life | None = None,
        chunk: int = 4,
        run: Mapping[str, Any] | None = None,
        landed: Callable[[BatchRef], None] | None = None,
    ) -> BatchRef:
        """Act in a process of its own, which may die."""
        life = life or Life()
        return act(
            batches,
            action,
            Mortal(self.store, life),
            Mortal(self.ledger, life),
            Mortal(self.receiver, life),
            ActRun("p", run_id, step, **dict(run or {})),
            chunk=chunk,
            progress=self.said.append,
            landed=landed,
            sleep=lambda _: None,
        )

    def compensate(self, *, run_id: str = "r1", life: Life | None = None, **options: Any) -> dict[str, int]:
        """Compensate in a process of its own, which may die."""
        life = life or Life()
        ledger, sender = Mortal(self.ledger, life), Mortal(self.receiver, life)
        return compensate(ledger, sender, pipeline="p", run_id=run_id, progress=self.said.append, chunk=3, **options)

    def outcomes(self, ref: BatchRef) -> list[dict[str, Any]]:
        """Read landed outcomes."""
        return [row for table in self.store.read(ref) for row in table.to_pylist()]

    def states(self, run_id: str = "r1", action: str | None = None) -> list[str]:
        """Return the states of a run's entries, undos left out."""
        return [e.state for e in self.ledger.entries("p", run_id, action) if not e.undoes]
