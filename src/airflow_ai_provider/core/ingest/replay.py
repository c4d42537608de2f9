"""Mend quarantined rows and ingest them again, as a source of their own.

Invariants: a row keeps its id for ever; a row is replayed from one quarantine once, with one content (it may fail again
and be replayed from the new batch's quarantine); the same corrections give the same replay, and that the same batch,
however often they are run; what shall be replayed is stored before anything is claimed.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from datetime import datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from airflow_ai_provider.core.batch import QUARANTINE, ROW_ID, BatchRef, Slice, Span, digest_of
from airflow_ai_provider.core.ingest.contract import ORIGIN, PAYLOAD, REASONS, Validator
from airflow_ai_provider.core.ingest.correction import Corrections, read_fields
from airflow_ai_provider.core.ingest.flow import IngestRun, ingest
from airflow_ai_provider.core.ingest.json_rows import ARROW
from airflow_ai_provider.core.ledger import Claim, Ledger
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.errors import BatchRejectedError, SpanConflictError, SpecError

Fix = Callable[[dict[str, Any]], dict[str, Any] | None]
KIND, MENDED = "replay", "mended"
_CONTENT = "content "
"""Begins the slice that names what was mended how: the same rows with other content are not the same span."""


def replay_quarantine(
    store: Store,
    ledger: Ledger,
    validator: Validator,
    ref: BatchRef,
    fix: Fix | None = None,
    *,
    pipeline: str,
    corrections: Corrections | Mapping[str, Mapping[str, Any]] | None = None,
    run_id: str = "replay",
) -> BatchRef:
    """Mend rows of a batch's quarantine and land them: :func:`prepare_replay`, then :func:`land_replay`."""
    replay = prepare_replay(store, ref, fix, pipeline=pipeline, corrections=corrections)
    return land_replay(store, ledger, validator, replay.batch_id, pipeline=pipeline, run_id=run_id)


def prepare_replay(
    store: Store,
    ref: BatchRef,
    fix: Fix | None = None,
    *,
    pipeline: str,
    corrections: Corrections | Mapping[str, Mapping[str, Any]] | None = None,
    leave: Collection[str] = (),
) -> BatchRef:
    """Mend rows of a batch's quarantine and store them, ready to be replayed by any run of the pipeline.

    Rows that nothing mends stay where they are and are no part of the replay.

    :param ref: the batch whose quarantine is mended.
    :param fix: takes a row's fields (none when its payload is no JSON object), returns the mended ones, or None to
        leave it in quarantine.
    :param corrections: a mapping is row id → fields to change; applied before ``fix``.
    :param leave: rows that ``fix`` is not asked about.
    :return: reference of the mended rows, kind ``replay``; the same for the same corrections.
    :raises SpecError: when corrections name rows that are not in the quarantine, or there is nothing to do; a retry
        does not help.
    """
    asked = corrections if isinstance(corrections, Corrections) else Corrections(changed=corrections or {})
    if fix is None and not asked.row_ids:
        raise SpecError("there is nothing to replay: give corrections or fix.", faults=[("corrections", "empty")])
    reasons: Counter[str] = Counter()
    mended = list(_mend(store, ref, fix, asked, leave=frozenset(leave), reasons=reasons))
    rows = pa.concat_tables(mended) if mended else pa.table({ROW_ID: pa.array([], pa.string())})
    facts = store.manifest(ref).facts
    told = {name: facts.get(name) for name in ("key", "columns")}
    writer = store.open_batch(pipeline, KIND, f"{ref.batch_id}-r{digest_of(_content(rows))[7:19]}")
    for part in mended:
        writer.write(MENDED, part)
    reasons_told = dict(sorted(reasons.items()))
    return writer.land({MENDED: rows.num_rows}, {**told, "replay_of": ref.to_dict(), "reasons": reasons_told})


