"""What the contract tests of ledgers are made of: spans, intents, a clock."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from airflow_ai_provider.core.batch import BatchRef, Slice, Span
from airflow_ai_provider.core.ledger import Intent, Ledger, Outcome

START = datetime(2026, 11, 22, 12, tzinfo=UTC)
REF = BatchRef("batch", "orders-1", "file:///data/p/batch/orders-1", "sha256:aa", {"read": 2})


class Clock:
    """Each look is one second later."""

    def __init__(self) -> None:
        self.at = START

    def __call__(self) -> datetime:
        self.at += timedelta(seconds=1)
        return self.at


def span(*slices: tuple[str, int, int], source: str = "kafka:orders", identity: str = "T1") -> Span:
    return Span(source, identity, tuple(Slice(*s) for s in slices), {"partitions": len(slices)})


def intent(key: str, **fields: Any) -> Intent:
    values: dict[str, Any] = {
        "pipeline": "p",
        "action": "ticket",
        "subject": f"s-{key}",
        "fingerprint": "f1",
        "run_id": "r1",
        "row_id": f"orders/0/{key}",
        "batch_id": "b",
        "step": 0,
        "saga": f"saga-{key}",
        "request": {"endpoint": "/tickets", "undo": {"method": "DELETE"}},
    }
    return Intent(key, **{**values, **fields})


def reach(ledger: Ledger, key: str, state: str) -> None:
    """Take an entry to a state along the legal way."""
    ledger.reserve([intent(key)])
    way = {"reserved": (), "sent": ("sent",), "compensated": ("sent", "done", "compensated")}
    way["parked"] = ("sent", "done", "parked")
    for step in way.get(state, ("sent", state)):
        ledger.sent([key]) if step == "sent" else ledger.record([Outcome(key, step, {"status": 201})])
    found = ledger.look_up(key)
    assert found and found.state == state
