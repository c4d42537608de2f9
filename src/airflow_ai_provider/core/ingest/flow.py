"""Ingest a span of rows: the one order in which it is safe, written once.

Invariants: rows are claimed before they are read and published after they are durable; a retry finds its own claim and
reads the same span; the same span under the same rules gives the same bytes; a kill between any two instructions loses
nothing and doubles nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

import pyarrow as pa

from airflow_ai_provider.core.batch import BatchRef, Span, digest_of
from airflow_ai_provider.core.ingest.behind import Behind
from airflow_ai_provider.core.ingest.block import cut
from airflow_ai_provider.core.ingest.contain import contained
from airflow_ai_provider.core.ingest.contract import Source, Validator
from airflow_ai_provider.core.ingest.decode import Decoded
from airflow_ai_provider.core.ingest.landing import KIND, Landing
from airflow_ai_provider.core.ingest.progress import Progress
from airflow_ai_provider.core.ingest.sieve import Shelf, Sieve, reject_more
from airflow_ai_provider.core.ledger import Claim, Ledger
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.errors import SpecError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class IngestRun:
    """Which run asks, and what it may take.

    :param pipeline: whose rows they become.
    :param run_id: the run, for people.
    :param run_key: the run's task, without its try number: a retry has the same key and gets the same rows.
    :param window: take the rows of this time span instead of those that come next.
    :param row_limit: take about so many rows at most; None: all there are.
    :param max_rejected: share (float, 0 to 1) or number (int) of rows that may be rejected; None: any.
    :raises SpecError: on creation, when a value cannot be run.
    """

    pipeline: str
    run_id: str
    run_key: str
    window: tuple[datetime, datetime] | None = None
    row_limit: int | None = None
    max_rejected: float | int | None = None

    def __post_init__(self) -> None:
        if self.row_limit is not None and self.row_limit < 1:
            raise SpecError(f"row_limit={self.row_limit}; at least 1, or None for all.", faults=[("row_limit", "< 1")])
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
    progress: Callable[[str], None] = log.info,
) -> BatchRef:
    """Take a span of rows once and land it as one batch, each row accepted or in quarantine with its reasons.

    1. Fix the span, or find the claim that this run holds already. A landed one ends here: its batch is the answer.
    2. Claim it in the ledger.
    3. Read it to the proven end.
    4. Decode and validate, block by block, then the batch as a whole.
    5. Write accepted and quarantined rows; refuse the batch when too many were rejected.
    6. Write the manifest: now the batch exists.
    7. Mark the claim landed.
    8. Publish the source's offsets, for lag tools only.

    A retry after a crash before 6 reads the same span and writes the same bytes; after 6 it finds the batch and goes on
    with 7. A span with nothing in it gives a landed batch without rows and claims nothing.

    :param source: closed at the end, whatever happens.
    :param progress: takes one line about every five seconds and one at the end.
    :return: reference of the landed batch, kind ``batch``, tables ``accepted`` and ``quarantine``.
    :raises SourceUnavailableError, LedgerUnavailableError: a retry may help.
    :raises SourceError, SpanConflictError, BatchRejectedError: a retry does not help; the message says what does.
    """
    try:
        claim = _claim(source, ledger, run)  # 1, 2
        if isinstance(claim, Span):
            return _land_nothing(claim, source, validator, store, run)
        landed = _landed(claim, store)
        if landed is not None:
            progress(f"batch {landed.batch_id} was landed by run {claim.run_id}; nothing is read again")
            return landed
        ref = _written(claim, validator, store) or _write(
            claim.span, source, validator, store, run, progress=progress
        )  # 3-6
        ledger.landed(run.pipeline, claim.run_key, ref)  # 7
        source.commit(claim.span)  # 8
        return ref
    finally:
        source.close()


def _claim(source: Source, ledger: Ledger, run: IngestRun) -> Claim | Span:
    """Steps 1 and 2: this run's claim, or a span that is empty and so needs none."""
    held = ledger.claim_of(run.pipeline, run.run_key)
    if held is not None:
        return held
    position = ledger.position(run.pipeline, source.name, source.identity())
    taken = ledger.files_taken(run.pipeline, source.name)
    span = source.plan(position, taken, run.window, run.row_limit)
    return span if span.is_empty else ledger.claim(run.pipeline, run.run_key, span, run.run_id)


