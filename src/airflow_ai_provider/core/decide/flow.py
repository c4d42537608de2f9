"""Decide a stored batch of predictions: one batch of routes, each row in exactly one table of it.

Order: 1 open both manifests and check that their parts match → for each part: 2 read rows and predictions → 3 check
that they are the same rows in the same order → 4 set failed rows aside (they stay with the predictions, with their
error) → 5 route → 6 write one part per route → 7 check the counts and land the manifest.

Invariants: the same predictions and policy give the same bytes; nothing is landed unless every row is accounted for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from airflow_ai_provider.core.batch import ACCEPTED, PREDICTIONS, ROUTES, ROW_ID, BatchRef, Manifest, digest_of
from airflow_ai_provider.core.decide.calibrate import Calibration
from airflow_ai_provider.core.decide.policy import Policy
from airflow_ai_provider.core.decide.route import PREDICTED, route
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.errors import RowMismatchError, SpecError

KIND = "routes"


def decide(
    predictions: BatchRef, policy: Policy, store: Store, *, pipeline: str
) -> tuple[dict[str, BatchRef], dict[str, Any]]:
    """Send every predicted row down one route.

    :param predictions: reference of the predictions.
    :param policy: the bars, and what becomes of the rest.
    :param store: where batches lie.
    :param pipeline: the DAG's id: the folder of the new batch.
    :return: route → reference of its rows (``act``, ``review``, ``fallback``, ``hold``), and the facts for the ledger.
    :raises RowMismatchError: rows and predictions are not the same rows; a retry does not help.
    :raises SpecError: the policy does not fit the rows; a retry does not help.
    """
    scored = store.manifest(predictions)
    _check_kind(scored)
    source = BatchRef.from_dict(scored.facts["input"])
    batch = store.manifest(source)
    calibration = Calibration.from_dict((scored.facts["pin"].get("metadata") or {}).get("calibration"))
    name = digest_of([predictions.digest, policy.digest, calibration.digest])[7:19]
    writer = store.open_batch(pipeline, KIND, f"{predictions.batch_id}-{name}")
    counts, failed = dict.fromkeys(ROUTES, 0), 0
    for rows, unpredicted in _predicted(store, source, batch, predictions, scored):
        failed += unpredicted
        for name, table in _split(route(rows, policy, calibration)):
            counts[name] += table.num_rows
            writer.write(name, table)
    _check_counts(scored, sum(counts.values()), failed)
    facts = {
        "policy": policy.to_dict(),
        "pin": scored.facts["pin"],
        "calibration": calibration.to_dict(),
        "predictions": predictions.to_dict(),
        "key": batch.facts.get("key"),
        "failed": failed,
    }
    ref = writer.land({"predicted": sum(counts.values()), **counts}, facts)
    return {name: ref.only(name) for name in ROUTES}, _noted(ref, policy, facts)


def _noted(ref: BatchRef, policy: Policy, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What the ledger keeps of a decide: enough to explain it, no rows."""
    pin = facts["pin"]
    return {
        "batch_id": ref.batch_id,
        "batch": ref.to_dict(),
        "policy": facts["policy"],
        "policy_digest": policy.digest,
        "pin": {name: pin.get(name) for name in ("name", "version", "alias", "digest")},
        "counts": dict(ref.counts),
        "failed": facts["failed"],
    }


def _predicted(
    store: Store, source: BatchRef, batch: Manifest, predictions: BatchRef, scored: Manifest
) -> Iterator[tuple[pa.Table, int]]:
    """Yield (rows that have a prediction, beside it; count of those that failed), part by part."""
    ours, theirs = batch.table(ACCEPTED), scored.table(PREDICTIONS)
    if [part.row_count for part in ours] != [part.row_count for part in theirs]:
        raise _mismatch(
            predictions, f"has parts of {[p.row_count for p in theirs]} rows for {[p.row_count for p in ours]}"
        )
    for part, scored_part in zip(ours, theirs, strict=True):
        rows = store.read_part(source, part)
        answers = store.read_part(predictions, scored_part, [ROW_ID, *PREDICTED, "error"])
        if not rows[ROW_ID].equals(answers[ROW_ID]):
            raise _mismatch(predictions, f"{scored_part.path} has other row ids, or another order, than {part.path}")
        for name in PREDICTED:
            if name in rows.column_names:
                raise SpecError(
                    f"the rows have a column named {name!r}, as the prediction has. Rename it at the source.",
                    faults=[(name, "is the name of a column that the prediction adds")],
                )
        binary = [f.name for f in rows.schema if pa.types.is_binary(f.type) or pa.types.is_large_binary(f.type)]
        rows = rows.drop_columns(binary)
        for name in PREDICTED:
            rows = rows.append_column(name, answers[name])
        is_fine = pc.is_null(answers["error"])
        yield rows.filter(is_fine), rows.num_rows - pc.sum(is_fine).as_py() if rows.num_rows else 0


def _split(routed: pa.Table) -> Iterator[tuple[str, pa.Table]]:
    for name in ROUTES:
        table = routed.filter(pc.equal(routed["route"], name))
        if table.num_rows:
            yield name, table


def _check_kind(scored: Manifest) -> None:
    if scored.kind != PREDICTIONS:
        raise SpecError(
            f"batch {scored.batch_id} holds {scored.kind}, not predictions. Give the infer task's output.",
            faults=[("predictions", f"is a batch of {scored.kind}")],
        )


def _check_counts(scored: Manifest, routed: int, failed: int) -> None:
    expected = scored.counts["predicted"], scored.counts["failed"]
    if (routed, failed) != expected:
        raise _mismatch(
            scored, f"counts {expected[0]} predicted and {expected[1]} failed rows, holds {routed} and {failed}"
        )


def _mismatch(batch: BatchRef | Manifest, what: str) -> RowMismatchError:
    return RowMismatchError(
        f"predictions {batch.batch_id}: {what}. Nothing was decided. Clear the infer task to write them again.",
        batch_id=batch.batch_id,
    )
