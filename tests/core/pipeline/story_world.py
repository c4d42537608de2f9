"""A small finished run: five rows that end in five ways, in a real store and any ledger.

``B-0`` acted on, then undone · ``B-1`` reviewed · ``B-2`` held · ``B-3`` failed in the model · the fifth quarantined.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from airflow_ai_provider.core.batch import BatchRef, Pin, Slice, Span
from airflow_ai_provider.core.decide.flow import decide
from airflow_ai_provider.core.decide.policy import Policy
from airflow_ai_provider.core.decide.review import apply_answers, read_questions
from airflow_ai_provider.core.ledger import Intent, Ledger, Outcome
from airflow_ai_provider.core.store import Store

PIPELINE, RUN = "tumour_triage", "manual__1"
HOSTILE = b'{"biopsy_id": "\x1b[2J\xff"}'


def row_id(offset: int) -> str:
    """The row at an offset."""
    return f"biopsies~a1b2c3d4/0/{offset}"


def make_world(store: Store, ledger: Ledger) -> dict[str, BatchRef]:
    """Land batch, predictions, routes and review, and note in the ledger what was done."""
    batch = _land_batch(store, ledger)
    routes, facts = decide(_land_predictions(store, batch), Policy(0.9, 0.5), store, pipeline=PIPELINE)
    ledger.decided(PIPELINE, RUN, facts)
    asked = read_questions(store, routes["review"])
    review, answers = apply_answers(store, routes["review"], asked, {row_id(1): "malignant"}, pipeline=PIPELINE)
    ledger.reviewed(PIPELINE, RUN, [a | {"responder": "anna", "at": "2026-03-01T10:00:00+00:00"} for a in answers])
    _act(ledger, "k0", 0, {"status": 201, "id": "T-7"}, routes["act"])
    _act(ledger, "k1", 1, {"status": 201, "id": "T-8"}, review)
    _act(ledger, "u0", 0, {"status": 204}, routes["act"], undoes="k0")
    ledger.record([Outcome("k0", "compensated", {"status": 201, "id": "T-7"})])
    return {"batch": batch, "routes": routes["act"], "review": review}


def _land_batch(store: Store, ledger: Ledger) -> BatchRef:
    span = Span("kafka:biopsies", "a1b2c3d4", (Slice("0", 0, 5),))
    ledger.claim(PIPELINE, f"{RUN}/ingest/-1", span, RUN)
    writer = store.open_batch(PIPELINE, "batch", span.batch_id)
    origin = {"_topic": ["biopsies"] * 4, "_partition": [0] * 4, "_offset": [0, 1, 2, 3]}
    rows = {"_row_id": [row_id(i) for i in range(4)], "biopsy_id": [f"B-{i}" for i in range(4)], "image": [b"x"] * 4}
    writer.write("accepted", pa.table(rows | {"worst_radius": [20.0, 15.0, 9.0, None]} | origin))
    rejected: dict[str, Any] = {"_row_id": [row_id(4)], "_payload": [HOSTILE], "_stage": ["decode"]}
    rejected |= {
        "_reasons": [["broken_json: invalid UTF-8"]],
        "_topic": ["biopsies"],
        "_partition": [0],
        "_offset": [4],
    }
    writer.write("quarantine", pa.table(rejected))
    facts = {"span": span.to_dict(), "suite": "sha256:5e", "reasons": {"broken_json": 1}, "key": "biopsy_id"}
    ref = writer.land({"read": 5, "accepted": 4, "quarantined": 1}, facts)
    ledger.landed(PIPELINE, f"{RUN}/ingest/-1", ref)
    return ref


def _land_predictions(store: Store, batch: BatchRef) -> BatchRef:
    writer = store.open_batch(PIPELINE, "predictions", f"{batch.batch_id}-p")
    predicted = {
        "_row_id": [row_id(i) for i in range(4)],
        "prediction": ["malignant", "benign", "benign", None],
        "score": [0.97, 0.7, 0.2, None],
        "error": [None, None, None, "worst_radius is missing"],
    }
    writer.write("predictions", pa.table(predicted))
    pin = Pin("triage", "3", "champion", "sha256:ab", {}, "onnx", {}, {"classes": ["benign", "malignant"]})
    return writer.land({"accepted": 4, "predicted": 3, "failed": 1}, {"input": batch.to_dict(), "pin": pin.to_dict()})


def _act(ledger: Ledger, key: str, row: int, answer: dict[str, Any], ref: BatchRef, *, undoes: str = "") -> None:
    saga = f"saga-{row}"
    ledger.reserve(
        [Intent(key, PIPELINE, "ticket", f"B-{row}", "f", RUN, row_id(row), ref.batch_id, 0, saga, undoes=undoes)]
    )
    ledger.sent([key])
    ledger.record([Outcome(key, "done", answer)])
