"""How many rows (of sequences: tokens) a model gets per call: measured, not guessed, and the same for all of a batch
wherever bits depend on it.

1. the author's number is the number
2. an engine that gives the same bits at every size tries sizes while it works, on the real rows: larger ones while
   that pays, else smaller ones
3. any other engine gets its number before the first row: the one that an earlier try of the same batch has written
   down, or what this worker remembers, or what a trial on the first rows shows; the first to write it down wins

Invariants: a number found never changes a byte of an engine that is steady; of one that is not, all parts of a batch
are made with one number, on every worker, retry and resume; when memory runs out the number is halved, never raised.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from airflow_ai_provider.core.batch import canonical_json, digest_of
from airflow_ai_provider.core.infer.engine import Engine, usable_cores
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.errors import EngineMemoryError, SpecError

log = logging.getLogger(__name__)
_PAYS, _EQUAL = 1.05, 1.02
_SAMPLES, _LEAST = 3, 16
_TRIAL_S, _LEAST_TOKENS = 10.0, 8


@dataclass
class BatchSize:
    """The number that calls are made with now, and the search for a better one.

    :param now: where it starts.
    :param most: never larger than this.
    :param searches: try others; only for an engine whose bits do not depend on it.
    :param settled: told once, when the search is over, with the number that was found.
    :param starved: told when memory ran out, with the halved number; may raise.
    """

    now: int
    most: int
    searches: bool
    settled: Callable[[int], None] = lambda size: None
    starved: Callable[[int], None] = lambda halved: None
    _start: int = field(init=False)
    _times: list[float] = field(default_factory=list)
    _rates: dict[int, float] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._start = self.now

    def took(self, size: int, row_count: int, seconds: float) -> None:
        """Count what some rows have taken at one size; they must have filled a call, or they say nothing about it."""
        with self._lock:
            if not self.searches or size != self.now:
                return
            self._times.append(seconds / row_count)
            if len(self._times) < _SAMPLES:
                return
            # the fastest: what disturbs a measurement only ever makes it slower
            self._rates[size] = 1 / max(min(self._times), 1e-12)
            self._times.clear()
            self.now, self.searches = next_size(self._rates, self._start, self.most)
            if not self.searches:
                self.settled(self.now)

    def halve(self, size: int, why: BaseException) -> None:
        """Take a smaller number, because a call of this size did not fit into memory.

        :raises EngineMemoryError: when there is none; a retry may help, once others have freed theirs.
        """
        with self._lock:
            if size > self.now:
                return  # another call was first
            if size <= 1:
                raise EngineMemoryError(
                    f"the model does not fit into memory even with one row per call ({why}). Close what else runs on "
                    "the device, or run the task on a worker with more memory.",
                    batch_size=size,
                ) from why
            log.warning("a call of %d did not fit into memory (%s)", size, why)
            self.starved(size // 2)  # when it raises, the number stays: no row is predicted with another
            self.now, self.searches, self.most = size // 2, False, size // 2


def next_size(rates: Mapping[int, float], start: int, most: int) -> tuple[int, bool]:
    """Return the size to try next and true, or the best one and false.

    Up from the start while a step makes at least a twentieth more rows per second; if the first does not, down.

    :param rates: rows per second of each size tried.
    """
    least, largest = min(rates), max(rates)
    if least == start:
        pays = largest == start or rates[largest] >= rates[largest // 2] * _PAYS
        if pays and largest * 2 <= most:
            return largest * 2, True
        if (largest == start or (largest == start * 2 and not pays)) and start // 2 >= _LEAST:
            return start // 2, True
    elif rates[least] >= rates[least * 2] * _PAYS and least // 2 >= _LEAST:
        return least // 2, True
    # of sizes that are equally fast the smallest: it needs the least memory
    return min(size for size in rates if rates[size] * _EQUAL >= max(rates.values())), False


class SizeMemory:
    """What a worker has found out, by model, engine and device: small files beside the models' own.

    Safe for many processes: each file appears whole, the last writer wins, and one that cannot be read says nothing.

    :param cache_dir: folder that this machine's workers share.
    """

    def __init__(self, cache_dir: str | Path) -> None:
        self._folder = Path(cache_dir) / ".batch_sizes"

    def find(self, pin_digest: str, engine: Engine) -> int | None:
        """Return the number that suited a model on this machine, or None."""
        try:
            size = json.loads(self._path(pin_digest, engine).read_bytes())["batch_size"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return size if isinstance(size, int) and size >= 1 else None

    def keep(self, pin_digest: str, engine: Engine, size: int) -> None:
        """Remember a number; a disk that does not take it costs a search, not the task."""
        told = {"batch_size": size, "pin": pin_digest, "engine": engine.name, "device": engine.device}
        path = self._path(pin_digest, engine)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._folder, delete=False) as aside:
                aside.write(canonical_json(told))
            os.replace(aside.name, path)
        except OSError as error:
            log.warning("the batch size %d that was found could not be kept at %s: %s", size, path, error)

    def _path(self, pin_digest: str, engine: Engine) -> Path:
        told = [pin_digest, engine.name, engine.device, dict(engine.traits), usable_cores()]
        return self._folder / f"{digest_of(told)[7:39]}.json"


@dataclass(frozen=True)
class Batch:
    """What a number is to be found for.

    :param name: of the batch that is read.
    :param made_from: what the predictions' bytes depend on besides the number, as plain JSON.
    :param row_count: its rows.
    :param first_rows: reads the first of them.
    """

    name: str
    made_from: Mapping[str, Any]
    row_count: int
    first_rows: Callable[[], pa.Table]


def settle(
    asked: int | None, engine: Engine, batch: Batch, *, store: Store, pipeline: str, memory: SizeMemory | None
) -> BatchSize:
    """Settle with which number a batch starts, or is made.

    :param asked: the author's number; None to find one.
    :param store: where the number of an engine that is not steady is written down, for other tries of the same batch.
    :param memory: what this worker remembers; None remembers nothing.
    :raises SpecError: the author's number is less than 1; no retry helps.
    """
    if asked is not None and asked < 1:
        raise SpecError(
            f"batch_size is {asked}; it counts rows per call of the model, at least 1 (None: found by itself).",
            faults=[("batch_size", f"{asked} is less than 1")],
        )
    if asked is not None or not engine.tunable:
        size = asked or engine.batch_size
        return BatchSize(size, size, searches=False, starved=_shrug if engine.steady else _refuse)
    pin_digest = str(batch.made_from["pin"])
    known = memory.find(pin_digest, engine) if memory else None

    def keep(size: int) -> None:
        if memory:
            memory.keep(pin_digest, engine, size)

    if engine.steady:
        most = max(engine.batch_size, batch.row_count * _longest(engine))
        return BatchSize(known or engine.batch_size, most, searches=known is None, settled=keep, starved=keep)
    record = _Record(store, f"{pipeline}/batch_sizes/{batch.name}-{digest_of(dict(batch.made_from))[7:19]}.json")
    size = record.read() or record.write(known or _tried(engine, batch, keep))

    def lower(halved: int) -> None:
        keep(halved)
        record.lower(halved)
        raise EngineMemoryError(
            f"a call of {halved * 2} rows (or tokens) did not fit into the memory of {engine.device}. Where bits "
            f"depend on that number a batch is made with one, so the next try starts over with {halved}.",
            batch_size=halved * 2,
        )

    return BatchSize(size, size, searches=False, starved=lower)


def _shrug(halved: int) -> None:
    """Nothing hangs on the number."""


def _refuse(halved: int) -> None:
    raise EngineMemoryError(
        f"a call of {halved * 2} rows or tokens, as the author asked, did not fit into memory, and fewer would change "
        f"the predictions' last bits. Free the device, or set batch_size to {halved} or to nothing.",
        batch_size=halved * 2,
    )


class _Record:
    """A batch's number, in the store: what every try and every shard of it goes by."""

    def __init__(self, store: Store, path: str) -> None:
        self._store, self._path = store, path

    def read(self) -> int | None:
        return _number(self._store.read_bytes(self._path))

    def write(self, size: int) -> int:
        """Write the number down unless one is there; return the one that holds."""
        held = _number(self._store.create_bytes(self._path, canonical_json({"batch_size": size})))
        if held is None:  # no number of ours: it proves nothing
            self.lower(size)
        return held or size

    def lower(self, size: int) -> None:
        self._store.write_bytes(self._path, canonical_json({"batch_size": size}))


def _number(data: bytes | None) -> int | None:
    found = re.fullmatch(rb'\{"batch_size":([1-9][0-9]{0,8})\}', data or b"")
    return int(found[1]) if found else None


def _tried(engine: Engine, batch: Batch, keep: Callable[[int], None]) -> int:
    """Try sizes on the first rows; they are predicted again later. A batch of a few calls is not worth a trial."""
    start, tokens = engine.batch_size, _LEAST_TOKENS if "padding" in engine.traits else 1
    if batch.row_count * tokens < 16 * start:
        return start
    rows, ends = batch.first_rows(), time.monotonic() + _TRIAL_S
    search = BatchSize(start, rows.num_rows * tokens, searches=True, settled=keep, starved=keep)
    while search.searches and time.monotonic() < ends:
        size = search.now
        tried = rows.slice(0, max(size, 4 * start) // tokens)
        started = time.perf_counter()
        try:
            engine.predict(tried, size)
        except MemoryError as error:
            search.halve(size, error)
        else:
            search.took(size, tried.num_rows, time.perf_counter() - started)
    return search.now


def _longest(engine: Engine) -> int:
    padding = engine.traits.get("padding")
    return int(padding["widths"][-1]) if padding else 1
