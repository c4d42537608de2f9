"""A model's outputs as prediction columns: every form that real exporters give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from airflow_ai_provider.core.infer.engine import open_engine
from airflow_ai_provider.core.infer.outcome import predictions, settle_reading
from airflow_ai_provider.errors import ModelPinError, SignatureError
from tests.core.infer import models

F32 = np.float32
LOGITS = np.array([[0.0, 0.0], [np.log(3), 0.0]], F32)
PROBABILITIES = np.array([[0.25, 0.75], [0.5, 0.5]], F32)
LABELS = np.array([1, 0])


def read(outputs: Sequence[Any], errors: dict[int, str] | None = None, **metadata: Any) -> list[dict[str, Any]]:
    reading = settle_reading(lambda fill: outputs, metadata)
    ids = pa.chunked_array([[f"r{i}" for i in range(len(outputs[0]))]])
    return predictions(ids, outputs, errors or {}, reading).to_pylist()


def test_logits_become_probabilities_and_the_greatest_class_wins() -> None:
    first, second = read([LOGITS], classes=["no", "yes"])
    assert (first["prediction"], first["score"], first["probabilities"]) == ("no", 0.5, [0.5, 0.5])
    assert second["prediction"] == "no" and second["score"] == pytest.approx(0.75)


def test_probabilities_stay_what_they_are() -> None:
    first, second = read([PROBABILITIES], classes=["no", "yes"])
    assert (first["prediction"], first["score"], first["probabilities"]) == ("yes", 0.75, [0.25, 0.75])
    assert (second["prediction"], second["score"]) == ("no", 0.5)  # the first of equals


def test_the_trainer_may_say_what_scores_are() -> None:
    looks_like = np.array([[0.25, 0.75]], F32)
    assert read([looks_like])[0]["probabilities"] == [0.25, 0.75]
    assert read([looks_like], scores="logits")[0]["score"] == pytest.approx(1 / (1 + np.exp(-0.5)))
    assert read([np.array([[0.2, 0.9]], F32)], scores="probabilities")[0]["score"] == pytest.approx(0.9)


def test_huge_logits_do_not_overflow() -> None:
    line = read([np.array([[1e30, -1e30, 0.0]], F32)])[0]
    assert (line["prediction"], line["score"], line["error"]) == (0, 1.0, None)


def test_without_names_the_models_own_labels_are_the_prediction() -> None:
    assert [line["prediction"] for line in read([LABELS, PROBABILITIES])] == [1, 0]
    texts = np.array(["yes", "no"], object)
    assert [line["prediction"] for line in read([texts, PROBABILITIES])] == ["yes", "no"]
    assert [line["prediction"] for line in read([PROBABILITIES])] == [1, 0]


def test_names_stand_for_the_scores_in_their_order() -> None:
    assert [line["prediction"] for line in read([LABELS, PROBABILITIES], classes=["b", "m"])] == ["m", "b"]


def test_a_label_without_scores_has_no_score() -> None:
    assert read([LABELS])[0] == {"_row_id": "r0", "prediction": 1, "score": None, "probabilities": None, "error": None}


@pytest.mark.parametrize("shape", [(2,), (2, 1)])
def test_a_number_per_row_is_a_prediction_without_a_score(shape: tuple[int, ...]) -> None:
    lines = read([np.array([3.5, -2.0], F32).reshape(shape)])
    assert [(line["prediction"], line["score"], line["probabilities"]) for line in lines] == [
        (3.5, None, None),
        (-2.0, None, None),
    ]


@pytest.mark.parametrize("shape", [(2,), (2, 1)])
def test_one_score_and_two_names_is_the_probability_of_the_second(shape: tuple[int, ...]) -> None:
    lines = read([np.array([0.75, 0.25], F32).reshape(shape)], classes=["no", "yes"])
    assert [(line["prediction"], line["score"]) for line in lines] == [("yes", 0.75), ("no", 0.75)]
    assert lines[0]["probabilities"] == [0.25, 0.75]
    logit = read([np.array([np.log(3), -2.0], F32).reshape(shape)], classes=["no", "yes"])
    assert logit[0]["prediction"] == "yes" and logit[0]["score"] == pytest.approx(0.75)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("outputs", [[LOGITS], [LABELS, PROBABILITIES], [np.array([1.0, 5.0], F32)]])
def test_an_output_that_is_not_finite_fails_its_row_alone(outputs: list[Any], bad: float) -> None:
    spoilt = [output.copy() for output in outputs]
    spoilt[-1][1, ...] = bad
    reading = settle_reading(lambda fill: outputs, {})
    lines = predictions(pa.chunked_array([["a", "b"]]), spoilt, {}, reading).to_pylist()
    good = predictions(pa.chunked_array([["a", "b"]]), outputs, {}, reading).to_pylist()
    assert lines[0] == good[0]
    assert lines[1] == {
        "_row_id": "b",
        "prediction": None,
        "score": None,
        "probabilities": None,
        "error": "model_output: the model returned a number that is not finite",
    }


def test_the_reason_of_the_input_comes_before_that_of_the_output() -> None:
    spoilt = np.array([[0.5, 0.5], [np.nan, np.nan]], F32)
    reading = settle_reading(lambda fill: [PROBABILITIES], {})
    lines = predictions(pa.chunked_array([["a", "b"]]), [spoilt], {1: "null_value: x is null"}, reading).to_pylist()
    assert [line["error"] for line in lines] == [None, "null_value: x is null"]


def test_many_classes_are_read_as_few_are() -> None:
    scores = np.random.default_rng(0).random((50, 40)).astype(F32)
    lines = read([scores], scores="probabilities")
    assert [line["prediction"] for line in lines] == scores.argmax(axis=1).tolist()
    assert [line["score"] for line in lines] == pytest.approx(scores.max(axis=1).tolist())


def test_zipmap_is_refused_with_the_way_out() -> None:
    with pytest.raises(SignatureError, match="zipmap"):
        settle_reading(lambda fill: [LABELS, [{0: 0.5, 1: 0.5}]], {})


def test_outputs_of_no_known_form_are_refused() -> None:
    with pytest.raises(SignatureError, match=r"float32\[2, 3, 4\]"):
        settle_reading(lambda fill: [np.zeros((2, 3, 4), F32)], {})


def test_names_must_be_as_many_as_scores() -> None:
    with pytest.raises(SignatureError, match="2 scores per row, its metadata names 3"):
        settle_reading(lambda fill: [PROBABILITIES], {"classes": ["a", "b", "c"]})


# --- whole models ---


def test_a_regression_model_says_what_scikit_learn_says() -> None:
    pin, folder, rows, model = models.diabetes_onnx()
    with open_engine(pin, folder, "cpu") as engine:
        predicted = engine.predict(rows, 100)
    expected = model.predict(np.column_stack([c.to_numpy() for c in rows.columns[1:]]))
    assert np.allclose(predicted["prediction"].to_numpy(), expected, rtol=1e-4)
    assert predicted["score"].null_count == predicted["probabilities"].null_count == rows.num_rows


def test_a_torch_graph_says_what_the_net_says() -> None:
    import torch
    from sklearn.datasets import load_digits

    pin, folder = models.digit_torch()
    rows = models.digit_rows()
    with open_engine(pin, folder, "cpu") as engine:
        predicted = engine.predict(rows, 64).to_pylist()
    images = torch.tensor((load_digits().images[:300] * 255 / 16).round() / 255, dtype=torch.float32).unsqueeze(1)
    with torch.inference_mode():
        expected = torch.softmax(models.digit_net()(images), dim=1).numpy()
    assert [line["prediction"] for line in predicted] == [f"digit {i}" for i in expected.argmax(axis=1)]
    assert np.allclose([line["probabilities"] for line in predicted], expected, atol=1e-5)


def test_torchscript_is_opened_too() -> None:
    import torch

    net = torch.nn.Sequential(torch.nn.Linear(3, 2)).eval()
    folder = models.fresh_folder("script")
    (folder / "data").mkdir()
    torch.jit.save(torch.jit.trace(net, torch.zeros(2, 3)), str(folder / "data" / "model.pth"))
    pin = models.pin_folder(folder, "torch", models.tensor_signature(3), features=["a", "b", "c"])
    rows = pa.table({"_row_id": ["x", "y"], "a": [1.0, 0.0], "b": [0.0, 2.0], "c": [0.5, 0.5]})
    with open_engine(pin, folder, "cpu") as engine:
        predicted = engine.predict(rows, 8)["probabilities"].to_pylist()
    with torch.inference_mode():
        expected = torch.softmax(net(torch.tensor([[1, 0, 0.5], [0, 2, 0.5]])), dim=1)
    assert np.allclose(predicted, expected.numpy(), atol=1e-6)


@pytest.mark.parametrize("rows", [1, 4])
def test_a_model_exported_for_a_fixed_number_of_rows_is_called_with_that(rows: int) -> None:
    names = ["a", "b"]
    table = pa.table({"_row_id": list("abcdefg"), "a": np.arange(7.0), "b": np.arange(7.0)[::-1]})
    lines = []
    for fixed in (rows, "rows"):
        folder = models.fresh_folder("fixed")
        (folder / "model.onnx").write_bytes(models.dense_onnx([2, 4, 3], rows=fixed))
        with open_engine(models.pin_folder(folder, "onnx", models.columns_signature(names)), folder, "cpu") as engine:
            lines.append(engine.predict(table, 1000).to_pylist())
    for one, other in zip(*lines, strict=True):
        assert one["prediction"] == other["prediction"]
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-6)


def test_a_model_that_does_not_take_its_signature_is_refused_when_opened() -> None:
    folder = models.fresh_folder("misfit")
    (folder / "model.onnx").write_bytes(models.dense_onnx([5, 2]))
    with pytest.raises(SignatureError, match=r"does not take what its signature says \(\[\[2, 3\]\]"):
        open_engine(models.pin_folder(folder, "onnx", models.columns_signature(["a", "b", "c"])), folder, "cpu")
    _, original = models.digit_torch()
    with pytest.raises(SignatureError, match="does not take what its signature says"):
        open_engine(
            models.pin_folder(original, "torch", models.tensor_signature(3, 9, 9), classes=["a"]), original, "cpu"
        )


def test_a_flavor_without_an_engine_is_refused() -> None:
    folder = models.fresh_folder("other")
    (folder / "model.pkl").write_bytes(b"x")
    with pytest.raises(ModelPinError, match="no engine opens flavor 'sklearn'"):
        open_engine(models.pin_folder(folder, "sklearn", models.columns_signature(["a"])), folder, "cpu")
