"""Models that are code: what may be opened, how rows go in and come out, what their code may do wrong."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

import lightgbm
import mlflow.lightgbm
import mlflow.pyfunc
import mlflow.sklearn
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from sklearn.datasets import load_breast_cancer

from airflow_ai_provider.core.batch import ROW_ID, Pin
from airflow_ai_provider.core.infer.engine import open_engine
from airflow_ai_provider.core.infer.flow import infer
from airflow_ai_provider.core.infer.pyfunc import environment_differences
from airflow_ai_provider.core.infer.trust import Trust, flavor_of
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.errors import DeviceError, ModelPinError, ModelTrustError, RowMismatchError, SignatureError
from tests.core.infer import models
from tests.core.infer.batches import land

ROWS = pa.table(
    {ROW_ID: [f"r/{i}" for i in range(6)], "x": [0.0, 1, 2, 3, 4, 5], "word": ["a", "b", "", "d", "e", "f"]}
)


def python_model(predict: Any, rows: pa.Table = ROWS, **metadata: Any) -> tuple[Pin, Path]:
    """A Python function as mlflow keeps it: pickled, code and all."""

    class Made(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
        def predict(self, context: Any, model_input: pd.DataFrame, params: Any = None) -> Any:
            return predict(model_input)

    save = functools.partial(mlflow.pyfunc.save_model, python_model=Made())
    return models.pyfunc_folder("function", rows, save, **metadata)


def predicted(predict: Any, rows: pa.Table = ROWS, batch_size: int = 4, **metadata: Any) -> list[dict[str, Any]]:
    with open_engine(*python_model(predict, **metadata)) as engine:
        found: list[dict[str, Any]] = engine.predict(
            rows.select([ROW_ID, *engine.needs(rows.schema)]), batch_size
        ).to_pylist()
    return found


# --- what may be opened ---


def flavor(flavors: dict[str, Any], files: list[str], trust: Trust, name: str = "triage") -> str:
    found = dict.fromkeys(files, "sha256:f")
    return flavor_of({"flavors": flavors}, found, Path("/nowhere"), trust, name=name, version="3")


SCORES = {"classes": ["no", "yes"], "scores": "probabilities"}
PICKLED = {"sklearn": {}, "python_function": {}}


def test_code_is_refused_unless_the_model_itself_is_named() -> None:
    for trust in (Trust(), Trust(frozenset({"other"})), Trust(frozenset({"tri"}))):
        with pytest.raises(ModelTrustError, match=r"flavor sklearn.*a pickle is code.*allow_pickle=\['triage'\]"):
            flavor(PICKLED, ["model.pkl"], trust)
    assert flavor(PICKLED, ["model.pkl"], Trust(frozenset({"triage"}))) == "pyfunc"


def test_what_is_served_elsewhere_is_pinned_and_never_opened() -> None:
    assert flavor(PICKLED, ["model.pkl"], Trust(served=True)) == "served"
    assert flavor({"onnx": {}, **PICKLED}, ["model.onnx"], Trust(served=True)) == "onnx", "this could be opened"
    pin, folder = models.cancer_pickle()
    with pytest.raises(ModelTrustError, match="pinned to be predicted with on a model server.*endpoint"):
        open_engine(Pin(**{**pin.to_dict(), "flavor": "served"}), folder)


def test_weights_without_a_graph_are_refused_for_what_they_are() -> None:
    flavors = {"transformers": {}, "python_function": {}}
    with pytest.raises(ModelTrustError, match=r"safetensors weights \(model/model.safetensors\) are numbers without"):
        flavor(flavors, ["model/config.json", "model/model.safetensors"], Trust())


def test_a_named_model_that_mlflow_cannot_load_as_a_function_is_said_so() -> None:
    with pytest.raises(ModelPinError, match="no python_function flavor.*it has spark"):
        flavor({"spark": {}}, ["model"], Trust(frozenset({"triage"})))


# --- rows in, predictions out ---


def test_a_pickled_classifier_decides_as_its_onnx_twin_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody is asked
    store, rows = Store(str(tmp_path)), models.cancer_rows()
    found = []
    for pin, folder in (models.cancer_onnx(), models.cancer_pickle()):
        with open_engine(pin, folder, "cpu") as engine:
            ref = infer(land(store, [rows]), pin, store, engine, pipeline="p")
        assert ref.counts == {"accepted": 569, "predicted": 569, "failed": 0}
        found.append(next(store.read(ref)))
    assert found[0]["prediction"].to_pylist() == found[1]["prediction"].to_pylist()
    assert np.allclose(found[0]["score"].to_numpy(), found[1]["score"].to_numpy(), atol=1e-5)


@pytest.mark.parametrize("kind", ["classifier", "booster"])
def test_boosted_trees_say_what_their_library_says(kind: str) -> None:
    rows = models.cancer_rows()
    frame, labels = rows.drop_columns([ROW_ID]).to_pandas(), load_breast_cancer().target
    if kind == "classifier":
        trees = lightgbm.LGBMClassifier(n_estimators=5, verbose=-1).fit(frame, labels)
    else:
        trees = lightgbm.train({"objective": "binary", "verbose": -1}, lightgbm.Dataset(frame, labels), 5)
    pin, folder = models.pyfunc_folder(
        kind, rows, functools.partial(mlflow.lightgbm.save_model, trees, serialization_format="cloudpickle")
    )
    with open_engine(pin, folder) as engine:
        found = engine.predict(rows, 100)
    assert found["prediction"].to_pylist() == trees.predict(frame).tolist()
    shares = np.array(found["probabilities"].to_pylist()) if kind == "classifier" else None
    assert shares is None or np.allclose(shares, trees.predict_proba(frame), atol=1e-6)
    assert kind == "classifier" or found["score"].null_count == len(rows), "a booster says one number"


def test_columns_keep_their_types() -> None:
    told = predicted(lambda frame: np.array([f"{x.dtype}" for x in (frame["x"],) for _ in range(len(frame))]))
    assert {line["prediction"] for line in told} == {"float64"}
    shouted = predicted(lambda frame: frame["word"].str.upper())
    assert [line["prediction"] for line in shouted] == ["A", "B", "", "D", "E", "F"]


@pytest.mark.parametrize(
    ("predict", "first"),
    [
        (lambda f: f["x"].to_numpy() * 2.5, {"prediction": 0.0, "score": None}),
        (lambda f: np.stack([1 - f["x"] / 10, f["x"] / 10], axis=1), {"prediction": "no", "score": 1.0}),
        (lambda f: pd.DataFrame({"no": 1 - f["x"] / 10, "yes": f["x"] / 10}), {"prediction": "no", "score": 1.0}),
        (lambda f: [str(w) for w in f["word"]], {"prediction": "a", "score": None}),
        (lambda f: {"label": f["word"].to_numpy()}, {"prediction": "a", "score": None}),
    ],
    ids=["number", "scores", "frame", "list", "mapping"],
)
def test_what_a_function_may_return(predict: Any, first: dict[str, Any]) -> None:
    lines = predicted(predict, **(SCORES if first["prediction"] == "no" else {}))
    assert {name: lines[0][name] for name in first} == first
    assert len(lines) == 6 and not any(line["error"] for line in lines)


def test_an_optional_column_may_be_absent_or_empty() -> None:
    pin, folder = python_model(lambda frame: frame["x"].fillna(-1.0))
    inputs = [{**column, "required": column["name"] != "x"} for column in pin.signature["inputs"]]
    pin = Pin(**{**pin.to_dict(), "signature": {"inputs": inputs, "outputs": []}})
    for file in folder.glob("MLmodel"):
        file.write_text(file.read_text().replace('"name": "x", "required": true', '"name": "x", "required": false'))
    with open_engine(pin, folder) as engine:
        without = ROWS.drop_columns(["x"])
        assert engine.needs(without.schema) == ["word"]
        assert set(engine.predict(without, 4)["prediction"].to_pylist()) == {-1.0}
        holes = ROWS.set_column(1, "x", pa.array([None, 1.0, 2, 3, 4, 5]))
        assert engine.predict(holes, 4)["prediction"].to_pylist() == [-1.0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_any_number_of_rows(count: int) -> None:
    assert len(predicted(lambda frame: frame["x"].to_numpy(), ROWS.slice(0, count), batch_size=2)) == count


# --- code that does not behave ---


def test_a_row_that_the_code_cannot_take_fails_alone() -> None:
    def picky(frame: pd.DataFrame) -> Any:
        if (frame["x"] == 2).any() or (frame["x"] == 5).any():
            raise KeyError("no such tumour")
        return frame["x"].to_numpy()

    lines = predicted(picky)
    assert [line["prediction"] for line in lines] == [0, 1, None, 3, 4, None]
    assert {line["error"] for line in lines if line["error"]} == {
        "misfit: the model cannot take this row: KeyError: 'no such tumour'"
    }


def test_a_number_that_is_not_finite_fails_its_row() -> None:
    lines = predicted(lambda frame: np.where(frame["x"] == 3, np.nan, frame["x"]))
    assert [bool(line["error"]) for line in lines] == [False, False, False, True, False, False]


def test_code_that_loses_rows_is_stopped() -> None:
    with pytest.raises(RowMismatchError, match="was given 4 rows and gave back 3"):
        predicted(lambda frame: frame["x"].to_numpy()[: max(2, len(frame) - 1)])


def test_code_that_cannot_predict_at_all_is_told_before_the_first_row() -> None:
    with pytest.raises(SignatureError, match="does not take what its signature says.*ZeroDivisionError"):
        predicted(lambda frame: 1 / 0)


def test_one_value_for_all_rows_is_no_prediction() -> None:
    with pytest.raises(SignatureError, match="one float for all rows"):
        predicted(lambda frame: 0.5)


def test_files_that_do_not_load_are_told_with_the_next_move(tmp_path: Path) -> None:
    pin, folder = python_model(lambda frame: frame["x"])
    (folder / "python_model.pkl").write_bytes(b"no pickle")
    with pytest.raises(SignatureError, match="cannot be loaded here.*requirements.txt"):
        open_engine(pin, folder)


def test_columns_of_other_types_are_refused_by_name() -> None:
    pin, folder = models.cancer_pickle()
    inputs = [{"type": "datetime", "name": "seen_at", "required": True}]
    with pytest.raises(SignatureError, match=r"takes seen_at \(datetime\)"):
        open_engine(Pin(**{**pin.to_dict(), "signature": {"inputs": inputs, "outputs": []}}), folder)


def test_no_gpu_is_promised() -> None:
    with pytest.raises(DeviceError, match="shows no device"):
        open_engine(*models.cancer_pickle(), "require_cuda")


def test_another_environment_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = f"numpy=={np.__version__}\nscikit-learn==0.1\nno-such-library[x]==3.0\n# mlflow==1\nunbound\n"
    (tmp_path / "requirements.txt").write_text(text)
    assert environment_differences(tmp_path) == [
        f"scikit-learn 0.1 there, {__import__('sklearn').__version__} here",
        "no-such-library 3.0 there, none here",
    ]
    pin, folder = python_model(lambda frame: frame["x"])
    (folder / "requirements.txt").write_text(text)
    with caplog.at_level(logging.WARNING):
        open_engine(pin, folder).close()
    assert "made in another environment: scikit-learn 0.1 there" in caplog.text
