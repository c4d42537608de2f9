"""Ours in the cases that ingest from a broker: one task, and as many shards as there are cores.

Both are the whole verb: claim in a durable ledger, read to the proven end, decode, validate, part the rows with all
reasons, row ids and digests, manifest. A shard is a process of its own, as a mapped task is.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from airflow_ai_provider.core.batch import BatchRef
from airflow_ai_provider.core.ingest.contract import Source, Validator
from airflow_ai_provider.core.ingest.flow import Ingest, IngestRun, ingest, plan_shards
from airflow_ai_provider.core.ingest.shard import ShardRef
from airflow_ai_provider.core.ledger_sql import open_ledger
from airflow_ai_provider.core.store import Store
from benchmarks import servers
from benchmarks.harness import Place, Run

ONE, SHARDED, SHARDS = "ours", "sharded", 2
OpenSource = Callable[[dict[str, str]], Source]
"""Opens the source by the addresses of the case's servers; at a module's top, for other processes call it too."""
OpenValidator = Callable[[], Validator]


def open_one(place: Place, source: OpenSource, validator: OpenValidator) -> Run:
    """Ingest one span into a fresh store and ledger, as one task does."""
    _validator(validator)

    def run() -> float:
        home = _fresh(place, ONE)
        started = time.perf_counter()
        work = _work(home, source, validator)
        ref = ingest(work.source, work.validator, work.store, work.ledger, work.run)
        return _done(home, started, ref)

    return run


def open_sharded(place: Place, source: OpenSource, validator: OpenValidator) -> Run:
    """The same in shards, from planning to landing."""
    # spawned, so that a worker has nothing of this process; what it imports is loaded before the clock starts, as
    # for all contenders
    pool = get_context("spawn").Pool(SHARDS, _validator, (validator,))
    _validator(validator)

    def run() -> float:
        home = _fresh(place, SHARDED)
        started = time.perf_counter()
        work = _work(home, source, validator)
        refs = plan_shards(work.source, work.ledger, work.run, SHARDS)
        done = pool.map(partial(_shard, home, source, validator), [ref.to_dict() for ref in refs], chunksize=1)
        return _done(home, started, work.land([ShardRef.from_dict(ref) for ref in done]))

    return run


def landed(place: Place) -> Sequence[tuple[BatchRef, Store]]:
    """What both left in the folder."""
    homes = [place.folder / name for name in (ONE, SHARDED)]
    refs = [BatchRef.from_dict(json.loads((home / "ref.json").read_text(encoding="utf-8"))) for home in homes]
    return [(ref, Store(f"file://{home}/store")) for ref, home in zip(refs, homes, strict=True)]


@cache
def _validator(validator: OpenValidator) -> Validator:
    return validator()


def _shard(home: Path, source: OpenSource, validator: OpenValidator, ref: dict[str, Any]) -> dict[str, Any]:
    work = _work(home, source, validator)
    try:
        return work.shard(ShardRef.from_dict(ref)).to_dict()
    finally:
        work.source.close()


def _work(home: Path, source: OpenSource, validator: OpenValidator) -> Ingest:
    return Ingest(
        source(servers.addresses(home.parent)),
        _validator(validator),
        Store(f"file://{home}/store"),
        open_ledger(f"sqlite:///{home}/ledger.db"),
        IngestRun("bench", "run", "run/ingest"),
    )


def _fresh(place: Place, name: str) -> Path:
    home = place.folder / name
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    return home


def _done(home: Path, started: float, ref: BatchRef) -> float:
    spent = time.perf_counter() - started
    (home / "ref.json").write_text(json.dumps(ref.to_dict()), encoding="utf-8")
    return spent
