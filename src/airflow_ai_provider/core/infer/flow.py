"""Predict a batch: read ∥ predict ∥ write, part by part, each row once.

1. settle what the bytes depend on (input, pin, options): it names the batch
2. keep the parts that an earlier try of the same batch has finished
3. for each other part: read → predict → account for every row → write the part aside → mark it done
4. hold the failed rows against the limit
5. write the manifest: from here on the batch exists

Invariants: part *n* of the predictions holds the rows of part *n* of the input, in their order; a killed try costs the
parts in flight (one being predicted, one being written) and nothing else; memory is bounded by a few parts, however
many there are. Same pin and same input give the same bytes on one kind of device, whatever the batch size; torch, and
any engine on a GPU, round by the batch size, so there it is settled before the first row and part of the batch's name.
Another release of an engine, or a processor with other instructions, may round otherwise.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import accumulate, islice
from typing import Any

import pyarrow as pa

from airflow_ai_provider.core.batch import ACCEPTED, PREDICTIONS, ROW_ID, BatchRef, Part, Pin, digest_of, exceeds
from airflow_ai_provider.core.infer.apart import MISFIT
from airflow_ai_provider.core.infer.batch_size import Batch, BatchSize, SizeMemory, settle
from airflow_ai_provider.core.infer.chunk import Abreast, chunk_lengths, shared_rows
from airflow_ai_provider.core.infer.engine import Engine
from airflow_ai_provider.core.infer.gauge import open_gauge
from airflow_ai_provider.core.infer.outcome import COLUMNS
from airflow_ai_provider.core.infer.part import DonePart, PartShelf
from airflow_ai_provider.core.infer.progress import Progress
from airflow_ai_provider.core.infer.shard import WHOLE, Shard
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.errors import BatchRejectedError, RowMismatchError

log = logging.getLogger(__name__)


def infer(
    batch: BatchRef,
    pin: Pin,
    store: Store,
    engine: Engine,
    *,
    pipeline: str,
    batch_size: int | None = None,
    memory: SizeMemory | None = None,
    max_failed: float | int | None = None,
    progress: Callable[[str], None] = log.info,
    measured: Callable[[str, float], None] = lambda name, value: None,
) -> BatchRef:
    """Predict every accepted row of a batch with the pinned model.

    :param batch: the batch to read (its table ``accepted``).
    :param pin: the model; the engine must have been opened with it.
    :param store: where the input lies and the predictions go.
    :param engine: the loaded model.
    :param pipeline: whose predictions these are.
    :param batch_size: rows (of sequences: tokens) per call of the model; None finds it.
    :param memory: what this worker has found for other batches; None starts anew.
    :param max_failed: share (float below 1) or count (int) of rows that may fail; None sets no limit.
    :param progress: takes a line about every five seconds and one at the end.
    :param measured: takes the same as numbers (:mod:`~airflow_ai_provider.core.infer.progress`), for metrics.
    :return: reference of the predictions: kind and table ``predictions``.
    :raises SignatureError: the rows have not what the model takes; nothing was predicted, no retry helps.
    :raises RowMismatchError: the engine lost, doubled or reordered rows; no retry helps.
    :raises EngineMemoryError: a call did not fit into memory and could not be made smaller; a retry may help.
    :raises BatchRejectedError: more rows failed than ``max_failed``; the batch is not landed, no retry helps.
    """
    recipe, done = predict(
        batch,
        pin,
        store,
        engine,
        pipeline=pipeline,
        batch_size=batch_size,
        memory=memory,
        progress=progress,
        measured=measured,
    )
    return land(recipe, done, store, pipeline=pipeline, max_failed=max_failed)


@dataclass(frozen=True)
class Recipe:
    """What a prediction batch is made from; it names the batch.

    :param batch: the rows.
    :param pin: the model.
    :param options: what else its bytes depend on: engine, kind of device, where they matter the rows per call.
    """

    batch: BatchRef
    pin: Pin
    options: Mapping[str, Any]

    @property
    def made_from(self) -> dict[str, Any]:
        """The same by digests, as plain JSON."""
        return {"input": self.batch.digest, "pin": self.pin.digest, "options": dict(self.options)}

    @property
    def batch_id(self) -> str:
        """Name of the predictions."""
        return f"{self.batch.batch_id}-{digest_of(self.made_from)[7:19]}"

    def shelf(self, store: Store, pipeline: str) -> PartShelf:
        """Open where the parts are stored and marked."""
        return PartShelf(store, store.open_batch(pipeline, PREDICTIONS, self.batch_id).folder, self.made_from)


def predict(
    batch: BatchRef,
    pin: Pin,
    store: Store,
    engine: Engine,
    *,
    pipeline: str,
    shard: Shard = WHOLE,
    batch_size: int | None = None,
    memory: SizeMemory | None = None,
    progress: Callable[[str], None] = log.info,
    measured: Callable[[str, float], None] = lambda name, value: None,
) -> tuple[Recipe, list[DonePart]]:
    """Predict and store the parts of one shard of a batch; nothing is landed.

    :param shard: which parts; the other parameters and errors are those of :func:`infer`.
    :return: what the batch is made from, and the stored parts of the shard, in order.
    """
    parts = store.manifest(batch).table(ACCEPTED)
    options: dict[str, Any] = {"engine": engine.name, "device": engine.device, **engine.traits}
    described = Batch(
        batch.batch_id,
        Recipe(batch, pin, options).made_from,
        sum(part.row_count for part in parts),
        lambda: _first_rows(batch, parts, store, engine),
    )
    size = settle(batch_size, engine, described, store=store, pipeline=pipeline, memory=memory)
    if not engine.steady:
        options["batch_size"] = size.now
    recipe = Recipe(batch, pin, options)
    sources = {number: part for number, part in enumerate(parts) if shard.takes(number)}
    row_count = sum(source.row_count for source in sources.values())
    told = Progress(progress, row_count, gauge=open_gauge(engine.device), measured=measured)
    done = _Job(batch, store, engine, size, recipe.shelf(store, pipeline), told).run(sources)
    told.finish(sum(part.failed for part in done), f"{engine.name}, {engine.device}")
    return recipe, done


def land(
    recipe: Recipe, done: Sequence[DonePart], store: Store, *, pipeline: str, max_failed: float | int | None = None
) -> BatchRef:
    """Make stored parts a batch.

    :param done: all parts of the batch, in order.
    :raises BatchRejectedError: more rows failed than ``max_failed``, or the model refused every one of several rows;
        nothing is landed, no retry helps.
    """
    writer = store.open_batch(pipeline, PREDICTIONS, recipe.batch_id)
    row_count, failed = sum(part.part.row_count for part in done), sum(part.failed for part in done)
    if exceeds(failed, row_count, max_failed):
        first = "; ".join(islice(_reasons(store, writer.folder, done), 3))
        raise BatchRejectedError(
            f"{failed} of {row_count} rows of batch {recipe.batch.batch_id} failed in the model, max_failed allows "
            f"{max_failed}: nothing was landed. The first reasons: {first}. "
            "Correct the rows or the model, or raise max_failed.",
            failed=failed,
            row_count=row_count,
        )
    if row_count > 1 and failed == row_count:
        _demand_an_answer(store, writer.folder, recipe, done)
    for part in done:
        writer.keep(part.part)
    counts = {"accepted": row_count, "predicted": row_count - failed, "failed": failed}
    facts = {"input": recipe.batch.to_dict(), "pin": recipe.pin.to_dict(), "engine": dict(recipe.options)}
    return writer.land(counts, facts)


@dataclass(frozen=True)
class _Pools:
    """Threads by what they do; those that lead wait for those that work."""

    read: ThreadPoolExecutor
    lead: ThreadPoolExecutor
    work: ThreadPoolExecutor
    write: ThreadPoolExecutor


@dataclass
class _Job:
    batch: BatchRef
    store: Store
    engine: Engine
    size: BatchSize
    shelf: PartShelf
    told: Progress
    columns: list[str] = field(default_factory=list)

    def run(self, sources: Mapping[int, Part]) -> list[DonePart]:
        """Return every part, kept or predicted, in order."""
        done = {number: self.shelf.done(number, source) for number, source in sources.items()}
        todo = [(number, source) for number, source in sources.items() if done[number] is None]
        self.told.kept(sum(kept.part.row_count for kept in done.values() if kept))
        if todo:
            self._warm_up()
            self.told.start()
        with ExitStack() as stack:
            # Leaving the stack, by an error too, waits for what runs and drops what does not run yet.
            pools = _Pools(*(_pool(stack, size) for size in (1, 2, self.engine.workers, 1)))
            for number, result in self._overlapped(todo, pools):
                done[number] = result
        return [part for part in done.values() if part is not None]

    def _warm_up(self) -> None:
        while True:
            size = self.size.now
            try:
                return self.engine.warm_up(size)
            except MemoryError as error:
                self.size.halve(size, error)

    def _overlapped(self, todo: Sequence[tuple[int, Part]], pools: _Pools) -> Iterator[tuple[int, DonePart]]:
        """Predict part n while n+1 is read and n-1 is written; never more than that is in memory."""
        ahead: deque[tuple[int, Part, Future[pa.Table]]] = deque()
        written: deque[tuple[int, Future[DonePart]]] = deque()
        running: deque[tuple[int, Part, list[tuple[pa.Table, Future[pa.Table]]]]] = deque()
        waiting = deque(todo)
        if waiting:
            number, source = waiting.popleft()
            ahead.append((number, source, pools.read.submit(self._read_first, source)))
        while waiting or ahead or running:
            if ahead and len(running) < 2:
                number, source, rows = ahead.popleft()
                running.append((number, source, self._start(rows.result(), pools, is_last=not waiting)))
            if waiting and not ahead:
                number, source = waiting.popleft()
                ahead.append((number, source, pools.read.submit(self._read, source, self.columns)))
            if ahead and len(running) < 2:
                continue
            number, source, calls = running.popleft()
            predicted = [self._account(rows, call.result()) for rows, call in calls]
            if written:
                yield _finished(written.popleft())
            written.append((number, pools.write.submit(self.shelf.write, number, source, pa.concat_tables(predicted))))
        while written:
            yield _finished(written.popleft())

    def _read_first(self, source: Part) -> pa.Table:
        """Ask the engine, before the first row, whether the rows fit, and which columns it reads."""
        rows = self._read(source, None)
        self.columns = _columns(rows, self.engine)
        return rows.select(self.columns)

    def _read(self, source: Part, columns: list[str] | None) -> pa.Table:
        return _read(self.store, self.batch, source, columns)

    def _start(self, rows: pa.Table, pools: _Pools, *, is_last: bool) -> list[tuple[pa.Table, Future[pa.Table]]]:
        """Let the workers at a part: each at chunks of its own, or of sequences all at the calls of one chunk."""
        if "padding" in self.engine.traits:
            length = shared_rows(self.engine.row_bytes)
            chunks = [rows.slice(start, length) for start in range(0, max(1, rows.num_rows), length)]
            return [(chunk, pools.lead.submit(self._predict_abreast, chunk, pools.work)) for chunk in chunks]
        lengths = list(chunk_lengths(rows.num_rows, self.size.now, self.engine, is_last=is_last))
        chunks = [rows.slice(end - length, length) for length, end in zip(lengths, accumulate(lengths), strict=True)]
        return [(chunk, pools.work.submit(self._predict, chunk)) for chunk in chunks]

    def _predict(self, rows: pa.Table) -> pa.Table:
        """Predict some rows; when a call does not fit into memory, the same rows in smaller calls."""
        while True:
            size, started = self.size.now, time.perf_counter()
            try:
                predicted = self.engine.predict(rows, size)
            except MemoryError as error:
                self.size.halve(size, error)
                continue
            if rows.num_rows >= size:
                self.size.took(size, rows.num_rows, time.perf_counter() - started)
            return predicted

    def _predict_abreast(self, rows: pa.Table, workers: ThreadPoolExecutor) -> pa.Table:
        """The same with all workers; their calls alone are counted, as other rows may come between."""
        while True:
            size, calls = self.size.now, Abreast(workers)
            try:
                predicted = self.engine.predict(rows, size, calls)
            except MemoryError as error:
                self.size.halve(size, error)
                continue
            self.size.took(size, max(1, rows.num_rows), calls.seconds)
            return predicted

    def _account(self, rows: pa.Table, predicted: pa.Table) -> pa.Table:
        """Let nothing through but the very rows that went in."""
        fault = ""
        if predicted.column_names != COLUMNS:
            fault = f"columns {predicted.column_names} instead of {COLUMNS}"
        elif predicted.num_rows != rows.num_rows:
            fault = f"{predicted.num_rows} lines for {rows.num_rows} rows"
        elif not predicted[ROW_ID].equals(rows[ROW_ID]):
            fault = "the rows in another order, or other rows"
        if fault:
            raise RowMismatchError(
                f"engine {self.engine.name} returned {fault}, for the rows from {rows[ROW_ID][:1].to_pylist()} on. "
                "Nothing was landed. An engine returns one line per row, in the rows' order.",
                engine=self.engine.name,
                given=rows.num_rows,
                returned=predicted.num_rows,
            )
        self.told.advance(rows.num_rows)
        return predicted


def _pool(stack: ExitStack, size: int) -> ThreadPoolExecutor:
    pool = ThreadPoolExecutor(size, thread_name_prefix="infer")
    stack.callback(pool.shutdown, wait=True, cancel_futures=True)
    return pool


def _finished(entry: tuple[int, Future[DonePart]]) -> tuple[int, DonePart]:
    return entry[0], entry[1].result()


def _first_rows(batch: BatchRef, parts: Sequence[Part], store: Store, engine: Engine) -> pa.Table:
    """Read some rows to try the model with."""
    rows = _read(store, batch, max(parts, key=lambda part: part.row_count), None)
    return rows.select(_columns(rows, engine))


def _columns(rows: pa.Table, engine: Engine) -> list[str]:
    return list(dict.fromkeys([ROW_ID, *engine.needs(rows.schema)]))


def _read(store: Store, batch: BatchRef, source: Part, columns: list[str] | None) -> pa.Table:
    rows = store.read_part(batch, source, columns).combine_chunks()
    if rows.num_rows != source.row_count:
        raise RowMismatchError(
            f"{source.path} of batch {batch.batch_id} holds {rows.num_rows} rows, its manifest says "
            f"{source.row_count}. Clear the task that wrote it.",
            path=source.path,
        )
    return rows


def _reasons(store: Store, folder: str, done: Sequence[DonePart]) -> Iterator[str]:
    """Yield the failed rows' reasons, for messages."""
    import io

    import pyarrow.parquet as pq

    for part in done:
        if part.failed:
            data = store.read_bytes(f"{folder}/{part.part.path}") or b""
            yield from pq.read_table(io.BytesIO(data), columns=["error"])["error"].drop_null().to_pylist()


def _demand_an_answer(store: Store, folder: str, recipe: Recipe, done: Sequence[DonePart]) -> None:
    """Blame no rows when the model has refused every one of them."""
    first = next(_reasons(store, folder, done))
    if all(reason.startswith(MISFIT) for reason in _reasons(store, folder, done)):
        raise BatchRejectedError(
            f"model {recipe.pin.name} version {recipe.pin.version} refused every row of batch {recipe.batch.batch_id}, "
            f"the first one with {first!r}: that is no fault of rows, and nothing was landed. See whether the rows are "
            "made for this model (its columns, its vocabulary), and log it again if it was exported wrongly.",
            failed=sum(part.failed for part in done),
        )
