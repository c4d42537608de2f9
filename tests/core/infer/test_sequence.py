"""Lists of different lengths: where tokens end up, which rows are refused, and that neighbours change no bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from airflow_ai_provider.core.batch import Pin
from airflow_ai_provider.core.infer.engine import open_engine
from airflow_ai_provider.core.infer.features import features_of
from airflow_ai_provider.core.infer.flow import infer
from airflow_ai_provider.core.infer.inputs import Features, InputSpec
from airflow_ai_provider.core.infer.sequence import Padding, ladder
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.errors import SignatureError
from tests.core.infer import models
from tests.core.infer.batches import land, part_files
from tests.core.infer.nets import sequence_pin, sequence_rows, sequence_signature

NAMES = ("input_ids", "attention_mask", "token_type_ids")
SPECS = [InputSpec(name, np.dtype(np.int64), (-1, -1)) for name in NAMES]


def features(names: tuple[str, ...] = NAMES, specs: list[InputSpec] = SPECS, **metadata: Any) -> Features:
    return features_of(Pin("m", "1", "", "", {}, "onnx", sequence_signature(*names), metadata), specs)


def filled(made: Features, table: pa.Table, rows: list[int], width: int) -> list[list[list[float]]]:
    sequences = made.read(table).sequences
    assert sequences is not None
    return [array.tolist() for array in sequences.fill(np.array(rows), width)]


def test_the_ladder_is_fixed_and_never_wastes_more_than_its_step() -> None:
    assert ladder(20, 4) == (8, 10, 12, 14, 16, 20)
    assert ladder(3, 4) == (3,)
    for steps in (4, 16):
        widths = np.array(ladder(512, steps))
        lengths = np.arange(8, 513)
        waste = widths[np.searchsorted(widths, lengths)] / lengths - 1
        assert widths[-1] == 512 and waste.max() <= 1 / steps


def test_a_row_is_padded_to_the_first_width_that_holds_it_and_its_mask_says_so() -> None:
    made = features(sequence={"widths": [2, 4, 8], "pad": 9})
    table = pa.table({"input_ids": [[5], [1, 2, 3], [1, 2]]})
    assert made.needs(table.schema) == ["input_ids"]
    sequences = made.read(table).sequences
    assert sequences is not None and sequences.widths.tolist() == [2, 4, 2]
    ids, mask, types = filled(made, table, [2, 0], 2)
    assert (ids, mask, types) == ([[1, 2], [5, 9]], [[1, 1], [1, 0]], [[0, 0], [0, 0]])
    assert filled(made, table, [1], 4)[1] == [[1, 1, 1, 0]]


def test_columns_that_are_there_are_taken_and_filled_up_with_nothing() -> None:
    made = features(sequence={"widths": [4], "pad": 9})
    table = pa.table({"input_ids": [[5, 6]], "attention_mask": [[0, 1]], "token_type_ids": [[1, 1]]})
    assert made.needs(table.schema) == list(NAMES)
    assert filled(made, table, [0], 4) == [[[5, 6, 9, 9]], [[0, 1, 0, 0]], [[1, 1, 0, 0]]]


@pytest.mark.parametrize(
    "kind",
    [pa.list_(pa.int64()), pa.large_list(pa.int32()), pa.list_(pa.float32()), pa.list_(pa.uint8())],
    ids=str,
)
def test_every_kind_of_list_is_read_and_slices_too(kind: pa.DataType) -> None:
    made = features(("input_ids",), SPECS[:1], sequence={"widths": [3]})
    column = pa.array([[9, 9], [1, 2], None, [3, 4, 5], [6]], kind)
    table = pa.table({"input_ids": column}).slice(1, 3)
    inputs = made.read(table)
    assert inputs.errors == {1: "null_value: input_ids is null"}
    assert filled(made, table, [0, 2], 3) == [[[1, 2, 0], [3, 4, 5]]]
    chunked = pa.table({"input_ids": pa.chunked_array([column.slice(0, 2), column.slice(3)])})
    assert filled(made, chunked, [1, 3], 3) == [[[1, 2, 0], [6, 0, 0]]]


def test_lists_of_one_size_are_read_too() -> None:
    made = features(("input_ids",), SPECS[:1], sequence={"widths": [3]})
    column = pa.array([[1, 2], None, [3, 4]], pa.list_(pa.int64(), 2))
    table = pa.table({"input_ids": column}).slice(1)
    assert made.read(table).errors == {0: "null_value: input_ids is null"}
    assert filled(made, table, [1], 3) == [[[3, 4, 0]]]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"input_ids": None}, "null_value: input_ids is null"),
        ({"input_ids": []}, "wrong_shape: input_ids is an empty list"),
        ({"input_ids": [1] * 5}, "wrong_shape: input_ids holds 5 numbers, the model takes at most 4"),
        ({"input_ids": [1.0, None]}, "wrong_type: input_ids holds what is no int64"),
        ({"input_ids": [1.0, 1.5]}, "wrong_type: input_ids holds what is no int64"),
        ({"input_ids": [1.0, float("nan")]}, "wrong_type: input_ids holds what is no int64"),
        ({"attention_mask": [1]}, "wrong_shape: input_ids holds 2 numbers, attention_mask 1"),
        ({"attention_mask": None}, "null_value: attention_mask is null"),
    ],
)
def test_a_row_that_is_no_sequence_fails_alone(row: dict[str, Any], said: str) -> None:
    made = features(NAMES[:2], SPECS[:2], sequence={"widths": [2, 4]})
    good = {"input_ids": [1.0, 2.0], "attention_mask": [1, 1]}
    inputs = made.read(pa.Table.from_pylist([good, good | row, good]))
    assert inputs.errors == {1: said}
    assert inputs.sequences is not None and inputs.sequences.widths.tolist() == [2, 0, 2]


def test_too_long_rows_are_cut_only_when_the_trainer_said_so() -> None:
    made = features(sequence={"longest": 4, "truncate": True})
    table = pa.table({"input_ids": [[1, 2, 3, 4, 5, 6]]})
    assert made.read(table).errors == {}
    assert filled(made, table, [0], 4)[:2] == [[[1, 2, 3, 4]], [[1, 1, 1, 1]]]


def test_a_model_of_one_width_may_take_shorter_rows() -> None:
    made = features_of(
        Pin("m", "1", "", "", {}, "onnx", models.tensor_signature(4), {"sequence": {"pad": -1}, "features": ["v"]}),
        [InputSpec("x", np.dtype(np.float32), (-1, 4))],
    )
    assert filled(made, pa.table({"v": [[1.0], [1.0, 2.0, 3.0, 4.0]]}), [0, 1], 4) == [[[1, -1, -1, -1], [1, 2, 3, 4]]]


@pytest.mark.parametrize("given", [{"widths": [4, 2]}, {"widths": [0, 4]}, {"longst": 4}, {"widths": [2.5]}])
def test_metadata_that_makes_no_sense_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(SignatureError, match="sequence="):
        Padding.of(given, 16)


def test_columns_that_are_missing_or_hold_no_lists_are_named() -> None:
    made = features()
    with pytest.raises(SignatureError, match="lists of numbers of any length in input_ids"):
        made.needs(pa.schema({"attention_mask": pa.list_(pa.int64())}))
    with pytest.raises(SignatureError, match="input_ids of type string"):
        made.needs(pa.schema({"input_ids": pa.string()}))


# --- a transformer ---


@pytest.fixture(scope="module")
def bert() -> tuple[Pin, Path]:
    return sequence_pin(hidden=32, vocabulary=50, longest=64, token_types=True)


def test_neighbours_size_and_order_change_no_bit(bert: tuple[Pin, Path]) -> None:
    rows = sequence_rows(300, vocabulary=50, longest=64, median=12)
    with open_engine(*bert, "cpu") as engine:
        assert engine.steady
        expected = engine.predict(rows, 512).to_pylist()
        assert len({line["prediction"] for line in expected}) > 1
        for budget in (1, 7, 64, 100_000):
            assert engine.predict(rows, budget).to_pylist() == expected
        shuffled = np.random.default_rng(1).permutation(300)
        assert engine.predict(rows.take(shuffled), 512).to_pylist() == [expected[i] for i in shuffled]
        assert engine.predict(rows.slice(7, 1), 512).to_pylist() == expected[7:8]


def test_padding_changes_no_prediction_by_more_than_rounding(bert: tuple[Pin, Path]) -> None:
    """The made mask is really what the model needs: padded or not, the same."""
    rows = sequence_rows(100, vocabulary=50, longest=64, median=12)
    pin, folder = bert
    own = models.pin_folder(folder, "onnx", dict(pin.signature), sequence={"widths": list(range(1, 65))})
    widest = models.pin_folder(folder, "onnx", dict(pin.signature), sequence={"widths": [64]})
    with open_engine(own, folder, "cpu") as exact, open_engine(widest, folder, "cpu") as padded:
        one, two = exact.predict(rows, 512), padded.predict(rows, 512)
    assert np.abs(one["score"].to_numpy() - two["score"].to_numpy()).max() < 1e-5


def test_broken_rows_stand_among_good_ones_in_their_place(bert: tuple[Pin, Path]) -> None:
    rows = sequence_rows(50, vocabulary=50, longest=64, median=12)
    lists = rows["input_ids"].to_pylist()
    with open_engine(*bert, "cpu") as engine:
        good = engine.predict(rows, 256).to_pylist()
        lists[0], lists[9], lists[49] = None, [], [1] * 65
        broken = rows.set_column(1, "input_ids", pa.array(lists, pa.list_(pa.int64())))
        found = engine.predict(broken, 256).to_pylist()
        assert [i for i, line in enumerate(found) if line["error"]] == [0, 9, 49]
        assert [line for i, line in enumerate(found) if i not in (0, 9, 49)] == [
            line for i, line in enumerate(good) if i not in (0, 9, 49)
        ]
        nothing = engine.predict(broken.take([0, 9]), 256)
        assert nothing["prediction"].null_count == 2 and nothing.schema == engine.predict(rows, 256).schema
        assert engine.predict(rows.slice(0, 0), 256).schema == nothing.schema


def test_a_batch_of_sequences_has_the_same_bytes_whatever_the_budget(bert: tuple[Pin, Path], tmp_path: Path) -> None:
    rows = sequence_rows(200, vocabulary=50, longest=64, median=12)
    files = []
    for run, budget in enumerate((64, 4096)):
        store = Store(str(tmp_path / str(run)))
        with open_engine(*bert, "cpu") as engine:
            ref = infer(
                land(store, [rows.slice(0, 150), rows.slice(150)]),
                bert[0],
                store,
                engine,
                pipeline="p",
                batch_size=budget,
            )
        assert store.manifest(ref).facts["engine"]["padding"]["widths"][-1] == 64
        files.append(part_files(store, ref))
    assert files[0] == files[1]
