"""Ingest a span of rows: the one order in which it is safe, written once.

1. Fix the span, or find the claim that this run holds already.
2. Claim it in the ledger. It is cut into shards, each of which may be a task of its own.
3. Read a shard to its proven end.
4. Decode and validate it, block by block.
5. Write its accepted and quarantined rows, then its mark: the shard is done, and a killed one is redone alone.
6. Demand the marks of all shards, judge the batch as a whole, move what that rejects, refuse it when too many rows were
   rejected; write the manifest: now the batch exists.
7. Mark the claim landed.
8. Publish the source's offsets, for lag tools only.
9. Remove the marks, what lay beside them, and the parts that 6 has rewritten.

Invariants: rows are claimed before they are read and published after they are durable; a retry finds its own claim and
reads the same span; the same span under the same rules, cut alike, gives the same bytes, and however it is cut, the
same rows under the same columns; a kill between any two instructions loses nothing and doubles nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from itertools import islice
from typing import Any

import pyarrow as pa

from airflow_ai_provider.core.batch import BatchRef, Span, digest_of
from airflow_ai_provider.core.ingest.block import ROWS, cut
from airflow_ai_provider.core.ingest.contain import MARKER, contained
from airflow_ai_provider.core.ingest.contract import Remembers, Source, Validator
from airflow_ai_provider.core.ingest.landing import Landing, Shelved
from airflow_ai_provider.core.ingest.limit import Limit, plan_within
from airflow_ai_provider.core.ingest.progress import Progress
from airflow_ai_provider.core.ingest.shard import WHOLE, Shard, ShardRef, cut_span, shard_count, size_of
from airflow_ai_provider.core.ingest.shelf import FOLDER, KIND, Shelf, superseded
from airflow_ai_provider.core.ingest.sieve import Sieve
from airflow_ai_provider.core.ledger import Claim, Ledger
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.errors import AiProviderError, CorruptBatchError, SpanConflictError, SpecError

log = logging.getLogger(__name__)
Say = Callable[[str], None]
_HEAD_BLOCKS = 10
_HEAD_TRIES, _HEAD_PAUSE_S = 20, 0.05


@dataclass(frozen=True)
class IngestRun:
    """Which run asks, and what it may take.

    :param pipeline: whose rows they become.
    :param run_id: the run, for people.
    :param run_key: the run's task, without its try number: a retry has the same key and gets the same rows.
    :param window: take the rows of this time span instead of those that come next.
    :param limit: how much to take at the most.
    :param max_rejected: share (float, 0 to 1) or number (int) of rows that may be rejected; None: any.
    :param attempt: the task's try, in a text that sorts behind those of the tries before: one that comes too late
        claims nothing. Empty: not known.
    :raises SpecError: on creation, when a value cannot be run; a retry does not help.
    """

    pipeline: str
    run_id: str
    run_key: str
    window: tuple[datetime, datetime] | None = None
    limit: Limit = field(default_factory=Limit)
    max_rejected: float | int | None = None
    attempt: str = ""

    def __post_init__(self) -> None:
        limit = self.max_rejected
        wrong = isinstance(limit, bool) or (limit is not None and limit < 0) or (isinstance(limit, float) and limit > 1)
        if wrong:
            raise SpecError(
                f"max_rejected={limit!r}; give a share from 0.0 to 1.0 or a whole number of rows.",
                faults=[("max_rejected", "not a share or a count")],
            )
        if self.window and not (self.window[0].tzinfo and self.window[1].tzinfo and self.window[0] <= self.window[1]):
            raise SpecError(
                f"window={self.window}; give two times with a zone, the earlier one first.",
                faults=[("window", "no zone, or ends before it begins")],
            )


def ingest(
    source: Source,
    validator: Validator,
    store: Store,
    ledger: Ledger,
    run: IngestRun,
    *,
    progress: Say = log.info,
) -> BatchRef:
    """Take a span of rows once and land it as one batch, each row accepted or in quarantine with its reasons.

    All steps, with the span as its only shard. A retry after a crash before 6 reads the same span and writes the same
    bytes (after 5 it reads nothing); after 6 it finds the batch and goes on with 7. A span with nothing in it gives a
    landed batch without rows and claims nothing.

    :param source: closed at the end, whatever happens.
    :param progress: takes one line about every five seconds and one at the end.
    :return: reference of the landed batch, kind ``batch``, tables ``accepted`` and ``quarantine``.
    :raises SourceUnavailableError, LedgerUnavailableError: a retry may help.
    :raises SourceError, SpanConflictError, BatchRejectedError: a retry does not help; the message says what does.
    """
    try:
        (planned,) = plan_shards(source, ledger, run)
        work = Ingest(source, validator, store, ledger, run, progress)
        return work.land([work.shard(planned)])
    finally:
        source.close()


def plan_shards(source: Source, ledger: Ledger, run: IngestRun, shards: int | None = None) -> tuple[ShardRef, ...]:
    """Steps 1 and 2: claim the span of the whole batch, and say which shards it is cut into.

    :param shards: how many at the most; small ones are not worth a task each. None: the span itself.
    :return: at least one; that of a span with nothing in it claims nothing.
    :raises SpecError: when the number cannot be had; a retry does not help.
    """
    claim = ledger.claim_of(run.pipeline, run.run_key)
    if claim is None:
        span = _plan(source, ledger, run)
        # a zombie of this task may have claimed rows meanwhile, and then they are ours; from here on it cannot
        claim = ledger.claim_nothing(run.pipeline, run.run_key, run.attempt) if span.is_empty else None
        if span.is_empty and claim is None:
            still = Span(span.source, span.identity, span.slices)  # its facts change from try to try
            return (ShardRef(run.run_key, span.batch_id, WHOLE, 1, span=still),)
        claim = claim or ledger.claim(run.pipeline, run.run_key, span, run.run_id, run.attempt)
    of = 1 if shards is None else shard_count(claim.span, shards)
    pieces = cut_span(claim.span, of)
    return tuple(
        ShardRef(claim.run_key, claim.span.batch_id, Shard(number, of), len(pieces), size_of(piece))
        for number, piece in enumerate(pieces)
    )


@dataclass(frozen=True)
class Ingest:
    """Steps 3 to 9 of one run's batch: shard by shard, then all together.

    :param source: whose rows they are; whoever opened it closes it.
    :param validator: the rules.
    :param store: where batches lie.
    :param ledger: who holds which rows.
    :param run: which run asks.
    :param progress: takes one line about every five seconds and one at the end.
    """

    source: Source
    validator: Validator
    store: Store
    ledger: Ledger
    run: IngestRun
    progress: Say = log.info

    def shard(self, ref: ShardRef) -> ShardRef:
        """Steps 3 to 5: read, decode, validate and write one shard, unless an earlier try has done so.

        :param ref: from :func:`plan_shards`.
        :return: the same with its counts and the digest of its mark, for :meth:`land`.
        :raises SpanConflictError: when the claim was released meanwhile; a retry does not help.
        """
        if ref.span is not None:
            return ref
        claim = self._held(ref)
        if _landed(claim, self.store) or _written(claim, self.validator, self.store):
            return ref
        shelf = self._shelf(ref)
        found = shelf.find()
        if found and shelf.is_whole(found[0]):
            told = f"shard {ref.shard.number + 1} of {ref.count} was done by an earlier try; nothing is read again"
            self.progress(told)
            return replace(ref, mark=found[1], counts=found[0].counts)
        sieve = Sieve(self.validator, self.source.format, getattr(self.source, "columns", None))
        span = cut_span(claim.span, ref.shard.of)[ref.shard.number]
        with contained(self.source, self.validator.schema, self.store, shelf.folder) as read:
            blocks = cut(read(span))
            if ref.count > 1:
                blocks = self._under_one_head(blocks, sieve, ref, partial(read, claim.span))
            done = sieve.sift(blocks, shelf, Progress(_size(span), self.progress))
        # some sources have facts: schemas of a registry, what a replay replays
        done = replace(done, facts=getattr(self.source, "facts", {}))
        return replace(ref, mark=shelf.mark(done), counts=done.counts)

    def land(self, refs: Sequence[ShardRef]) -> BatchRef:
        """Steps 6 to 9: land the batch that all its shards make.

        :param refs: what :meth:`shard` returned, of all shards, in any order.
        :raises CorruptBatchError: a shard is not there, or was made under other rules; the message says what to clear.
        :raises BatchRejectedError: too many rows were rejected; a retry does not help.
        """
        ordered = _complete(refs)
        if ordered[0].span is not None:
            return self._land_nothing(ordered[0], ordered[0].span)
        claim = self._held(ordered[0])
        ref = _landed(claim, self.store)
        if ref is not None:
            self.progress(f"batch {ref.batch_id} was landed by run {claim.run_id}; nothing is read again")
        else:
            ref = self._write(claim, ordered)  # 6
            self.ledger.landed(self.run.pipeline, claim.run_key, ref)  # 7
            self.source.commit(claim.span)  # 8
        self._tidy(ref)  # 9
        return ref

    def _write(self, claim: Claim, refs: Sequence[ShardRef]) -> BatchRef:
        try:
            return _written(claim, self.validator, self.store) or self._join(claim, refs)
        except CorruptBatchError:
            # a zombie of this task may have landed the batch meanwhile, and removed the marks
            found = _written(claim, self.validator, self.store)
            if found is None:
                raise
            return found

    def _tidy(self, ref: BatchRef) -> None:
        folder = f"{self.run.pipeline}/{KIND}/{ref.batch_id}"
        try:
            for name in (*superseded(self.store.manifest(ref).parts), FOLDER):
                self.store.remove(f"{folder}/{name}")
        except AiProviderError as error:  # the batch is whole without that
            log.warning("what batch %s no longer needs is still there: %s", ref.batch_id, error)

    def _join(self, claim: Claim, refs: Sequence[ShardRef]) -> BatchRef:
        shards = [_marked(ref, self._shelf(ref)) for ref in refs]
        landing = Landing(self.store, self.run.pipeline, claim.span.batch_id, shards)
        landing.judge(self.validator)
        for rule, count in landing.warnings.items():
            self.progress(f"warning: {rule}" + (f" ({count:,} rows, kept)" if count else ""))
        facts = self._facts(claim.span)
        landing.refuse(self.run.max_rejected, facts)
        ref = landing.land(facts)
        self.progress(f"batch {ref.batch_id}: " + ", ".join(f"{count:,} {name}" for name, count in ref.counts.items()))
        return ref

    def _land_nothing(self, ref: ShardRef, span: Span) -> BatchRef:
        if self.ledger.claim_of(self.run.pipeline, ref.run_key) is not None:
            raise SpanConflictError(
                f"an earlier try of the task that plans the batch claimed rows for {ref.run_key} after a later one had "
                "found none. Clear that task, and those after it: they land these rows.",
                owner_key=ref.run_key,
            )
        # Named by the run: two runs that find nothing at the same offsets must not overwrite each other's manifest.
        batch_id = f"{span.batch_id}-{digest_of([ref.run_key, self.validator.digest])[7:15]}"
        return Landing(self.store, self.run.pipeline, batch_id, ()).land(self._facts(span))

    def _facts(self, span: Span) -> dict[str, Any]:
        return {"span": span.to_dict(), "suite": self.validator.digest, "key": self.source.key}

    def _held(self, ref: ShardRef) -> Claim:
        claim = self.ledger.claim_of(self.run.pipeline, ref.run_key)
        if claim is None or claim.span.batch_id != ref.batch_id:
            raise SpanConflictError(
                f"the claim {ref.run_key} on the rows of batch {ref.batch_id} was released meanwhile: another run may "
                "take them. Clear the task that plans the batch, and those after it.",
                owner_key=ref.run_key,
            )
        return claim

    def _shelf(self, ref: ShardRef) -> Shelf:
        # the batch's name is made of the span, and the shard's rows of that and its numbers
        rows = {"batch": ref.batch_id, "number": ref.shard.number, "of": ref.shard.of}
        made_from = {**rows, "suite": self.validator.digest}
        return Shelf(self.store, self.run.pipeline, ref.batch_id, ref.shard, made_from)

    def _under_one_head(
        self, blocks: Iterator[pa.Table], sieve: Sieve, ref: ShardRef, read_batch: Callable[[], Iterator[pa.Table]]
    ) -> Iterator[pa.Table]:
        """Fix the columns by the first rows of the batch, whichever shard this is, once its own first block is there.

        The first shard to find them stores them. That is the first one of all where it can be, for it alone has to
        read nothing for it; so the others give it the time that they would need to find them themselves.
        """
        first = next(blocks, None)
        if first is None:
            return
        suite = self.validator.digest[-12:]  # under other rules other rows may be the first that fit
        path = f"{self.run.pipeline}/{KIND}/{ref.batch_id}/{FOLDER}/columns-{suite}"
        data = self._await(path, ref)
        if data is not None:
            sieve.recall(pa.ipc.read_schema(pa.py_buffer(data)))
        else:
            # a full block of the first shard is the first block of the batch
            head = sieve.learn(first) if ref.shard.number == 0 and first.num_rows == ROWS else None
            head = head or _learn(sieve, read_batch())
            if head is not None:
                self.store.write_bytes(path, head.serialize().to_pybytes())
        yield first
        yield from blocks

    def _await(self, path: str, ref: ShardRef) -> bytes | None:
        """Read a file that the first shard of all may be about to write."""
        marker = f"{self._shelf(replace(ref, shard=replace(ref.shard, number=0))).folder}/{MARKER}"
        for _ in range(_HEAD_TRIES):
            data = self.store.read_bytes(path)
            if data is not None or ref.shard.number == 0 or self.store.read_bytes(marker) is None:
                return data
            time.sleep(_HEAD_PAUSE_S)
        return None


def _learn(sieve: Sieve, tables: Iterator[pa.Table]) -> pa.Schema | None:
    with closing(tables):  # type: ignore[type-var]  # all sources give generators
        return next(filter(None, map(sieve.learn, islice(cut(tables), _HEAD_BLOCKS))), None)


def _plan(source: Source, ledger: Ledger, run: IngestRun) -> Span:
    position = ledger.position(run.pipeline, source.name, source.identity())
    taken = ledger.files_taken(run.pipeline, source.name)
    if not isinstance(source, Remembers):
        return plan_within(source, position, taken, run.window, run.limit)
    known = ledger.files_seen(run.pipeline, source.name)
    source.seen = dict(known)
    try:
        return plan_within(source, position, taken, run.window, run.limit)
    finally:  # what was read before something failed need not be read again by the retry
        ledger.saw_files(
            run.pipeline, source.name, {path: file for path, file in source.seen.items() if known.get(path) != file}
        )


def _complete(refs: Sequence[ShardRef]) -> list[ShardRef]:
    """All shards of one batch in row order, each once."""
    ordered = sorted(refs, key=lambda ref: ref.shard.number)
    count = ordered[0].count if ordered else 0
    same = len({(ref.batch_id, ref.run_key, ref.shard.of, ref.count) for ref in ordered}) == 1
    if not same or [ref.shard.number for ref in ordered] != list(range(count)):
        raise CorruptBatchError(
            f"the shards {[ref.shard.number + 1 for ref in ordered]} of {count} make no whole batch. Clear the task "
            "that plans the batch, and those after it."
        )
    return ordered


def _marked(ref: ShardRef, shelf: Shelf) -> Shelved:
    found = shelf.find()
    if found is None or found[1] != ref.mark:
        why = "is not there, or was made under other expectations" if found is None else "was made anew since"
        raise CorruptBatchError(
            f"shard {ref.shard.number + 1} of {ref.count} of batch {ref.batch_id} {why}. Nothing was landed. Clear the "
            "shards' tasks: those that are done under these expectations return at once.",
            shard=ref.shard.number,
        )
    return Shelved(shelf, found[0])


def _landed(claim: Claim, store: Store) -> BatchRef | None:
    """The landed batch, if it still lies in this store; if not, its span is read once more into the same bytes."""
    if claim.state != "landed" or claim.ref is None:
        return None
    found = store.find(claim.pipeline, KIND, claim.span.batch_id)
    is_it = found is not None and found.digest == claim.ref.digest and store.is_whole(found)
    return claim.ref if is_it else None


def _written(claim: Claim, validator: Validator, store: Store) -> BatchRef | None:
    """The batch of a try that was killed between steps 6 and 7, unless the rules have changed since."""
    found = store.find(claim.pipeline, KIND, claim.span.batch_id)
    if found is None:
        return None
    facts = store.manifest(found).facts
    same = facts.get("span") == claim.span.to_dict() and facts.get("suite") == validator.digest
    return found if same and store.is_whole(found) else None


def _size(span: Span) -> int:
    """Rows of a span, for the time left: offsets of topic partitions, or what the files' plan counted."""
    if "rows" in span.facts:
        return int(span.facts["rows"])
    return sum(s.end - s.first for s in span.slices if not s.digest)
