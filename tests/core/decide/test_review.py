"""Questions and answers over a real store: who is asked, what is refused, and that nobody's silence acts."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from airflow_ai_provider.core.batch import BatchRef
from airflow_ai_provider.core.decide.policy import Policy
from airflow_ai_provider.core.decide.review import Questions, apply_answers, read_questions
from airflow_ai_provider.core.decide.route import route
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.errors import SpecError

CONFIDENCES = [0.9, 0.7, None, 0.6, 0.7]


def land(
    store: Store, classes: list[Any] | None = None, predictions: Any = None, scores: Any = CONFIDENCES
) -> BatchRef:
    """Land a routes batch with one review row per score, in two parts."""
    count = len(scores)
    rows = pa.table(
        {
            "_row_id": [f"t/0/{i}" for i in range(count)],
            "id": [f"B-{i}" if i else None for i in range(count)],
            "site": ["left|right", "<b>x</b>", "a\nb", "plain", "`c`"][:count],
            "prediction": predictions or (["benign", "malignant", "benign", "malignant", "benign"][:count]),
            "score": pa.array(scores, pa.float64()),
        }
    )
    decided = route(rows, Policy(0.95, 0.5))
    writer = store.open_batch("p", "routes", "r")
    for part in (decided.slice(0, 2), decided.slice(2)):
        if part.num_rows:
            writer.write("review", part)
    metadata = {"classes": classes} if classes else {}
    counts = {"predicted": count, "act": 0, "review": count, "fallback": 0, "hold": 0}
    return writer.land(counts, {"key": "id", "pin": {"metadata": metadata}}).only("review")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path))


def rows_of(store: Store, ref: BatchRef, table: str) -> dict[str, dict[str, Any]]:
    return {row["_row_id"]: row for part in store.read(ref, table) for row in part.to_pylist()}


def test_questions_come_least_confident_first_with_no_confidence_before_all(store: Store) -> None:
    questions = read_questions(store, land(store), columns=["site"])
    assert questions.rows == ("t/0/2", "t/0/3", "t/0/1", "t/0/4", "t/0/0")
    assert questions.choices == ("benign", "malignant")
    first = questions.fields["t/0/2"]
    assert first["enum"] == ["benign", "malignant", "hold"]
    assert first["default"] == "benign"
    assert first["title"] == "B-2"
    assert first["description"].startswith("no confidence: the score is missing")
    assert questions.fields["t/0/0"]["title"] == "t/0/0"  # its key is null
    assert read_questions(store, land(store), columns=["site"]) == questions
    assert pickle.loads(pickle.dumps(questions)) == questions


def test_the_body_is_a_table_that_no_value_can_break(store: Store) -> None:
    lines = read_questions(store, land(store), columns=["site"]).body.splitlines()
    assert len(lines) == 4 + 5
    assert "left\\|right" in lines[-1]
    assert "a b" in lines[4]
    assert "\\<b\\>x\\</b\\>" in lines[6]


def test_rows_over_the_limit_are_held_with_that_reason(store: Store) -> None:
    ref = land(store)
    questions = read_questions(store, ref, max_rows=2)
    assert questions.rows == ("t/0/2", "t/0/3")
    assert questions.over == 3
    assert "3 more are over the limit of 2" in questions.body
    landed, records = apply_answers(store, ref, questions, {"t/0/2": "benign", "t/0/3": "hold"}, pipeline="p")
    assert dict(landed.counts) == {"review": 5, "answered": 1, "hold": 4}
    assert landed.only("reviewed").row_count == 1
    held = rows_of(store, landed, "hold")
    assert held["t/0/0"]["reason"].endswith("; over the review's limit of 2")
    assert held["t/0/3"]["reason"].endswith("; held by a person")
    assert {row["route"] for row in held.values()} == {"hold"}
    assert {row["decision"] for row in held.values()} == {None}
    assert [r["row_id"] for r in records] == ["t/0/2", "t/0/3"]


def test_an_answer_replaces_the_decision_and_is_recorded(store: Store) -> None:
    ref = land(store)
    questions = read_questions(store, ref)
    landed, records = apply_answers(store, ref, questions, {"t/0/1": "benign"}, pipeline="p")
    row = rows_of(store, landed, "reviewed")["t/0/1"]
    assert (row["prediction"], row["decision"], row["decided_by"]) == ("malignant", "benign", "person")
    assert records == [
        {
            "row_id": "t/0/1",
            "subject": "B-1",
            "before": "malignant",
            "after": "benign",
            "confidence": 0.7,
            "bar": 0.5,
        }
    ]
    assert rows_of(store, landed, "hold")["t/0/0"]["reason"].endswith("; no answer")


def test_silence_holds_everything(store: Store) -> None:
    ref = land(store)
    landed, records = apply_answers(store, ref, read_questions(store, ref), {}, pipeline="p")
    assert dict(landed.counts) == {"review": 5, "answered": 0, "hold": 5}
    assert records == []


def test_the_same_answers_give_the_same_batch_in_any_order(store: Store, tmp_path: Path) -> None:
    ref = land(store)
    questions = read_questions(store, ref)
    answers = {"t/0/1": "benign", "t/0/0": "hold"}
    first, _ = apply_answers(store, ref, questions, answers, pipeline="p")
    again, _ = apply_answers(store, ref, questions, dict(reversed(answers.items())), pipeline="p")
    other, _ = apply_answers(store, ref, questions, answers | {"t/0/2": "benign"}, pipeline="p")
    assert again == first
    assert other.batch_id != first.batch_id


def test_answers_that_are_no_answers_are_refused_and_listed(store: Store) -> None:
    ref = land(store)
    questions = read_questions(store, ref)
    answers = {"t/0/9": "benign", "t/0/1": "Benign", "t/0/2": None, "t/0/3": {"x": 1}, "t/0/4": "hold"}
    with pytest.raises(SpecError) as caught:
        apply_answers(store, ref, questions, answers, pipeline="p")
    text = str(caught.value)
    assert "no question was asked about t/0/9" in text
    assert "t/0/1: 'Benign'" in text
    assert "t/0/2: None" in text
    assert "t/0/3: {'x': 1}" in text
    assert not Path(store.root, "p", "review").exists()


def test_choices_are_the_models_classes_brought_to_what_it_predicts(store: Store) -> None:
    ref = land(store, classes=["0", "1", "2"], predictions=[0, 1, 1, 0, 1])
    questions = read_questions(store, ref)
    assert questions.choices == (0, 1, 2)
    assert questions.fields["t/0/1"]["enum"] == ["0", "1", "2", "hold"]
    landed, records = apply_answers(store, ref, questions, {"t/0/1": "2"}, pipeline="p")
    assert rows_of(store, landed, "reviewed")["t/0/1"]["decision"] == 2
    assert records[0]["after"] == 2


@pytest.mark.parametrize(
    ("choices", "words"),
    [(["hold", "benign"], "one choice is named hold"), ([str(i) for i in range(51)], "there are 51 values")],
)
def test_choices_that_cannot_be_offered(store: Store, choices: list[str], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        read_questions(store, land(store), choices=choices)


def test_choices_of_another_type_and_unknown_columns_are_named(store: Store) -> None:
    with pytest.raises(SpecError, match="but the model predicts int64"):
        read_questions(store, land(store, predictions=[1, 1, 1, 1, 1]), choices=["benign"])
    with pytest.raises(SpecError, match="columns colour, which the rows do not have"):
        read_questions(store, land(store), columns=["colour"])


def test_no_rows_no_questions(store: Store) -> None:
    ref = land(store, scores=[])
    questions = read_questions(store, ref)
    assert questions == Questions((), (), 0, 100)
    assert "0 rows" in questions.body
    landed, _ = apply_answers(store, ref, questions, {}, pipeline="p")
    assert dict(landed.counts) == {"review": 0, "answered": 0, "hold": 0}