def land_replay(
    store: Store,
    ledger: Ledger,
    validator: Validator,
    replay_id: str,
    *,
    pipeline: str,
    run_id: str,
) -> BatchRef:
    """Ingest a prepared replay by the steps of every ingest (:func:`~airflow_ai_provider.core.ingest.flow.ingest`).

    The claim belongs to the replay: whichever run lands it, and however often, gets the same batch.

    :return: reference of the new batch, kind ``batch``; its facts name ``replay`` and ``replay_of``.
    :raises SpecError: when there is no such replay; a retry does not help.
    :raises SpanConflictError: when a row was replayed before with other content; a retry does not help.
    :raises BatchRejectedError: when a whole-batch rule fails; the rows are free for other corrections; a retry does not
        help.
    """
    source = ReplaySource(store, pipeline, replay_id)
    demand_free(ledger, pipeline, source)
    run = IngestRun(pipeline, run_id, source.run_key)
    try:
        return ingest(source, validator, store, ledger, run)
    except BatchRejectedError:
        ledger.release(pipeline, run.run_key)  # so that other corrections may be tried
        raise


class ReplaySource:
    """The mended rows of a prepared replay, as a source whose span is claimed row by row.

    :param replay_id: the name that :func:`prepare_replay` gave; it may come from a run's conf.
    :raises SpecError: when there is no such replay; a retry does not help.
    """

    format = "json"

    def __init__(self, store: Store, pipeline: str, replay_id: str) -> None:
        found = store.find(pipeline, KIND, replay_id) if re.fullmatch(r"[\w-][\w.-]*", replay_id) else None
        if found is None:
            raise SpecError(
                f"there is no replay {replay_id!r} of pipeline {pipeline!r} in {store.root}. Prepare it with "
                "'airflow ai quarantine replay', with the same store.",
                faults=[("replay", "not found")],
            )
        self._store, self._ref = store, found
        self._facts = store.manifest(found).facts
        self.replay_of = BatchRef.from_dict(self._facts["replay_of"])
        self.name, self.key = name_of(self.replay_of.batch_id), self._facts.get("key")
        self.run_key = f"replay:{replay_id}"

    @property
    def facts(self) -> dict[str, Any]:
        """What the new batch's manifest says beside its span."""
        return {"replay": self._ref.batch_id, "replay_of": self.replay_of.to_dict()}

    @property
    def columns(self) -> dict[str, str]:
        """Types of the first batch's columns, so that the new one has the same."""
        return _payload_types(self._facts.get("columns") or {})

    def identity(self) -> str:
        return ""

    def plan(
        self,
        position: Mapping[str, int],
        taken: Mapping[str, str],
        window: tuple[datetime, datetime] | None,
        row_limit: int | None,
    ) -> Span:
        """All mended rows, and one slice that names their content."""
        # without a digest: the row is what is claimed, whatever its content
        slices = sorted(Slice(row_id, 0, 1) for row_id in self.row_ids())
        if slices:
            slices = [Slice(f"{_CONTENT}{self._ref.batch_id}", 0, 1), *slices]
        return Span(self.name, "", tuple(slices), {"rows": len(slices[1:]), "reasons": self._facts["reasons"]})

    def row_ids(self) -> list[str]:
        """The rows that are replayed."""
        return [row_id for part in self._store.read(self._ref, MENDED, [ROW_ID]) for row_id in part[ROW_ID].to_pylist()]

    def read(self, span: Span) -> Iterator[pa.Table]:
        wanted = pa.array(sorted(rows_of(span)), pa.string())
        for part in self._store.read(self._ref, MENDED):
            yield part.filter(pc.is_in(part[ROW_ID], wanted))

    def commit(self, span: Span) -> None:
        """Nothing: no tool watches a quarantine's offsets."""

    def close(self) -> None:
        """Nothing is open."""


def name_of(batch_id: str) -> str:
    """Return the name of the source that a batch's quarantine is to its replays."""
    return f"replay:{batch_id}"


def rows_of(span: Span) -> list[str]:
    """Return the rows that a replay's span holds."""
    return [s.partition for s in span.slices if not s.partition.startswith(_CONTENT)]


