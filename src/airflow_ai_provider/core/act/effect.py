"""Rows → effects: which effect a row asks for, and what is sent for it.

Invariants: an effect's key is made of pipeline, action and subject, never of the try; the fingerprint of what is sent;
the saga of pipeline, run and subject, so all steps of one run for one subject share it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from airflow_ai_provider.core.act.sender import Request
from airflow_ai_provider.core.act.template import open_template
from airflow_ai_provider.core.act.value import HttpAction, fill
from airflow_ai_provider.core.batch import ROW_ID, BatchRef, Manifest, canonical_json
from airflow_ai_provider.core.ledger import Intent

if TYPE_CHECKING:
    from airflow_ai_provider.core.store import Store


@dataclass(frozen=True)
class ActRun:
    """Which run acts, and how.

    :param step: the action's place in the saga, from 0; undo goes backwards.
    :param muted: send nothing and leave the ledger alone (backfill, dry run); templates are rendered all the same.
    :param resend_refused: send what was refused once more: a person has changed something at the receiver.
    """

    pipeline: str
    run_id: str
    step: int = 0
    muted: bool = False
    resend_refused: bool = False


@dataclass(frozen=True)
class Effect:
    """An intent with the request that makes it true."""

    intent: Intent
    request: Request


def count_rows(batches: Sequence[BatchRef], store: Store) -> int:
    """Return how many rows the references name."""
    return sum(
        part.row_count
        for ref in batches
        for part in store.manifest(ref).parts
        if not ref.tables or part.table in ref.tables
    )


def read_effects(
    batches: Sequence[BatchRef], action: HttpAction, store: Store, run: ActRun, address: str
) -> Iterator[Effect]:
    """Yield one effect per row, in the rows' order.

    :param address: where the requests will go: an undo must go there too.
    :raises SpecError: when the template or the endpoint does not fit a row; a retry does not help.
    """
    for ref in batches:
        manifest = store.manifest(ref)
        reader = _Reader(
            action, run, manifest.batch_id, str(manifest.facts.get("key") or ROW_ID), _noted(action, address)
        )
        render = open_template(action.name, action.json, _run_facts(action, run, manifest))
        for table in store.read(ref):
            for some in table.to_batches(max_chunksize=1024):
                for row in some.to_pylist():
                    yield reader.effect(row, render(row))


@dataclass(frozen=True)
class _Reader:
    """Make the effects of one batch."""

    action: HttpAction
    run: ActRun
    batch_id: str
    key_column: str
    noted: Mapping[str, Any]

    def effect(self, row: Mapping[str, Any], payload: Any) -> Effect:
        run, action, row_id = self.run, self.action, row[ROW_ID]
        value = row.get(self.key_column)
        subject = subject_text(row_id if value is None else value)
        body, path = canonical_json(payload), fill(action.endpoint, row)
        key = name_of(run.pipeline, action.name, subject)
        intent = Intent(
            key=key,
            pipeline=run.pipeline,
            action=action.name,
            subject=subject,
            fingerprint=name_of(action.method, path, body.decode()),
            run_id=run.run_id,
            row_id=row_id,
            batch_id=self.batch_id,
            step=run.step,
            saga=name_of(run.pipeline, run.run_id, subject),
            request=self.noted,
        )
        return Effect(intent, Request(key, action.method, path, body))


def _noted(action: HttpAction, address: str) -> dict[str, Any]:
    undo = {"method": action.undo.method, "endpoint": action.undo.endpoint} if action.undo else None
    return {"method": action.method, "endpoint": action.endpoint, "address": address, "undo": undo}


def _run_facts(action: HttpAction, run: ActRun, manifest: Manifest) -> dict[str, Any]:
    pin = manifest.facts.get("pin") or {}
    model = {fact: pin.get(fact, "") for fact in ("name", "version", "alias", "digest")} if pin else {}
    return {"pipeline": run.pipeline, "run_id": run.run_id, "action": action.name, "model": model}


def subject_text(value: Any) -> str:
    """Return a key column's value as text; NUL, which PostgreSQL cannot hold, as its escape."""
    return str(value).replace("\0", "\\u0000")


def name_of(*parts: str) -> str:
    """Return a digest over some texts: the first 128 bits of their SHA-256, as 32 hex digits.

    No two lists of texts give the same bytes to it.
    """
    return hashlib.sha256("".join([f"{len(part)}:{part}" for part in parts]).encode()).hexdigest()[:32]