def _landed(claim: Claim, store: Store) -> BatchRef | None:
    """The landed batch, if it still lies in this store; if not, its span is read once more into the same bytes."""
    if claim.state != "landed" or claim.ref is None:
        return None
    found = store.find(claim.pipeline, KIND, claim.span.batch_id)
    return claim.ref if found is not None and found.digest == claim.ref.digest else None


def _written(claim: Claim, validator: Validator, store: Store) -> BatchRef | None:
    """The batch of a try that was killed between steps 6 and 7, unless the rules have changed since."""
    found = store.find(claim.pipeline, KIND, claim.span.batch_id)
    if found is None:
        return None
    facts = store.manifest(found).facts
    same = facts.get("span") == claim.span.to_dict() and facts.get("suite") == validator.digest
    return found if same else None


def _write(
    span: Span,
    source: Source,
    validator: Validator,
    store: Store,
    run: IngestRun,
    *,
    progress: Callable[[str], None],
) -> BatchRef:
    """Steps 3 to 6."""
    landing = Landing(store, run.pipeline, span.batch_id)
    sieve = Sieve(validator, source.format, getattr(source, "columns", None))
    report = Progress(_size(span), progress)
    waits = validator.batch_rules is not None and validator.batch_rules.rejects_rows
    with ExitStack() as stack:
        read = stack.enter_context(contained(source, validator.schema, store, f"{run.pipeline}/{KIND}/{span.batch_id}"))
        shelf = stack.enter_context(Shelf()) if waits else None
        put = shelf.put if shelf is not None else landing.write
        behind = stack.enter_context(Behind())
        for block in cut(read(span)):  # 3
            decoded = sieve.decode(block)  # 4
            # validating and writing hold no interpreter lock to speak of: they keep up while the next block is read
            behind.do(partial(_part, sieve, block, decoded, put))  # 4, 5
            report.note(block.num_rows, landing.accepted, landing.quarantined)
        behind.wait()
        reasons = sieve.judge()  # 4, what only the whole batch can tell
        for accepted, rejected in shelf.take() if shelf is not None else ():
            landing.write(*reject_more(accepted, rejected, reasons))  # 5
    for rule, count in sieve.warnings.items():
        progress(f"warning: {rule}" + (f" ({count:,} rows, kept)" if count else ""))
    landing.refuse(report.read, run.max_rejected, sieve.failures)
    ref = landing.land(report.read, _facts(span, source, validator, sieve.columns, dict(sieve.warnings)))  # 6
    report.end(landing.accepted, landing.quarantined)
    return ref


def _part(sieve: Sieve, block: pa.Table, decoded: Decoded, put: Callable[[pa.Table, pa.Table], None]) -> None:
    put(*sieve.validate(block, decoded))


def _land_nothing(span: Span, source: Source, validator: Validator, store: Store, run: IngestRun) -> BatchRef:
    # Named by the run: two runs that find nothing at the same offsets must not overwrite each other's manifest.
    batch_id = f"{span.batch_id}-{digest_of([run.run_key, validator.digest])[7:15]}"
    still = Span(span.source, span.identity, span.slices)  # its facts change from try to try
    return Landing(store, run.pipeline, batch_id).land(0, _facts(still, source, validator, {}, {}))


def _facts(
    span: Span, source: Source, validator: Validator, columns: Mapping[str, str], warnings: Mapping[str, int]
) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "span": span.to_dict(),
        "suite": validator.digest,
        "key": source.key,
        "columns": dict(columns),
        **getattr(source, "facts", {}),  # some have any: schemas of a registry, what a replay replays
    }
    return {**facts, "warnings": dict(sorted(warnings.items()))} if warnings else facts


def _size(span: Span) -> int:
    """Rows of a span, for the time left: offsets of topic partitions, or what the files' plan counted."""
    if "rows" in span.facts:
        return int(span.facts["rows"])
    return sum(s.end - s.first for s in span.slices if not s.digest)
