"""Batches through real model servers: MLServer, Triton, ``mlflow models serve``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import onnx
import pyarrow as pa
import pytest
from mlflow.models import ModelSignature, infer_signature
from mlflow.types import Schema, TensorSpec

from airflow_ai_provider.core.batch import ROW_ID, Pin, digest_of
from airflow_ai_provider.core.infer.engine import open_engine
from airflow_ai_provider.core.infer.flow import infer
from airflow_ai_provider.core.infer.pin import resolve_pin
from airflow_ai_provider.core.infer.remote.client import open_remote, probe_server
from airflow_ai_provider.core.infer.remote.endpoint import RemoteEndpoint
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.errors import EngineUnavailableError, ModelPinError, SignatureError
from tests.core.infer import models
from tests.core.infer.batches import land
from tests.core.infer.dense import columns_signature
from tests.servers.mlflow import MlflowServer
from tests.servers.model_servers import MlflowModelServer, MlServer, Server, TritonServer, start_all

pytestmark = pytest.mark.integration
CANCER = models.cancer_rows().column_names[1:]
FILES = {"model.onnx": "sha256:" + "1" * 64}


def pin_of(name: str, signature: dict[str, Any], version: str = "3", **metadata: Any) -> Pin:
    return Pin(name, version, "", digest_of(FILES), FILES, "onnx", signature, metadata)


SUMS = pin_of("sums", columns_signature(["x", "y"]), classes=["low", "high"])
TRIAGE = pin_of("triage", columns_signature(CANCER), classes=["malignant", "benign"])


@pytest.fixture(scope="module")
def registry(mlflow_process: MlflowServer) -> str:
    """Two versions to be served: a classifier that takes a tensor, a regression that takes columns."""
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(mlflow_process.uri)
    mlflow.set_registry_uri(mlflow_process.uri)  # else what another module has set still holds
    try:
        mlflow.set_experiment("served")
        tensors = ModelSignature(Schema([TensorSpec(np.dtype("float32"), (-1, 30))]))
        log_onnx("served_cancer", models.cancer_onnx()[1], tensors, {"features": CANCER, "classes": ["bad", "good"]})
        _, folder, rows, model = models.diabetes_onnx()
        frame = rows.drop_columns([ROW_ID]).to_pandas()
        log_onnx("served_diabetes", folder, infer_signature(frame, model.predict(frame.to_numpy())), {})
    finally:
        mlflow.set_tracking_uri(before)
    return mlflow_process.uri


def log_onnx(name: str, folder: Path, signature: ModelSignature, metadata: dict[str, Any]) -> None:
    model = onnx.load(str(folder / "model.onnx"))
    named = {"registered_model_name": name, "metadata": metadata, "pip_requirements": []}
    mlflow.onnx.log_model(model, name="model", signature=signature, **named)


@pytest.fixture(scope="module")
def servers(registry: str) -> Iterator[dict[str, Any]]:
    starts: dict[str, Any] = {
        "mlserver": MlServer,
        "triton": TritonServer,
        "cancer": lambda: MlflowModelServer(registry, "served_cancer/1"),
        "diabetes": lambda: MlflowModelServer(registry, "served_diabetes/1"),
    }
    with start_all(starts) as started:
        yield started


def at(server: Any, protocol: str = "oip", **more: Any) -> RemoteEndpoint:
    return RemoteEndpoint(protocol, server.url, **{"timeout_s": 20, "patience_s": 40, **more})


def sum_rows(count: int, too_large: tuple[int, ...] = ()) -> pa.Table:
    values = np.random.default_rng(5).normal(size=(2, count))
    values[0, list(too_large)] = 5000
    return pa.table({ROW_ID: [f"r/{i}" for i in range(count)], "x": values[0], "y": values[1]})


def test_mlserver_predicts_as_the_same_model_does_here(servers: dict[str, Any]) -> None:
    rows = models.cancer_rows()
    expected = models.cancer_model().predict_proba(rows.drop_columns([ROW_ID]).to_pandas().to_numpy())
    endpoint = at(servers["mlserver"], outputs=("predict_proba",))
    with open_remote(TRIAGE, endpoint) as engine:
        assert engine.proof == "its answers name version 3"
        predicted = engine.predict(rows, 100)
    np.testing.assert_allclose(predicted["probabilities"].to_pylist(), expected, atol=1e-6)
    assert predicted["prediction"].to_pylist() == [["malignant", "benign"][i] for i in expected.argmax(axis=1)]
    assert predicted[ROW_ID].equals(rows[ROW_ID])


def test_mlserver_s_own_default_is_a_label_without_a_score(servers: dict[str, Any]) -> None:
    with open_remote(TRIAGE, at(servers["mlserver"])) as engine:
        predicted = engine.predict(models.cancer_rows().slice(0, 30), 10)
    assert predicted["prediction"].type == pa.int64()
    assert set(predicted["prediction"].to_pylist()) == {0, 1}


def test_mlserver_takes_texts_and_numbers_as_a_frame(servers: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    columns = [{"type": "string", "name": "colour"}, {"type": "double", "name": "size"}]
    rows = pa.table({ROW_ID: list("abcd"), "colour": ["red", "blue", "pink", None], "size": [1.0, 39, 4, 6]})
    with open_remote(pin_of("mixed", {"inputs": columns, "outputs": []}), at(servers["mlserver"])) as engine:
        predicted = engine.predict(rows, 2)
    assert predicted["prediction"].to_pylist() == ["small", "large", "small", None]
    assert predicted["error"].to_pylist()[3] == "null_value: colour is null"
    assert "the pin cannot be proved" in caplog.text, "it serves no version, so nothing shows which one it is"


def test_mlserver_fails_with_500_on_a_row_and_the_row_is_found(servers: dict[str, Any]) -> None:
    """The signature allows a hole that the model's own code does not take."""
    pin = pin_of("triage", columns_signature(CANCER, optional=(CANCER[4],)))
    values = models.cancer_rows()[CANCER[4]].to_pylist()
    values[123] = None
    rows = models.cancer_rows().set_column(5, CANCER[4], pa.array(values))
    with open_remote(pin, at(servers["mlserver"])) as engine:
        errors = engine.predict(rows, 100)["error"].to_pylist()
    assert [i for i, error in enumerate(errors) if error] == [123]
    assert errors[123].startswith("refused: 500: ")
    assert "NaN" in errors[123] or "NoneType" in errors[123], errors[123]


