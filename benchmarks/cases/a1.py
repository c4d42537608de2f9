"""A1: one effect per row over HTTP, 64 in flight, a receiver of 5 ms, a ledger row before and after each."""

from __future__ import annotations

from benchmarks import acting
from benchmarks.harness import Place


def make(place: Place) -> None:
    """Start a receiver that takes 5 ms."""
    acting.prepare(place, 0.005)


CASE = acting.case(
    "POSTs with a key, 64 in flight, receiver of 5 ms, ledger before and after each",
    "≥ 0.8 on SQLite, ≥ 0.7 on PostgreSQL, ≥ 45× one by one",
    make,
)
