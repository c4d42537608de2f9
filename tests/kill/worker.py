"""One ingest in a process of its own that may be killed at any moment; it says at which step it is.

Invariants: the work is the product's own, through its public calls; watching it changes no call and no result.
"""

from __future__ import annotations

import logging
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

from airflow_ai_provider.core.ingest.flow import IngestRun, ingest
from airflow_ai_provider.core.ingest.kafka import KafkaReader
from airflow_ai_provider.core.ledger import Ledger
from airflow_ai_provider.core.ledger_sql import open_ledger
from airflow_ai_provider.core.store import MANIFEST, Store
from airflow_ai_provider.errors import SpanConflictError, TransientError
from airflow_ai_provider.testing import RuleValidator

PIPELINE = "killed"
STEPS = ("start", "plan", "claim", "read", "decode", "write", "manifest", "landed", "publish", "end")
LATER, CONFLICT, BROKEN = 3, 4, 5
"""Exit codes: a transient error; another run was quicker with these rows; anything else."""


@dataclass(frozen=True)
class World:
    """Where everything is: plain text, so that it can be handed to a process."""

    bootstrap: str
    topic: str
    group: str
    root: str
    ledger_url: str
    faults: str

    def reader(self) -> KafkaReader:
        config = {"bootstrap.servers": self.bootstrap, "reconnect.backoff.max.ms": 500, "log_level": 2}
        return KafkaReader(config, self.topic, group=self.group)

    def store(self) -> Store:
        return Store(self.root)

    def ledger(self) -> Ledger:
        return open_ledger(self.ledger_url)


@dataclass(frozen=True)
class Aim:
    """Die so many seconds after beginning a step: most steps are so short that a blow from outside would miss them.

    The kernel does it, as it does for a kill from outside: no hook runs, nothing is flushed.
    """

    step: str
    after_s: float

    def take(self) -> None:
        """Called when the step begins."""
        if self.after_s < 0.0005:
            os.kill(os.getpid(), signal.SIGKILL)
        signal.setitimer(signal.ITIMER_REAL, self.after_s)  # SIGALRM, which nobody handles


def work(world: World, run_key: str, step: Synchronized[int], aim: Aim | None = None) -> None:
    """Ingest what comes next, or what this run key holds already."""
    logging.disable()  # hundreds of processes whose broker dies would have much to say
    try:
        source, store, ledger = world.reader(), world.store(), world.ledger()

        def begin(name: str) -> None:
            step.value = STEPS.index(name)
            if aim and aim.step == name:
                aim.take()

        _watch(source, store, ledger, begin)
        ingest(
            source,
            RuleValidator(_find_negative, {"n": "int64", "v": "int64"}),
            store,
            ledger,
            IngestRun(PIPELINE, run_key, run_key),
            progress=_say_nothing,
        )
        begin("end")
    except TransientError as error:
        _note(world, f"{type(error).__name__}: {error}")
        os._exit(LATER)
    except SpanConflictError:
        os._exit(CONFLICT)
    except BaseException:
        _note(world, traceback.format_exc())
        os._exit(BROKEN)


def _find_negative(row: dict[str, Any]) -> str | None:
    return "out_of_range: v" if row["v"] < 0 else None


def _watch(source: Any, store: Any, ledger: Any, begin: Callable[[str], None]) -> None:
    def mark(thing: Any, name: str, step: Callable[..., str]) -> None:
        real = getattr(thing, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            begin(step(*args))
            return real(*args, **kwargs)

        setattr(thing, name, call)

    real_read = source.read

    def read(span: Any) -> Iterator[Any]:
        tables = real_read(span)
        while True:
            begin("read")
            table = next(tables, None)
            if table is None:
                return
            begin("decode")
            yield table

    source.read = read
    mark(source, "plan", lambda *_: "plan")
    mark(ledger, "claim", lambda *_: "claim")
    mark(store, "write_bytes", lambda path, _: "manifest" if path.endswith(MANIFEST) else "write")
    mark(ledger, "landed", lambda *_: "landed")
    mark(source, "commit", lambda *_: "publish")


def _note(world: World, text: str) -> None:
    with Path(world.faults).open("a") as file:
        file.write(text.rstrip() + "\n")


def _say_nothing(_: str) -> None:
    pass