@pytest.mark.parametrize("name", ["mlserver", "triton"])
def test_another_version_than_the_pinned_is_refused(servers: dict[str, Any], name: str) -> None:
    pin = TRIAGE if name == "mlserver" else SUMS
    wrong = Pin.from_dict(pin.to_dict() | {"version": "4"})
    with pytest.raises(ModelPinError, match="version 4"):
        open_remote(wrong, at(servers[name]))
    with pytest.raises(ModelPinError, match="no model 'absent'"):
        open_remote(pin, at(servers[name], model="absent"))


def test_triton_takes_binary_tensors_and_fewer_rows_than_are_sent(servers: dict[str, Any]) -> None:
    rows = sum_rows(1000, too_large=(7, 500))
    with open_remote(SUMS, at(servers["triton"])) as engine:
        assert engine.proof == "its metadata lists version 3"
        predicted = engine.predict(rows, 500)
    errors = predicted["error"].to_pylist()
    assert [i for i, error in enumerate(errors) if error] == [7, 500]
    assert errors[7].startswith("refused: 500: ")
    assert "a number is larger than 1000" in errors[7]
    total = rows["x"].to_numpy() + rows["y"].to_numpy()
    for i, line in enumerate(predicted.to_pylist()):
        if i not in (7, 500):
            assert line["prediction"] == ("high" if total[i] > 0 else "low")
            assert line["score"] == pytest.approx(1 / (1 + np.exp(-abs(total[i]))), abs=1e-6)


