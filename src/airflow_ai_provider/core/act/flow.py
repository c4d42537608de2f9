"""Act: one effect per row on the outside world, at most once per key.

The order, per chunk of rows (several chunks at a time, so that the sender's connections stay busy):

1. reserve: key and fingerprint of every effect, in one commit;
2. sent: those still to be sent, in one commit;
3. send, each with its key;
4. record what became of them, in one commit.

When all rows are through: 5. write the outcomes, land them, 6. note in the ledger that the action is through.

Invariants: a killed run leaves a ledger that says what may have left; running again asks again under the same keys;
nothing lands while an outcome is unknown; the outcomes' bytes depend on rows, action, run and answers only.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import pyarrow as pa

from airflow_ai_provider.core.act.deliver import CONFLICT, Courier, Settled
from airflow_ai_provider.core.act.effect import ActRun, Effect, count_rows, read_effects
from airflow_ai_provider.core.act.progress import Progress
from airflow_ai_provider.core.act.sender import Sender
from airflow_ai_provider.core.act.value import HttpAction
from airflow_ai_provider.core.batch import OUTCOMES, ROW_ID, BatchRef, digest_of, exceeds
from airflow_ai_provider.core.ledger import Intent, Ledger
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.errors import (
    ActionUnavailableError,
    IdempotencyConflictError,
    SagaFailedError,
    UnknownOutcomeError,
)

log = logging.getLogger(__name__)
_AT_A_TIME = 3  # chunks: one sends, one is recorded, one is being reserved
_PART_ROWS = 50_000
_MUTED = Settled("muted")
_SCHEMA = pa.schema(
    [
        (ROW_ID, pa.string()),
        ("key", pa.string()),
        ("state", pa.string()),
        ("status", pa.int32()),
        ("receiver_id", pa.string()),
        ("reason", pa.string()),
    ]
)


def act(  # noqa: PLR0917 - rows, action and the four things it works with, named at every call
    batches: Sequence[BatchRef],
    action: HttpAction,
    store: Store,
    ledger: Ledger,
    sender: Sender,
    run: ActRun,
    *,
    chunk: int = 256,
    progress: Callable[[str], None] = log.info,
    landed: Callable[[BatchRef], None] | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> BatchRef:
    """Do one effect per row, each at most once per key as far as the receiver honours the key.

    Two rows with one key and payload are one effect; what an earlier try or run has done is not sent again. At the end
    the sender's connections are closed.

    :param batches: the rows to act on, in this order.
    :param chunk: rows per ledger commit; what is sent and not yet recorded when the process dies is asked for again.
    :param progress: gets a line about every five seconds.
    :param landed: called with the outcomes as soon as they are durable, before a refusal is raised.
    :param sleep: waits a number of seconds.
    :return: the landed outcomes: one row per row, with key, state, status, the receiver's id and reason.
    :raises ActionUnavailableError: the receiver takes nothing now; what is done is recorded, a retry sends the rest.
    :raises UnknownOutcomeError: calls left and no answer came; nothing lands, a retry asks again under the same keys.
    :raises SagaFailedError: more rows refused than ``max_refused`` allows; they have landed (``ref``), no retry helps.
    :raises IdempotencyConflictError: the same, when some of them reuse a key for another payload.
    """
    sheet = _Sheet()
    effects = read_effects(batches, action, store, run, sender.address)
    if run.muted:
        for effect in effects:
            sheet.take(effect)
            sheet.settled[effect.intent.key] = _MUTED
    else:
        courier = Courier(ledger, sender, action.answer_fields, run.resend_refused, sleep)
        watch = Progress(action.name, count_rows(batches, store), progress)
        try:
            _deliver(effects, sheet, courier, watch, chunk)
        finally:
            watch.end()
            sender.close()
        _demand_answers(sheet, action, sender.address)
    ref = _land(batches, action, store, run, sheet)
    if not run.muted:
        ledger.finished(run.pipeline, run.run_id, action.name, ref)
    if landed:
        landed(ref)
    _demand_limit(sheet, action, ref)
    return ref


@dataclass
class _Sheet:
    """What this call knows: the rows in order, and how each effect stands."""

    rows: list[tuple[str, str, bool]] = field(default_factory=list)  # row id, key, whether it clashes within this call
    fingerprints: dict[str, str] = field(default_factory=dict)
    clashes: list[Intent] = field(default_factory=list)
    settled: dict[str, Settled] = field(default_factory=dict)

    def take(self, effect: Effect) -> bool:
        """Note a row; True when its effect is to be delivered, False when an earlier row of this call has its key."""
        intent = effect.intent
        first = self.fingerprints.get(intent.key)
        clash = first not in (None, intent.fingerprint)
        if clash:
            self.clashes.append(intent)
        self.fingerprints.setdefault(intent.key, intent.fingerprint)
        self.rows.append((intent.row_id, intent.key, clash))
        return first is None

    def in_state(self, state: str) -> list[str]:
        """Return the keys of the effects that stand so."""
        return [key for key, settled in self.settled.items() if settled.state == state]

    @property
    def standings(self) -> Iterator[tuple[str, str, Settled]]:
        """Row id, key and how it stands, in the rows' order."""
        for row_id, key, clash in self.rows:
            yield row_id, key, CONFLICT if clash else self.settled[key]


