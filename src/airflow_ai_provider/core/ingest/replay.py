"""Mend quarantined rows and land them as a batch of their own.

Invariants: a row keeps its id for ever; a row is replayed from one quarantine once, with one content (it may fail again
and be replayed from the new batch's quarantine); the same corrections give the same batch, however often they are run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from airflow_ai_provider.core.batch import QUARANTINE, ROW_ID, BatchRef, Slice, Span, digest_of
from airflow_ai_provider.core.ingest.block import cut
from airflow_ai_provider.core.ingest.contract import ORIGIN, PAYLOAD, Validator
from airflow_ai_provider.core.ingest.json_rows import ARROW
from airflow_ai_provider.core.ingest.landing import KIND, Landing
from airflow_ai_provider.core.ingest.sieve import Sieve, reject_more
from airflow_ai_provider.core.ledger import Ledger
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.errors import BatchRejectedError, SpanConflictError, SpecError

Fix = Callable[[dict[str, Any]], dict[str, Any] | None]


def replay_quarantine(
    store: Store,
    ledger: Ledger,
    validator: Validator,
    ref: BatchRef,
    fix: Fix | None = None,
    *,
    pipeline: str,
    corrections: Mapping[str, Mapping[str, Any]] | None = None,
    run_id: str = "replay",
) -> BatchRef:
    """Land the mended rows of a batch's quarantine under their own row ids.

    1. Mend: a row's JSON object with the changed fields over it; a row that is no object needs all fields.
    2. Claim the mended rows.
    3. Decode and validate them, write accepted and quarantined rows.
    4. Write the manifest, mark the claim landed.

    Rows that nothing mends stay where they are and are no part of the new batch.

    :param ref: the batch whose quarantine is mended.
    :param fix: takes a row's fields (none when its payload is no JSON object), returns the mended ones, or None to
        leave it in quarantine.
    :param corrections: row id → fields to change; applied before ``fix``.
    :return: reference of the new batch, kind ``batch``; the same for the same corrections.
    :raises SpecError: when corrections name rows that are not in the quarantine, or there is nothing to do.
    :raises SpanConflictError: when a row was replayed before with other content; a retry does not help.
    """
    if fix is None and not corrections:
        raise SpecError("there is nothing to replay: give corrections or fix.", faults=[("corrections", "empty")])
    mended = list(_mend(store, ref, fix, corrections or {}))  # 1
    rows = pa.concat_tables(mended) if mended else None
    slices = _slices(rows)
    span = Span(f"replay:{ref.batch_id}", "", slices)
    batch_id = f"{ref.batch_id}-r{digest_of(_content(rows))[7:19]}"
    facts = store.manifest(ref).facts
    told = {"span": span.to_dict(), "suite": validator.digest, "key": facts.get("key"), "replay_of": ref.to_dict()}
    landing = Landing(store, pipeline, batch_id)
    if rows is None:
        return landing.land(0, {**told, "columns": facts.get("columns", {})})
    claim = ledger.claim(pipeline, f"replay:{batch_id}", span, run_id)  # 2
    if claim.run_key != f"replay:{batch_id}":
        raise SpanConflictError(
            f"these rows of batch {ref.batch_id} were replayed before, with other content: see batch "
            f"{claim.ref.batch_id if claim.ref else claim.run_key}. A row is replayed from one quarantine once; if it "
            "failed again, replay it from that batch's quarantine.",
            owner_key=claim.run_key,
        )
    found = store.find(pipeline, KIND, batch_id)
    if claim.state == "landed" and found is not None:
        return found
    sieve = Sieve(validator, "json", _payload_types(facts.get("columns", {})))
    sifted = [sieve.sift(block) for block in cut([rows])]  # 3
    reasons = sieve.judge()
    for accepted, rejected in sifted:
        landing.write(*reject_more(accepted, rejected, reasons))
    try:
        landing.refuse(rows.num_rows, None, sieve.failures)
    except BatchRejectedError:
        ledger.release(pipeline, claim.run_key)  # so that other corrections may be tried
        raise
    new = landing.land(rows.num_rows, {**told, "columns": sieve.columns})  # 4
    ledger.landed(pipeline, claim.run_key, new)
    return new


def read_corrections(path: str | Path) -> dict[str, dict[str, Any]]:
    """Read a JSON file of row id → fields to change.

    :raises SpecError: when it is missing or is not such a file; a retry does not help.
    """
    try:
        data = json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise SpecError(
            f"the corrections at {path} cannot be read: {error}. Write a JSON object there: row id → changed fields.",
            faults=[("corrections", str(error))],
        ) from error
    if not isinstance(data, dict) or not all(isinstance(fields, dict) for fields in data.values()):
        raise SpecError(
            f"the corrections at {path} must be a JSON object of objects: row id → changed fields.",
            faults=[("corrections", "not an object of objects")],
        )
    return data


def _mend(
    store: Store, ref: BatchRef, fix: Fix | None, corrections: Mapping[str, Mapping[str, Any]]
) -> Iterator[pa.Table]:
    missing = set(corrections)
    for part in store.read(ref, QUARANTINE):
        missing -= set(part[ROW_ID].to_pylist())
        positions, payloads = [], []
        for i, (row_id, payload) in enumerate(zip(part[ROW_ID].to_pylist(), part[PAYLOAD].to_pylist(), strict=True)):
            mended = _mend_row(_fields(payload), corrections.get(row_id), fix)
            if mended is not None:
                positions.append(i)
                payloads.append(_written(row_id, mended))
        if positions:
            kept = part.select([ROW_ID, *(n for n in ORIGIN if n in part.column_names)])
            kept = kept.take(pa.array(positions, pa.int64()))
            yield kept.append_column(PAYLOAD, pa.array(payloads, pa.binary()))
    if missing:
        raise SpecError(
            f"{len(missing)} corrected row(s) are not in the quarantine of batch {ref.batch_id}: "
            f"{', '.join(sorted(missing)[:5])}. Take the row ids from its quarantine table.",
            faults=[(row_id, "not in quarantine") for row_id in sorted(missing)],
        )


def _mend_row(fields: dict[str, Any], changes: Mapping[str, Any] | None, fix: Fix | None) -> dict[str, Any] | None:
    if changes is None and fix is None:
        return None
    mended = {**fields, **(changes or {})}
    return fix(mended) if fix is not None else mended


def _fields(payload: bytes | None) -> dict[str, Any]:
    try:
        found = json.loads((payload or b"").decode())
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _written(row_id: str, fields: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(fields, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError) as error:
        raise SpecError(
            f"the mended row {row_id} cannot be written as JSON: {error}. Use texts, numbers, true, false, null, "
            "objects and arrays.",
            faults=[(row_id, str(error))],
        ) from error


def _slices(rows: pa.Table | None) -> tuple[Slice, ...]:
    # without a digest: the row is what is claimed, whatever its content
    return () if rows is None else tuple(sorted(Slice(row_id, 0, 1) for row_id in rows[ROW_ID].to_pylist()))


def _content(rows: pa.Table | None) -> list[list[str]]:
    if rows is None:
        return []
    return [[i, p.decode()] for i, p in zip(rows[ROW_ID].to_pylist(), rows[PAYLOAD].to_pylist(), strict=True)]


def _payload_types(columns: Mapping[str, str]) -> dict[str, str]:
    """The batch's columns by the types that payloads are decoded to; those of typed sources have Arrow's names."""
    names = {"double": "float64", "float": "float64", **dict.fromkeys(("int8", "int16", "int32"), "int64")}
    kinds = {
        name: "timestamp" if kind.startswith("timestamp") else names.get(kind, kind) for name, kind in columns.items()
    }
    return {name: kind if kind in ARROW else "json" for name, kind in kinds.items()}