def demand_free(ledger: Ledger, pipeline: str, source: ReplaySource) -> None:
    """Demand that no row of a replay was replayed before with other content.

    :raises SpanConflictError: naming the rows and where they went; a retry does not help. Two who replay at one moment
        are told apart by the claim itself.
    """
    mine, taken = set(source.row_ids()), dict[str, Claim]()
    for claim in ledger.claims(pipeline):
        if claim.span.source == source.name and claim.run_key != source.run_key:
            taken |= {row_id: claim for row_id in rows_of(claim.span) if row_id in mine}
    if not taken:
        return
    told = [f"{row_id} ({_where(claim)})" for row_id, claim in sorted(taken.items())[:5]]
    raise SpanConflictError(
        f"{len(taken)} of these rows of batch {source.replay_of.batch_id} were replayed before, with other content: "
        f"{', '.join(told)}. A row is replayed from one quarantine once: leave them out, and mend what failed again in "
        "the new batch's quarantine.",
        owner=next(iter(taken.values())).run_id,
        owner_key=next(iter(taken.values())).run_key,
        rows=sorted(taken),
    )


def _where(claim: Claim) -> str:
    if claim.ref is not None:
        return f"landed in batch {claim.ref.batch_id}"
    return f"held by run {claim.run_id}; let it finish, or release {claim.run_key}"


def _mend(
    store: Store, ref: BatchRef, fix: Fix | None, asked: Corrections, *, leave: frozenset[str], reasons: Counter[str]
) -> Iterator[pa.Table]:
    missing = asked.row_ids
    for part in store.read(ref, QUARANTINE):
        row_ids = part[ROW_ID].to_pylist()
        missing -= set(row_ids)
        positions, payloads = [], []
        for i, (row_id, payload) in enumerate(zip(row_ids, part[PAYLOAD].to_pylist(), strict=True)):
            mended = _mend_row(row_id, read_fields(payload) or {}, asked, None if row_id in leave else fix)
            if mended is not None:
                positions.append(i)
                payloads.append(_written(row_id, mended))
        if positions:
            at = pa.array(positions, pa.int64())
            reasons.update(told[0].partition(":")[0] for told in part[REASONS].take(at).to_pylist())
            kept = part.select([ROW_ID, *(n for n in ORIGIN if n in part.column_names)]).take(at)
            yield kept.append_column(PAYLOAD, pa.array(payloads, pa.binary()))
    if missing:
        raise SpecError(
            f"{len(missing)} corrected row(s) are not in the quarantine of batch {ref.batch_id}: "
            f"{', '.join(sorted(missing)[:5])}. Take the row ids from its quarantine table.",
            faults=[(row_id, "not in quarantine") for row_id in sorted(missing)],
        )


def _mend_row(row_id: str, fields: dict[str, Any], asked: Corrections, fix: Fix | None) -> dict[str, Any] | None:
    mended = asked.apply(row_id, fields)
    if fix is None:
        return mended
    return fix(fields if mended is None else mended)


def _written(row_id: str, fields: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(fields, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError) as error:
        raise SpecError(
            f"the mended row {row_id} cannot be written as JSON: {error}. Use texts, numbers, true, false, null, "
            "objects and arrays.",
            faults=[(row_id, str(error))],
        ) from error


def _content(rows: pa.Table) -> list[list[str]]:
    if not rows.num_rows:
        return []
    return [[i, p.decode()] for i, p in zip(rows[ROW_ID].to_pylist(), rows[PAYLOAD].to_pylist(), strict=True)]


def _payload_types(columns: Mapping[str, str]) -> dict[str, str]:
    """The batch's columns by the types that payloads are decoded to; those of typed sources have Arrow's names."""
    names = {"double": "float64", "float": "float64", **dict.fromkeys(("int8", "int16", "int32"), "int64")}
    kinds = {
        name: "timestamp" if kind.startswith("timestamp") else names.get(kind, kind) for name, kind in columns.items()
    }
    return {name: kind if kind in ARROW else "json" for name, kind in kinds.items()}
