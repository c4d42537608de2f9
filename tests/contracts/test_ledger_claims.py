"""What every ledger promises of claims, over memory, SQLite and PostgreSQL."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from airflow_ai_provider.core.batch import BatchRef, Slice, Span
from airflow_ai_provider.core.ledger import Ledger
from airflow_ai_provider.errors import LedgerStateError, SpanConflictError
from tests.contracts.ledgers import REF, START, span


def test_the_same_run_key_gets_its_own_claim_whatever_it_asks_for(ledger: Ledger) -> None:
    first = ledger.claim("p", "r1/ingest", span(("0", 0, 10)), "r1")
    again = ledger.claim("p", "r1/ingest", span(("0", 0, 99), ("1", 0, 5)), "r1")
    assert first == again == ledger.claim_of("p", "r1/ingest")
    assert (first.state, first.ref, first.run_id) == ("claimed", None, "r1")
    assert again.span.facts == {"partitions": 1}


def test_rows_that_another_run_holds_are_refused(ledger: Ledger) -> None:
    ledger.claim("p", "r1/ingest", span(("0", 0, 10), ("1", 5, 9)), "r1")
    for wanted, shared in [
        (span(("0", 0, 10), ("1", 5, 9)), span(("0", 0, 10), ("1", 5, 9))),
        (span(("0", 9, 20)), span(("0", 9, 10))),
        (span(("1", 0, 6)), span(("1", 5, 6))),
        (span(("0", 2, 3)), span(("0", 2, 3))),
    ]:
        with pytest.raises(SpanConflictError, match="r1") as caught:
            ledger.claim("p", "r2/ingest", wanted, "r2")
        assert caught.value.owner == "r1"
        assert tuple(caught.value.slices) == shared.slices
    assert ledger.claim_of("p", "r2/ingest") is None


@pytest.mark.parametrize(
    ("pipeline", "wanted"),
    [
        ("p", span(("0", 10, 20))),
        ("p", span(("2", 0, 10))),
        ("p", span(("0", 0, 10), identity="T2")),
        ("p", span(("0", 0, 10), source="kafka:other")),
        ("q", span(("0", 0, 10))),
        ("p", span(("0", 5, 5))),
    ],
    ids=["next offsets", "other partition", "topic made anew", "other topic", "other pipeline", "no rows"],
)
def test_what_shares_no_row_is_free(ledger: Ledger, pipeline: str, wanted: Span) -> None:
    ledger.claim("p", "r1/ingest", span(("0", 0, 10)), "r1")
    assert ledger.claim(pipeline, "r2/ingest", wanted, "r2").run_id == "r2"


def test_a_landed_span_gives_its_batch_to_whoever_asks_for_exactly_it(ledger: Ledger) -> None:
    taken = span(("0", 0, 10), ("1", 0, 3))
    ledger.claim("p", "r1/ingest", taken, "r1")
    ledger.landed("p", "r1/ingest", REF)
    ledger.landed("p", "r1/ingest", REF)
    found = ledger.claim("p", "r2/ingest", taken, "r2")
    assert (found.run_id, found.state, found.ref) == ("r1", "landed", REF)
    with pytest.raises(SpanConflictError, match="landed"):
        ledger.claim("p", "r3/ingest", span(("0", 0, 11)), "r3")


def test_claims_are_told_oldest_first_with_their_times(ledger: Ledger) -> None:
    ledger.claim("p", "r1/ingest", span(("0", 0, 10)), "r1")
    ledger.claim("q", "r1/ingest", span(("0", 0, 10)), "r1")
    ledger.claim("p", "r2/ingest", span(("0", 10, 20)), "r2")
    ledger.landed("p", "r1/ingest", REF)
    assert [(c.pipeline, c.run_id) for c in ledger.claims()] == [("p", "r1"), ("q", "r1"), ("p", "r2")]
    (landed,) = ledger.claims("p", "landed")
    assert landed.claimed_at and landed.updated_at
    assert START < landed.claimed_at < landed.updated_at
    assert (landed.ref, landed.span) == (REF, span(("0", 0, 10)))
    (waiting,) = ledger.claims("p", "claimed")
    assert waiting.claimed_at == waiting.updated_at
    assert ledger.claims("absent") == []


def test_landing_needs_a_claim_and_keeps_its_first_batch(ledger: Ledger) -> None:
    with pytest.raises(LedgerStateError, match="no claim"):
        ledger.landed("p", "r1/ingest", REF)
    ledger.claim("p", "r1/ingest", span(("0", 0, 10)), "r1")
    ledger.landed("p", "r1/ingest", REF)
    other = BatchRef("batch", "orders-1", REF.uri, "sha256:bb", {"read": 3})
    with pytest.raises(LedgerStateError, match="landed batch"):
        ledger.landed("p", "r1/ingest", other)


def test_position_and_files_come_from_the_claims(ledger: Ledger) -> None:
    ledger.claim("p", "r1", span(("0", 0, 10), ("1", 5, 9)), "r1")
    ledger.claim("p", "r2", span(("0", 10, 12), ("3", 7, 7)), "r2")
    ledger.claim("p", "other", span(("0", 0, 500), identity="T2"), "other")
    assert ledger.position("p", "kafka:orders", "T1") == {"0": 12, "1": 9, "3": 7}
    assert ledger.position("q", "kafka:orders", "T1") == {}
    files = Span("files:in", "", (Slice("a.csv", 0, 4, "sha256:1"), Slice("empty.csv", 0, 0, "sha256:0")))
    ledger.claim("p", "r3", files, "r3")
    later = Span("files:in", "", (Slice("a.csv", 0, 9, "sha256:2"),))
    ledger.claim("p", "r4", later, "r4")
    assert ledger.files_taken("p", "files:in") == {"a.csv": "sha256:2", "empty.csv": "sha256:0"}


def test_a_released_claim_frees_its_rows_but_a_landed_one_stays(ledger: Ledger) -> None:
    ledger.claim("p", "r1", span(("0", 0, 10)), "r1")
    ledger.release("p", "r1")
    ledger.release("p", "r1")
    assert ledger.claim_of("p", "r1") is None
    assert ledger.position("p", "kafka:orders", "T1") == {}
    ledger.claim("p", "r2", span(("0", 0, 10)), "r2")
    ledger.landed("p", "r2", REF)
    ledger.release("p", "r2")
    assert ledger.claim_of("p", "r2") is not None


def test_a_try_that_came_before_one_without_rows_claims_none(ledger: Ledger) -> None:
    assert ledger.claim_nothing("p", "r1", "try-2") is None
    assert ledger.claim_nothing("p", "r1", "try-1") is None, "the later one stands"
    with pytest.raises(SpanConflictError, match="a later try .* r1 has found no rows.*clear the task") as caught:
        ledger.claim("p", "r1", span(("0", 0, 10)), "r1", "try-1")
    assert caught.value.owner_key == "r1"
    assert ledger.claim_of("p", "r1") is None
    for pipeline, run_key in [("q", "r1"), ("p", "r2")]:
        assert ledger.claim(pipeline, run_key, span(("0", 0, 10)), run_key, "try-1").run_key == run_key
    ledger.release("p", "r2")
    assert ledger.claim("p", "r1", span(("0", 0, 10)), "r1", "try-3").run_key == "r1"


def test_a_try_without_rows_takes_what_one_before_it_has_claimed(ledger: Ledger) -> None:
    held = ledger.claim("p", "r1", span(("0", 0, 10)), "r1", "try-1")
    assert ledger.claim_nothing("p", "r1", "try-2") == held
    assert ledger.claim("p", "r1", span(("0", 0, 99)), "r1", "try-1") == held
    ledger.release("p", "r1")
    assert ledger.claim("p", "r1", span(("0", 0, 99)), "r1", "try-1").span == span(("0", 0, 99)), "nothing was noted"


def test_tries_that_are_not_known_are_not_told_apart(ledger: Ledger) -> None:
    assert ledger.claim_nothing("p", "r1") is None
    assert ledger.claim("p", "r1", span(("0", 0, 10)), "r1", "try-1").state == "claimed"
    assert ledger.claim_nothing("p", "r2", "try-2") is None
    assert ledger.claim("p", "r2", span(("0", 10, 20)), "r2").state == "claimed"


def test_of_a_claim_and_a_note_at_the_same_moment_one_wins(ledger: Ledger) -> None:
    for number in range(20):
        key, gate = f"r{number}", threading.Barrier(2)

        def late(key: str = key, gate: threading.Barrier = gate, number: int = number) -> bool:
            gate.wait()
            try:
                ledger.claim("p", key, span(("0", number, number + 1)), key, "try-1")
            except SpanConflictError:
                return False
            return True

        with ThreadPoolExecutor(1) as pool:
            has_claimed = pool.submit(late)
            gate.wait()
            assert (ledger.claim_nothing("p", key, "try-2") is not None) == has_claimed.result()


def test_of_many_threads_one_gets_the_span(ledger: Ledger) -> None:
    gate = threading.Barrier(8)

    def take(number: int) -> str:
        gate.wait()
        try:
            return ledger.claim("p", f"r{number}", span(("0", number, 100)), f"r{number}").run_id
        except SpanConflictError as error:
            return f"not {error.owner}"

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(take, range(8)))
    winners = [a for a in answers if not a.startswith("not")]
    assert len(winners) == 1
    assert answers.count(f"not {winners[0]}") == 7
