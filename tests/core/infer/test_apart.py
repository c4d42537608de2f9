"""Rows that the model itself cannot take: blamed alone, whatever stands beside them; no row for a model's own fault."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from airflow_ai_provider.core.batch import ROW_ID, Pin
from airflow_ai_provider.core.infer.apart import Apart
from airflow_ai_provider.core.infer.engine import open_engine
from airflow_ai_provider.core.infer.flow import infer
from airflow_ai_provider.core.infer.inputs import Array
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.errors import BatchRejectedError, EngineUnavailableError, SignatureError
from tests.core.infer import models
from tests.core.infer.batches import land
from tests.core.infer.nets import sequence_pin, sequence_rows, sequence_signature

VOCABULARY = 50


def bert() -> tuple[Pin, Path]:
    return sequence_pin(hidden=32, vocabulary=VOCABULARY, longest=64)


def by_torch() -> tuple[Pin, Path]:
    """A bag of words, which needs no mask of ours: the token that fills up weighs nothing."""

    class Bag(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = torch.nn.Embedding(VOCABULARY, 16, padding_idx=0)
            self.classes = torch.nn.Linear(16, 3)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return torch.softmax(self.classes(self.words(input_ids).sum(1)), 1)

    torch.manual_seed(0)
    folder = models.fresh_folder("bag")
    shapes = ({0: torch.export.Dim("rows", min=2), 1: torch.export.Dim("tokens", min=2, max=64)},)
    exported = torch.export.export(Bag().eval(), (torch.ones(4, 8, dtype=torch.int64),), dynamic_shapes=shapes)
    torch.export.save(exported, folder / "model.pt2")
    metadata = {"classes": ["low", "middle", "high"], "sequence": {"longest": 64}}
    return models.pin_folder(folder, "torch", sequence_signature("input_ids"), **metadata), folder


@pytest.fixture(scope="module", params=[bert, by_torch], ids=["onnx", "torch"])
def made(request: pytest.FixtureRequest) -> tuple[Pin, Path]:
    pinned: tuple[Pin, Path] = request.param()
    return pinned


def rows() -> pa.Table:
    return sequence_rows(300, vocabulary=VOCABULARY, longest=64, median=12)


def spoilt(table: pa.Table, bad: Sequence[int], token: int = 5000) -> pa.Table:
    lists = table["input_ids"].to_pylist()
    for row in bad:
        lists[row] = [*lists[row][:-1], token]
    return table.set_column(1, "input_ids", pa.array(lists, pa.list_(pa.int64())))


@pytest.mark.parametrize("bad", [[0], [299], [3, 4, 5, 120, 250]])
@pytest.mark.parametrize("token", [5000, -5000])
def test_an_unknown_token_fails_its_row_and_changes_no_bit_of_another(
    made: tuple[Pin, Path], bad: list[int], token: int
) -> None:
    table, kept = rows(), np.setdiff1d(np.arange(300), bad)
    with open_engine(*made, "cpu") as engine:
        found = engine.predict(spoilt(table, bad, token), 256)
        assert found.take(kept).to_pylist() == engine.predict(table.take(kept), 256).to_pylist()
        assert found.take(kept).to_pylist() == engine.predict(table, 256).take(kept).to_pylist()
        lines = found.take(bad).to_pylist()
        assert found.equals(engine.predict(spoilt(table, bad, token), 256))
    assert all(line["error"].startswith("misfit: the model cannot take this row: ") for line in lines)
    assert {line[name] for line in lines for name in ("prediction", "score", "probabilities")} == {None}


def test_who_is_blamed_does_not_depend_on_the_size_of_calls(made: tuple[Pin, Path]) -> None:
    with open_engine(*made, "cpu") as engine:
        errors = {size: engine.predict(spoilt(rows(), [7, 90]), size)["error"].to_pylist() for size in (1, 64, 2_000)}
    assert errors[1] == errors[64] == errors[2_000]


def test_a_batch_lands_without_its_bad_rows_and_counts_them(made: tuple[Pin, Path], tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    with open_engine(*made, "cpu") as engine:
        batch = land(store, [spoilt(rows(), [7, 90]), spoilt(rows(), [0])])
        ref = infer(batch, made[0], store, engine, pipeline="p", batch_size=512)
        assert ref.counts == {"accepted": 600, "predicted": 597, "failed": 3}
        with pytest.raises(BatchRejectedError, match="3 of 600 rows .* failed .*max_failed allows 2.*misfit"):
            infer(batch, made[0], store, engine, pipeline="p", batch_size=512, max_failed=2)


def test_one_row_may_fail_alone_but_not_every_row_of_many(made: tuple[Pin, Path], tmp_path: Path) -> None:
    """Nothing tells one bad row in a batch of its own from a bad model, but that the model has answered its sample."""
    store = Store(str(tmp_path))
    with open_engine(*made, "cpu") as engine:
        alone = land(store, [spoilt(rows(), [0]).slice(0, 1)], "alone")
        assert infer(alone, made[0], store, engine, pipeline="p", batch_size=64).counts["failed"] == 1
        many = land(store, [spoilt(rows(), range(300))], "many")
        with pytest.raises(BatchRejectedError, match="refused every row of batch many"):
            infer(many, made[0], store, engine, pipeline="p", batch_size=64)


def test_a_vocabulary_that_is_named_is_checked_before_the_model() -> None:
    pin, folder = bert()
    known = Pin(
        **{**pin.to_dict(), "metadata": {**pin.metadata, "sequence": {"longest": 64, "vocabulary": VOCABULARY}}}
    )
    lists = [[1, 2], [1, 50, 60], [], [-1], [49], [1] * 65, [50]]
    table = pa.table({ROW_ID: [f"r{i}" for i in range(7)], "input_ids": pa.array(lists, pa.list_(pa.int64()))})
    with open_engine(known, folder, "cpu") as engine:
        errors = engine.predict(table, 256)["error"].to_pylist()
    assert errors == [
        None,
        "misfit: input_ids holds 50, the model knows the tokens 0 to 49",
        "wrong_shape: input_ids is an empty list",
        "misfit: input_ids holds -1, the model knows the tokens 0 to 49",
        None,
        "wrong_shape: input_ids holds 65 numbers, the model takes at most 64",
        "misfit: input_ids holds 50, the model knows the tokens 0 to 49",
    ]


@pytest.mark.parametrize("vocabulary", [-1, True, 2.5, "many"])
def test_a_vocabulary_that_is_no_number_is_refused(vocabulary: Any) -> None:
    pin, folder = bert()
    wrong = Pin(**{**pin.to_dict(), "metadata": {"sequence": {"longest": 64, "vocabulary": vocabulary}}})
    with pytest.raises(SignatureError, match="vocabulary must count tokens"):
        open_engine(wrong, folder, "cpu")


# --- the search itself, over a model of one line ---


def doubled(bad: set[int]) -> Any:
    calls: list[int] = []

    def call(arrays: list[Array]) -> list[Array]:
        calls.append(len(arrays[0]))
        if bad & set(arrays[0].tolist()):
            raise IndexError("index out of range")
        return [arrays[0] * 2]

    return call, calls


@given(st.sets(st.integers(0, 63)), st.integers(1, 64))
@settings(max_examples=60, deadline=None)
def test_exactly_the_bad_rows_are_found_in_few_calls(bad: set[int], count: int) -> None:
    call, calls = doubled(bad)
    errors: dict[int, str] = {}
    given_rows = np.arange(count)
    (answers,) = Apart(call, lambda: [np.array([-1, -1])], errors).run([given_rows], range(100, 100 + count))
    found = {row for row in bad if row < count}
    assert set(errors) == {100 + row for row in found}
    assert answers.tolist() == [-1 if row in found else row * 2 for row in range(count)]
    assert len(calls) <= 1 + 2 * len(found) * max(1, count.bit_length())


def test_a_model_that_no_longer_answers_its_sample_blames_no_row() -> None:
    def broken() -> list[Array]:
        raise SignatureError("device-side assert triggered")

    call, calls = doubled({3})
    errors: dict[int, str] = {}
    with pytest.raises(EngineUnavailableError, match=r"IndexError: index out of range.* no row is blamed"):
        Apart(call, broken, errors).run([np.arange(8)], range(8))
    assert errors == {} and calls == [8]


@pytest.mark.parametrize("fault", [MemoryError("full"), SignatureError("ours")])
def test_a_full_memory_and_errors_of_our_own_are_left_as_they_are(fault: Exception) -> None:
    def call(arrays: list[Array]) -> list[Array]:
        if len(arrays[0]) < 8:
            raise fault
        raise IndexError("index out of range")

    with pytest.raises(type(fault)):
        Apart(call, lambda: [np.zeros(2)], {}).run([np.arange(8)], range(8))


def test_an_error_of_the_features_is_kept() -> None:
    call, _ = doubled({0})
    errors = {0: "null_value: x is null"}
    Apart(call, lambda: [np.array([0])], errors).run([np.array([0])], [0])
    assert errors == {0: "null_value: x is null"}