def test_triton_takes_and_gives_texts(servers: dict[str, Any]) -> None:
    texts = ["grün", "", "tumour", None, "a" * 3000, "日本"]
    signature = {"inputs": [{"type": "string", "name": "text", "required": True}], "outputs": []}
    with open_remote(pin_of("words", signature), at(servers["triton"])) as engine:
        predicted = engine.predict(pa.table({ROW_ID: list("abcdef"), "text": texts}), 4)
    assert predicted["prediction"].to_pylist() == [None if text is None else text.upper() for text in texts]
    assert predicted["error"].to_pylist()[3] == "null_value: text is null"


def test_mlflow_serves_a_tensor_by_instances(
    servers: dict[str, Any], registry: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The very files that were pinned, opened here and served there, say the same."""
    pin = resolve_pin("served_cancer/1", registry, tmp_path)
    rows = models.cancer_rows()
    with open_engine(pin, next(tmp_path.glob("*/MLmodel")).parent, "cpu") as engine:
        expected = engine.predict(rows, 100)
    with open_remote(pin, at(servers["cancer"], "mlflow")) as engine:
        assert "the pin cannot be proved" in caplog.text
        predicted = engine.predict(rows, 100)
    assert predicted["prediction"].to_pylist() == expected["prediction"].to_pylist()
    np.testing.assert_allclose(predicted["score"].to_numpy(), expected["score"].to_numpy(), atol=1e-6)


def test_mlflow_serves_columns_by_dataframe_split(servers: dict[str, Any], registry: str, tmp_path: Path) -> None:
    """Through the whole verb: landed batch, parts, manifest; a row that does not fit fails by itself."""
    pin = resolve_pin("served_diabetes/1", registry, tmp_path / "cache")
    _, _, rows, model = models.diabetes_onnx()
    values = rows["bmi"].to_pylist()
    values[11], values[12] = None, float("nan")
    rows = rows.set_column(rows.column_names.index("bmi"), "bmi", pa.array(values))
    store = Store(f"file://{tmp_path}/store")
    batch = land(store, [rows.slice(0, 300), rows.slice(300)])
    with open_remote(pin, at(servers["diabetes"], "mlflow", batch_size=70)) as engine:
        ref = infer(batch, pin, store, engine, pipeline="p")
        again = infer(batch, pin, store, engine, pipeline="p")
    assert dict(ref.counts) == {"accepted": 442, "predicted": 440, "failed": 2}
    assert again == ref
    manifest = store.manifest(ref)
    assert manifest.facts["engine"] == {"engine": "remote-mlflow", "device": "remote", "batch_size": 70}
    predicted = pa.concat_tables([store.read_part(ref, part, None) for part in manifest.table("predictions")])
    expected = model.predict(rows.drop_columns([ROW_ID]).to_pandas().fillna(0).to_numpy())
    kept = [i for i, error in enumerate(predicted["error"].to_pylist()) if not error]
    assert len(kept) == 440
    found = predicted["prediction"].to_numpy()[kept]
    np.testing.assert_allclose(found, expected[kept], rtol=1e-4)


def test_mlflow_refuses_a_signature_that_is_not_its_model_s(servers: dict[str, Any]) -> None:
    wrong = pin_of("served_diabetes", columns_signature(["a", "b"]), "1")
    with pytest.raises(SignatureError, match="refuses what the signature"):
        open_remote(wrong, at(servers["diabetes"], "mlflow"))


def test_a_real_server_that_freezes_and_wakes(servers: dict[str, Any]) -> None:
    server: Server = servers["triton"]
    with open_remote(SUMS, at(server)) as engine, open_remote(SUMS, at(server, timeout_s=2, patience_s=4)) as hasty:
        expected = engine.predict(sum_rows(200), 50)
        server.pause()
        try:
            with pytest.raises(EngineUnavailableError, match="no whole answer"):
                hasty.predict(sum_rows(200), 50)
        finally:
            server.resume()
        assert engine.predict(sum_rows(200), 50).equals(expected)


def test_the_probe_of_real_servers(servers: dict[str, Any]) -> None:
    protocols = {"mlserver": "oip", "triton": "oip", "cancer": "mlflow"}
    for name, protocol in protocols.items():
        assert probe_server(at(servers[name], protocol)).endswith("answers with 200")
