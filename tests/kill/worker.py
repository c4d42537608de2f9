"""One task of an ingest in a process of its own that may be killed at any moment; it says at which step it is.

Invariants: the work is the product's own, through its public calls; watching it changes no call and no result; a task
knows of the others nothing but what it is handed, which is what XCom would carry.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import pyarrow as pa

from airflow_ai_provider.core.ingest import shard as cutting
from airflow_ai_provider.core.ingest.flow import Ingest, IngestRun, ingest, plan_shards
from airflow_ai_provider.core.ingest.kafka import KafkaReader
from airflow_ai_provider.core.ingest.shard import ShardRef
from airflow_ai_provider.core.ingest.shelf import FOLDER
from airflow_ai_provider.core.ledger import Ledger
from airflow_ai_provider.core.ledger_sql import open_ledger
from airflow_ai_provider.core.store import MANIFEST, Store
from airflow_ai_provider.errors import SpanConflictError, TransientError
from airflow_ai_provider.testing import RuleValidator

# a process is forked from one that has all of these: else each would import for seconds, and most kills hit that
_LATE_IMPORTS = (
    "fsspec.implementations.local",
    "airflow_ai_provider.core.ledger_engine",
    "pandas",
    "psycopg",
    "sqlite3",
)
for _name in _LATE_IMPORTS:
    importlib.import_module(_name)
pa.array(["what the first column imports"])

PIPELINE = "killed"
STEPS = ("start", "plan", "claim", "read", "decode", "write", "mark", "manifest", "landed", "publish", "tidy", "end")
STEPS_OF = {
    "ingest": STEPS,
    "plan": ("start", "plan", "claim", "end"),
    "shard": ("start", "read", "decode", "write", "mark", "end"),
    "land": ("start", "write", "manifest", "landed", "publish", "tidy", "end"),
}
"""Task → its steps; ``ingest`` is all of them in one task."""
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
        return KafkaReader(config, self.topic, group=self.group, deadline_s=30)

    def store(self) -> Store:
        return Store(self.root)

    def ledger(self) -> Ledger:
        return open_ledger(self.ledger_url)


@dataclass(frozen=True)
class Errand:
    """What a process is to do: plain text and numbers.

    :param task: one of :data:`STEPS_OF`.
    :param given: what it gets through XCom: the shard, or the parts that are landed.
    :param shards: into how many pieces a plan cuts.
    :param attempt: which try it is: one that begins later has a text that sorts behind.
    """

    run_key: str
    task: str = "ingest"
    given: tuple[dict[str, Any], ...] = ()
    shards: int = 1
    attempt: str = ""

    @property
    def shard(self) -> int:
        """The number of its shard; 0 for other tasks."""
        return int(self.given[0]["shard"]["number"]) if self.task == "shard" else 0


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


def work(world: World, errand: Errand, step: Synchronized[int], answer: Path, aim: Aim | None = None) -> None:
    """Do one task: what comes next, or what its run key holds already.

    :param answer: takes what XCom would take, at the very end.
    """
    logging.disable()  # hundreds of processes whose broker dies would have much to say
    cutting.SMALLEST_ROWS = 20  # a topic that fills for a minute has no shards of 10,000 rows
    try:
        source, store, ledger = world.reader(), world.store(), world.ledger()

        def begin(name: str) -> None:
            step.value = STEPS.index(name)
            if aim and aim.step == name:
                aim.take()

        _watch(source, store, ledger, begin)
        told = _do(errand, source, store, ledger)
        begin("end")
        answer.write_text(json.dumps(told))
    except TransientError as error:
        _note(world, f"{type(error).__name__}: {error}")
        os._exit(LATER)
    except BaseException as error:
        # whoever holds a claim keeps it: after the plan nobody may be quicker
        if isinstance(error, SpanConflictError) and errand.task in ("ingest", "plan"):
            os._exit(CONFLICT)
        _note(world, traceback.format_exc())
        os._exit(BROKEN)


def _do(errand: Errand, source: Any, store: Store, ledger: Ledger) -> list[dict[str, Any]]:
    run = IngestRun(PIPELINE, errand.run_key, errand.run_key, attempt=errand.attempt)
    rules = RuleValidator(_find_negative, {"n": "int64", "v": "int64", "u": "int64"}, unique="u")
    try:
        if errand.task == "ingest":
            return [ingest(source, rules, store, ledger, run, progress=_say_nothing).to_dict()]
        if errand.task == "plan":
            return [ref.to_dict() for ref in plan_shards(source, ledger, run, errand.shards)]
        work, given = Ingest(source, rules, store, ledger, run, _say_nothing), map(ShardRef.from_dict, errand.given)
        return [work.shard(*given).to_dict() if errand.task == "shard" else work.land([*given]).to_dict()]
    finally:
        source.close()


def _find_negative(row: dict[str, Any]) -> str | None:
    return "out_of_range: v" if row["v"] < 0 else None


def _written(path: str, _: bytes) -> str:
    if path.endswith(MANIFEST):
        return "manifest"
    return "mark" if path.endswith("done.json") else "write"


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
    mark(store, "write_bytes", _written)
    mark(store, "remove", lambda path: "tidy" if path.endswith(f"/{FOLDER}") else "write")
    mark(ledger, "landed", lambda *_: "landed")
    mark(source, "commit", lambda *_: "publish")


def _note(world: World, text: str) -> None:
    with Path(world.faults).open("a") as file:
        file.write(text.rstrip() + "\n")


def _say_nothing(_: str) -> None:
    pass