def _deliver(effects: Iterator[Effect], sheet: _Sheet, courier: Courier, watch: Progress, chunk: int) -> None:
    """Take all chunks through the courier; stop early when the receiver answers nothing any more."""
    running: set[Future[dict[str, Settled]]] = set()
    with ThreadPoolExecutor(_AT_A_TIME, "act") as pool:  # leaving it waits for the chunks that are on their way
        for some in _chunks(effects, sheet, chunk):
            running.add(pool.submit(courier.deliver, some))
            if len(running) == _AT_A_TIME and not _collect(running, sheet, watch):
                break
        while running:
            _collect(running, sheet, watch)
    if sheet.clashes:
        courier.refuse_conflicts(sheet.clashes)


def _chunks(effects: Iterator[Effect], sheet: _Sheet, chunk: int) -> Iterator[list[Effect]]:
    some: list[Effect] = []
    for effect in effects:
        if sheet.take(effect):
            some.append(effect)
        if len(some) == chunk:
            yield some
            some = []
    if some:
        yield some


def _collect(running: set[Future[dict[str, Settled]]], sheet: _Sheet, watch: Progress) -> bool:
    """Take over the chunks that are through; False when it makes no sense to send more."""
    finished, _ = wait(running, return_when=FIRST_COMPLETED)
    goes_on = True
    for future in finished:
        running.discard(future)
        settled = future.result()
        sheet.settled |= settled
        states = [s.state for s in settled.values()]
        watch.count(sum(s.is_news for s in settled.values()), [s.undone or s.state for s in settled.values()])
        goes_on &= "later" not in states and set(states) != {"unknown"}
    return goes_on


def _demand_answers(sheet: _Sheet, action: HttpAction, address: str) -> None:
    later, unknown = sheet.in_state("later"), sheet.in_state("unknown")
    standing = f"{len(sheet.in_state('done'))} of the effects seen so far are done and recorded"
    if later:
        raise ActionUnavailableError(
            f"{action.name}: {address} takes nothing now ({sheet.settled[later[0]].reason}). {standing}, "
            f"{len(later)} were surely not done. "
            "Check the receiver and the connection; the retry sends only what is open.",
            action=action.name,
            address=address,
            keys=later,
        )
    if unknown:
        raise UnknownOutcomeError(
            f"{action.name}: {len(unknown)} calls to {address} left and got no whole answer "
            f"({sheet.settled[unknown[0]].reason}), first key {unknown[0]}. {standing}; nothing has landed. "
            "The retry asks again under the same keys; look at the receiver if that does not resolve it.",
            action=action.name,
            address=address,
            keys=unknown,
        )


def _land(batches: Sequence[BatchRef], action: HttpAction, store: Store, run: ActRun, sheet: _Sheet) -> BatchRef:
    inputs = [{"batch_id": b.batch_id, "digest": b.digest, "tables": list(b.tables)} for b in batches]
    facts = {"action": action.to_dict(), "inputs": inputs, "step": run.step, "run_id": run.run_id, "muted": run.muted}
    writer = store.open_batch(run.pipeline, OUTCOMES, f"{action.name}-{digest_of(facts)[7:23]}")
    counts = dict.fromkeys(("rows", "done", "refused", "unknown", "muted"), 0)
    lines: list[tuple[str, str, str, int, str, str]] = []
    for row_id, key, s in sheet.standings:
        counts["rows"] += 1
        counts[s.state] += 1
        lines.append((row_id, key, s.state, s.status, s.receiver_id, s.reason))
        if len(lines) == _PART_ROWS:
            writer.write(OUTCOMES, _table(lines))
            lines = []
    if lines or not counts["rows"]:
        writer.write(OUTCOMES, _table(lines))
    return writer.land(counts, facts)


def _table(lines: Sequence[tuple[str, str, str, int, str, str]]) -> pa.Table:
    columns = [pa.array([line[at] for line in lines], kind.type) for at, kind in enumerate(_SCHEMA)]
    return pa.table(columns, schema=_SCHEMA)


def _demand_limit(sheet: _Sheet, action: HttpAction, ref: BatchRef) -> None:
    refused = [(row_id, key, s) for row_id, key, s in sheet.standings if s.state == "refused"]
    if not exceeds(len(refused), len(sheet.rows), action.max_refused):
        return
    row_id, _, first = refused[0]
    facts: Mapping[str, object] = {"action": action.name, "ref": ref, "keys": [key for _, key, _ in refused]}
    said = (
        f"{action.name}: {len(refused)} of {len(sheet.rows)} rows were refused, "
        f"max_refused allows {action.max_refused}. First: row {row_id}: {first.reason}. All reasons are in {ref.uri}."
    )
    if any(s == CONFLICT for _, _, s in refused):
        raise IdempotencyConflictError(f"{said} One key stands for one effect: rename the changed action.", **facts)
    raise SagaFailedError(f"{said} Correct the rows or the template, or raise max_refused.", **facts)
