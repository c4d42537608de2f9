"""What every ledger promises of notes: pins, aliases, decisions, reviews, letters, files and dismissals."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta

from airflow_ai_provider.core.batch import BatchRef, Pin
from airflow_ai_provider.core.ledger import Ledger, SeenFile
from tests.contracts.ledgers import REF, START


def pin(version: str, name: str = "triage") -> Pin:
    return Pin(name, version, "champion", f"sha256:{version}", {"model.onnx": "sha256:f"}, "onnx", {"inputs": []})


def test_the_first_pin_of_a_run_holds(ledger: Ledger) -> None:
    assert ledger.pin_of("p", "r1", "triage") is None
    assert ledger.pin("p", "r1", pin("3")) == pin("3")
    assert ledger.pin("p", "r1", pin("4")) == pin("3")
    assert ledger.pin("p", "r1", pin("9", "other")) == pin("9", "other")
    assert ledger.pin("p", "r2", pin("4")) == pin("4")
    assert ledger.pin_of("p", "r1", "triage") == pin("3")
    history = ledger.pin_history("triage")
    assert [(h["run_id"], h["version"], h["alias"], h["digest"]) for h in history] == [
        ("r1", "3", "champion", "sha256:3"),
        ("r2", "4", "champion", "sha256:4"),
    ]
    assert history[0]["pinned_at"] < history[1]["pinned_at"]
    assert {h["pipeline"] for h in history} == {"p"}


def hours(start: float, end: float) -> tuple[datetime, datetime]:
    return START + timedelta(hours=start), START + timedelta(hours=end)


def test_the_history_of_pins_is_asked_by_pipeline_and_window(ledger: Ledger) -> None:
    ledger.pin("p", "r1", pin("3"), hours(0, 1), "current")
    ledger.pin("p", "r2", pin("4"), hours(1, 2), "as_of")
    ledger.pin("p", "r3", pin("5"), hours(5, 5))
    ledger.pin("p", "r4", pin("6"))  # a run with neither interval nor logical date
    ledger.pin("other", "r1", pin("7"), hours(0, 1))
    first = ledger.pin_history("triage", "p")[0]
    assert (first["window_start"], first["window_end"]) == ("2026-11-22T12:00:00.000000+00:00", first["window_end"])
    assert [h["policy"] for h in ledger.pin_history("triage", "p")] == ["current", "as_of", None, None]

    def met(start: float, end: float) -> list[str]:
        return [h["version"] for h in ledger.pin_history("triage", "p", hours(start, end))]

    assert [met(0, 1), met(1, 2), met(0.5, 1.5), met(-1, 0), met(2, 3)] == [["3"], ["4"], ["3", "4"], [], []]
    assert [met(5, 5), met(1, 1), met(2, 2), met(4, 5), met(5, 6), met(4, 6)] == [["5"], ["4"], [], [], ["5"], ["5"]]
    assert len(ledger.pin_history("triage")) == 5


def test_an_alias_is_remembered_from_first_to_last_sight(ledger: Ledger) -> None:
    def seen(alias: str, registry: str = "http://m") -> list[tuple[str, int, int]]:
        found = ledger.alias_history(registry, "triage", alias)
        return [(s.version, (s.first_at - START).seconds, (s.last_at - START).seconds) for s in found]

    ledger.saw_aliases("http://m", "triage", {"champion": "3", "old": "1"})
    ledger.saw_aliases("http://m", "triage", {"champion": "3", "old": "1"})
    ledger.saw_aliases("http://m", "triage", {"champion": "4"})
    ledger.saw_aliases("http://m", "triage", {"champion": "4", "old": "2"})
    ledger.saw_aliases("http://elsewhere", "triage", {"champion": "9"})
    assert seen("champion") == [("3", 1, 2), ("4", 3, 4)]
    assert seen("old") == [("1", 1, 2), ("", 3, 3), ("2", 4, 4)]
    assert seen("champion", "http://elsewhere") == [("9", 5, 5)]
    assert seen("nobody") == []


def test_of_many_threads_that_see_an_alias_one_begins_its_line(ledger: Ledger) -> None:
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda _: ledger.saw_aliases("r", "triage", {"champion": "3"}), range(12)))
    (only,) = ledger.alias_history("r", "triage", "champion")
    assert only.version == "3" and only.first_at < only.last_at


def test_of_many_threads_one_pins(ledger: Ledger) -> None:
    gate = threading.Barrier(6)

    def take(number: int) -> str:
        gate.wait()
        return ledger.pin("p", "r1", pin(str(number))).version

    with ThreadPoolExecutor(6) as pool:
        assert len(set(pool.map(take, range(6)))) == 1


def test_decisions_and_reviews_are_kept_once(ledger: Ledger) -> None:
    ledger.decided("p", "r1", {"batch_id": "b1", "routes": {"act": 1}})
    ledger.decided("p", "r1", {"batch_id": "b2", "routes": {"act": 2}})
    ledger.decided("p", "r1", {"batch_id": "b1", "routes": {"act": 3}})
    assert ledger.decisions("p", "r1") == [
        {"batch_id": "b1", "routes": {"act": 3}},
        {"batch_id": "b2", "routes": {"act": 2}},
    ]
    answers = [{"row_id": "o/0/1", "before": "b", "after": "m", "responder": "Zoë"}, {"row_id": "o/0/2", "after": None}]
    ledger.reviewed("p", "r1", answers)
    ledger.reviewed("p", "r1", [{**answers[0], "after": "b"}])
    ledger.reviewed("p", "r1", [])
    assert ledger.reviews("p", "r1") == [{**answers[0], "after": "b"}, answers[1]]
    assert ledger.reviews("p", "r2") == ledger.decisions("p", "r2") == []


def test_letters_are_noted_for_the_very_bytes(ledger: Ledger) -> None:
    assert not ledger.has_lettered("p", "r1", REF, "dead")
    ledger.lettered("p", "r1", REF, "dead")
    ledger.lettered("p", "r1", REF, "dead")
    assert ledger.has_lettered("p", "r1", REF, "dead")
    other = BatchRef(REF.kind, REF.batch_id, REF.uri, "sha256:bb", REF.counts)
    for pipeline, run, ref, topic in [("q", "r1", REF, "dead"), ("p", "r2", REF, "dead"), ("p", "r1", other, "dead"), ("p", "r1", REF, "x")]:  # noqa: E501  # fmt: skip
        assert not ledger.has_lettered(pipeline, run, ref, topic)


def test_what_files_were_is_kept_by_source_and_path_and_the_last_word_holds(ledger: Ledger) -> None:
    first, second = SeenFile("csv 4 1", "sha256:1", 4, 1), SeenFile("csv 4 2", "sha256:1", 4, 1)
    ledger.saw_files("p", "files:in", {"a.csv": first, "b.csv": first})
    ledger.saw_files("p", "files:in", {"a.csv": second})
    ledger.saw_files("p", "files:in", {})
    ledger.saw_files("p", "files:other", {"a.csv": first})
    assert ledger.files_seen("p", "files:in") == {"a.csv": second, "b.csv": first}
    assert ledger.files_seen("q", "files:in") == {}
    assert ledger.files_taken("p", "files:in") == {}, "to have seen a file is not to have taken it"


def test_a_dismissal_is_noted_once_per_batch_and_row(ledger: Ledger) -> None:
    first = {"reason": "tombstone", "who": "mira", "why": "gone", "at": "2026-01-01T00:00:00+00:00"}
    ledger.dismiss("p", "b-1", {"t~1/0/7": first})
    ledger.dismiss("p", "b-1", {"t~1/0/7": {**first, "who": "otto"}, "t~1/0/8": first})
    ledger.dismiss("p", "b-2", {"t~1/0/7": first})
    assert ledger.dismissed("p") == {("b-1", "t~1/0/7"): first, ("b-1", "t~1/0/8"): first, ("b-2", "t~1/0/7"): first}
    assert ledger.dismissed("q") == {}
