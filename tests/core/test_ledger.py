"""The ledger's rules as pure functions: no database, no clock."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_ai_provider.core.batch import BatchRef, Slice, Span
from airflow_ai_provider.core.ledger import Claim
from airflow_ai_provider.core.ledger_rules import (
    TRANSITIONS,
    check_landing,
    check_move,
    open_among,
    settle_claim,
    shared_rows,
)
from airflow_ai_provider.errors import LedgerStateError, SpanConflictError

STATES = st.sampled_from(sorted(TRANSITIONS))


@given(st.lists(STATES, max_size=12))
def test_no_way_leads_back_to_nothing_done(wanted: list[str]) -> None:
    """Whatever is asked for, an effect that was done is never again taken for one that was not."""
    state, was_done, was_sent = "reserved", False, False
    for to in wanted:
        try:
            moved = check_move("k", state, to)
        except LedgerStateError as error:
            assert to not in TRANSITIONS[state]
            assert (error.key, error.state, error.to) == ("k", state, to)
            continue
        assert moved or to == state
        state = to
        was_done |= state == "done"
        was_sent |= state == "sent"
        if was_done:
            assert state in ("done", "compensated", "parked")
        if not was_sent:
            assert state in ("reserved", "refused")


def test_what_is_compensated_stays_so() -> None:
    assert TRANSITIONS["compensated"] == frozenset()
    assert TRANSITIONS["unknown"] == {"sent"}, "an unknown outcome is resolved by asking again, not by deciding"


slices = st.builds(
    lambda p, first, size, digest: Slice(p, first, first + size, digest),
    st.sampled_from("ab"),
    st.integers(0, 6),
    st.integers(0, 4),
    st.sampled_from(["", "sha256:1", "sha256:2"]),
)


def rows(part: Slice) -> set[tuple[str, str, int]]:
    return {(part.partition, part.digest, offset) for offset in range(part.first, part.end)}


@given(slices, slices)
def test_overlap_is_a_shared_row(one: Slice, other: Slice) -> None:
    shared = shared_rows(one, other)
    assert shared == shared_rows(other, one)
    assert (rows(shared) if shared else set()) == rows(one) & rows(other)


@given(st.lists(st.lists(slices, max_size=3), max_size=5))
def test_no_row_is_ever_held_twice(wanted: list[list[Slice]]) -> None:
    held: list[Claim] = []
    for number, parts in enumerate(wanted):
        span = Span("kafka:t", "", tuple(parts))
        try:
            found = settle_claim(span, held)
        except SpanConflictError:
            continue
        if found is None:
            held.append(Claim("p", f"k{number}", span, "landed", None, f"r{number}"))
    taken = [row for claim in held for row in set().union(*(rows(s) for s in claim.span.slices), set())]
    assert len(taken) == len(set(taken))


def test_a_conflict_says_who_where_and_what_next() -> None:
    rival = Claim("p", "r1/ingest", Span("kafka:t", "", (Slice("0", 0, 9),)), "claimed", None, "r1")
    with pytest.raises(SpanConflictError) as caught:
        settle_claim(Span("kafka:t", "", (Slice("0", 5, 12),)), [rival])
    error = pickle.loads(pickle.dumps(caught.value))
    assert (error.owner, error.owner_key, error.slices) == ("r1", "r1/ingest", [Slice("0", 5, 9)])
    assert "kafka:t: rows 0[5:9] are held by run r1 (claimed)" in str(error)
    assert "airflow ai claims release 'r1/ingest' --pipeline p" in str(error)
    landed = replace(rival, state="landed")
    with pytest.raises(SpanConflictError, match=r"run r1 \(landed\).* none is missing; clear that run"):
        settle_claim(Span("kafka:t", "", (Slice("0", 5, 12),)), [landed])


def test_landing_twice_is_once() -> None:
    ref = BatchRef("batch", "b", "file:///b", "sha256:1", {})
    open_claim = Claim("p", "k", Span("kafka:t", "", ()), "claimed", None, "r1")
    landed = Claim("p", "k", Span("kafka:t", "", ()), "landed", ref, "r1")
    assert check_landing(open_claim, "p", "k", ref) is True
    assert check_landing(landed, "p", "k", ref) is False


def test_open_sagas_keep_their_order() -> None:
    assert open_among([("b", "done"), ("a", "sent"), ("b", "refused"), ("c", "done"), ("d", "refused")]) == ["b", "a"]
