"""A2: the same as A1 with a receiver that answers at once: nothing to hide the ledger behind."""

from __future__ import annotations

from benchmarks import acting
from benchmarks.harness import Place


def make(place: Place) -> None:
    """Start a receiver that answers at once."""
    acting.prepare(place, 0.0)


CASE = acting.case(
    "POSTs with a key, 64 in flight, receiver of 0 ms, ledger before and after each", "≥ 0.7, ≥ 7× one by one", make
)
