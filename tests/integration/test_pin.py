"""Pins against real MLflow: a server, a database without a server, a folder of files."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import mlflow
import numpy as np
import onnx
import pyarrow as pa
import pytest
import torch
from mlflow import MlflowClient
from mlflow.models import infer_signature

from airflow_ai_provider.core.batch import Pin, digest_of
from airflow_ai_provider.core.infer import cache
from airflow_ai_provider.core.infer.engine import open_engine
from airflow_ai_provider.core.infer.flow import infer
from airflow_ai_provider.core.infer.pin import _PATIENCE, probe_registry, resolve_pin
from airflow_ai_provider.core.infer.trust import Trust
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.errors import (
    ConnectionConfigError,
    ModelPinError,
    ModelTrustError,
    RegistryUnavailableError,
    SignatureError,
    SpecError,
)
from include.models.sign import sign
from tests.core.infer import models
from tests.core.infer.batches import land
from tests.core.infer.test_signing import Signer
from tests.integration.registered import FRAME, change_artifacts, fill, flip_a_byte, log_onnx, log_torch
from tests.servers.mlflow import MlflowServer

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def server_uri(mlflow_process: MlflowServer) -> str:
    fill(mlflow_process.uri)
    return mlflow_process.uri


@pytest.fixture(scope="module")
def database_uri(mlflow_process: MlflowServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("database")
    before = Path.cwd()
    os.chdir(folder)  # a database without a server puts the artifacts under the current folder
    try:
        uri = mlflow_process.fresh_database(folder)
        fill(uri)
        yield uri
    finally:
        os.chdir(before)


@pytest.fixture(scope="module", params=["server", "database"])
def uri(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(f"{request.param}_uri"))


# --- what a pin says ---


def test_an_alias_becomes_a_version_and_the_digest_of_its_bytes(uri: str, tmp_path: Path) -> None:
    pin = resolve_pin("triage@champion", uri, tmp_path)
    assert (pin.name, pin.version, pin.alias, pin.flavor, pin.registry) == ("triage", "1", "champion", "onnx", uri)
    assert pin.metadata == {"classes": ["malignant", "benign"]}
    assert [column["name"] for column in pin.signature["inputs"]] == list(FRAME.columns)
    assert pin.digest == digest_of(dict(pin.files))
    own = Path(
        mlflow.artifacts.download_artifacts("models:/triage/1", tracking_uri=uri, dst_path=str(tmp_path / "own"))
    )
    (own / "registered_model_meta").unlink()  # what MLflow adds at this kind of download, the registry does not hold
    assert cache.hash_files(own) == pin.files
    assert Pin.from_dict(json.loads(json.dumps(pin.to_dict()))) == pin


def test_a_version_is_pinned_as_its_alias_is(uri: str, tmp_path: Path) -> None:
    by_alias, by_version = resolve_pin("triage@challenger", uri, tmp_path), resolve_pin("triage/2", uri, tmp_path)
    assert (by_version.digest, by_version.version, by_version.alias) == (by_alias.digest, "2", "")


def test_a_pinned_model_predicts_from_the_cache_that_pinning_left(uri: str, tmp_path: Path) -> None:
    pin = resolve_pin("triage@champion", uri, tmp_path / "cache")
    folder = cache.fetch(pin, tmp_path / "cache", "http://127.0.0.1:9")  # nobody is asked
    store = Store(str(tmp_path / "store"))
    with open_engine(pin, folder, "cpu") as engine:
        ref = infer(land(store, [models.cancer_rows()]), pin, store, engine, pipeline="p")
    right = models.cancer_model().predict(FRAME.to_numpy(np.float32))
    expected = [("malignant", "benign")[label] for label in right]
    assert next(store.read(ref))["prediction"].to_pylist() == expected


def test_another_worker_downloads_and_proves_every_file(uri: str, tmp_path: Path) -> None:
    pin = resolve_pin("triage@champion", uri, tmp_path / "one")
    folder = cache.fetch(pin, tmp_path / "two", lambda: uri)
    assert cache.hash_files(folder) == pin.files
    assert [path.name for path in (tmp_path / "two").iterdir()] == [pin.digest.removeprefix("sha256:")]


def test_an_alias_that_moves_changes_no_pin(uri: str, tmp_path: Path) -> None:
    client = MlflowClient(uri, uri)
    client.set_registered_model_alias("triage", "moving", "1")
    pin = resolve_pin("triage@moving", uri, tmp_path / "one")
    client.set_registered_model_alias("triage", "moving", "2")
    assert cache.hash_files(cache.fetch(pin, tmp_path / "two", uri)) == pin.files
    assert resolve_pin("triage@moving", uri, tmp_path / "one").version == "2"


def test_torch_graphs_are_pinned_and_pickled_nets_refused(server_uri: str, tmp_path: Path) -> None:
    mlflow.set_tracking_uri(server_uri)
    mlflow.set_registry_uri(server_uri)
    log_torch("digits", models.digit_net(), metadata={"classes": [f"digit {i}" for i in range(10)]})
    log_torch("digits", torch.jit.trace(models.digit_net(), torch.zeros(2, 1, 8, 8)), serialization_format="pickle")
    log_torch("digits", models.digit_net(), serialization_format="pickle")
    said = []
    for version in ("1", "2"):
        pin = resolve_pin(f"digits/{version}", server_uri, tmp_path)
        with open_engine(pin, cache.fetch(pin, tmp_path), "cpu") as engine:
            said.append(engine.predict(models.digit_rows(), 64)["score"].to_numpy())
    assert pin.flavor == "torch" and np.allclose(said[0], said[1], atol=1e-5)
    with pytest.raises(ModelPinError, match="it is a pickle.*serialization_format='pt2'"):
        resolve_pin("digits/3", server_uri, tmp_path)


# --- what is not there, or not safe ---


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("absent@champion", r"no model 'absent'; it has \[.*'triage'"),
        ("triage@nobody", r"no alias 'nobody'; it has \{.*'champion': '1'"),
        ("triage/77", r"no version 77; it has \[1, 2\]"),
        ("o'brien/1", 'no model "o\'brien"'),
    ],
)
def test_what_is_absent_is_named_with_what_there_is(uri: str, tmp_path: Path, model: str, said: str) -> None:
    with pytest.raises(ModelPinError, match=said):
        resolve_pin(model, uri, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_model_without_a_signature_says_how_to_give_it_one(uri: str, tmp_path: Path) -> None:
    with pytest.raises(SignatureError, match="infer_signature"):
        resolve_pin("unsigned/1", uri, tmp_path)


def test_a_pickled_model_is_refused_with_the_way_out(uri: str, tmp_path: Path) -> None:
    with pytest.raises(ModelPinError, match="flavor sklearn.*a pickle is code.*mlflow.onnx.log_model"):
        resolve_pin("pickled/1", uri, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("model", ["triage", "triage@", "@champion", "triage/latest", "", "triage/1@champion/2x@"])
def test_a_model_must_name_an_alias_or_a_version(model: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="name@alias"):
        resolve_pin(model, "sqlite:////nowhere.db", tmp_path)


def test_a_version_deleted_in_mid_run_is_named(database_uri: str, tmp_path: Path) -> None:
    mlflow.set_tracking_uri(database_uri)
    mlflow.set_registry_uri(database_uri)
    log_onnx("passing")
    pin = resolve_pin("passing/1", database_uri, tmp_path / "one")
    MlflowClient(database_uri, database_uri).delete_model_version("passing", "1")
    with pytest.raises(ModelPinError, match="version 1 of model passing is no longer in the registry"):
        cache.fetch(pin, tmp_path / "two", database_uri)
    assert cache.fetch(pin, tmp_path / "one", database_uri).is_dir(), "this worker has it still"


@pytest.mark.parametrize("flavor", ["pyfunc", "served"])
def test_a_pickled_model_is_pinned_where_it_is_allowed(server_uri: str, tmp_path: Path, flavor: str) -> None:
    trust = Trust(frozenset({"pickled"})) if flavor == "pyfunc" else Trust(served=True)
    pin = resolve_pin("pickled/1", server_uri, tmp_path / "one", trust)
    assert pin.flavor == flavor
    folder = cache.fetch(pin, tmp_path / "two", server_uri)
    if flavor == "served":
        with pytest.raises(ModelTrustError, match="pinned to be predicted with on a model server"):
            open_engine(pin, folder)
        return
    with open_engine(pin, folder) as engine:
        said = engine.predict(models.cancer_rows(), 100)
    assert said["prediction"].to_pylist() == models.cancer_model().predict(FRAME.to_numpy()).tolist()
    assert said["score"].null_count == 0


# --- rows against a pinned model ---


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda rows: rows.slice(0, 0), {"accepted": 0, "predicted": 0, "failed": 0}),
        (lambda rows: rows.slice(0, 1), {"accepted": 1, "predicted": 1, "failed": 0}),
        (lambda rows: replaced(rows, pa.array(range(569))), {"accepted": 569, "predicted": 569, "failed": 0}),
        (lambda rows: replaced(rows, pa.array([None, *range(568)])), {"accepted": 569, "predicted": 568, "failed": 1}),
        (lambda rows: rows.drop_columns(["mean_area"]), "the rows have no column mean_area"),
        (lambda rows: replaced(rows, pa.array(["a"] * 569)), r"numbers where the rows have mean_area \(string\)"),
    ],
    ids=["empty", "one", "whole numbers", "a null", "missing", "texts"],
)
def test_rows_that_fit_and_rows_that_do_not(server_uri: str, tmp_path: Path, change: Any, told: Any) -> None:
    pin, store = resolve_pin("triage@champion", server_uri, tmp_path / "cache"), Store(str(tmp_path / "store"))
    batch = land(store, [change(models.cancer_rows())])
    with open_engine(pin, cache.fetch(pin, tmp_path / "cache"), "cpu") as engine:
        if isinstance(told, str):
            with pytest.raises(SignatureError, match=told):
                infer(batch, pin, store, engine, pipeline="p")
        else:
            assert infer(batch, pin, store, engine, pipeline="p").counts == told


def replaced(rows: pa.Table, values: pa.Array) -> pa.Table:
    return rows.set_column(rows.column_names.index("mean_area"), "mean_area", values)


def test_a_model_without_fixed_sizes_takes_the_columns_of_its_signature(server_uri: str, tmp_path: Path) -> None:
    sizes = onnx.helper.make_tensor_value_info("X", onnx.TensorProto.FLOAT, ["rows", "columns"])
    total = onnx.helper.make_tensor_value_info("total", onnx.TensorProto.FLOAT, ["rows", 1])
    axes = onnx.numpy_helper.from_array(np.array([1]), "axes")
    node = onnx.helper.make_node("ReduceSum", ["X", "axes"], ["total"])
    graph = onnx.helper.make_graph([node], "total", [sizes], [total], [axes])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    mlflow.set_tracking_uri(server_uri)
    mlflow.set_registry_uri(server_uri)
    log_onnx("dynamic", signature=infer_signature(FRAME[["mean_area", "mean_radius"]]), metadata={}, onnx_model=model)
    pin = resolve_pin("dynamic/1", server_uri, tmp_path)
    with open_engine(pin, cache.fetch(pin, tmp_path), "cpu") as engine:
        said = engine.predict(models.cancer_rows(), 64)["prediction"].to_numpy()
    assert np.allclose(said, FRAME["mean_area"] + FRAME["mean_radius"])


# --- who signed it ---


def test_a_version_signed_by_the_tool_is_taken_and_others_are_not(server_uri: str, tmp_path: Path) -> None:
    team, intruder = Signer(tmp_path, "team"), Signer(tmp_path, "intruder")
    assert sign("triage/1", server_uri, team.private) == "triage version 1"
    signed = resolve_pin("triage@champion", server_uri, tmp_path / "cache", Trust(signed_by=team.public))
    assert signed == resolve_pin("triage@champion", server_uri, tmp_path / "cache"), "the signature changes no bytes"
    with pytest.raises(ModelTrustError, match="triage version 1 is not taken.*does not hold"):
        resolve_pin("triage@champion", server_uri, tmp_path / "other", Trust(signed_by=intruder.public))
    with pytest.raises(ModelTrustError, match="triage version 2 is not signed"):
        resolve_pin("triage@challenger", server_uri, tmp_path / "other", Trust(signed_by=team.public))
    assert not list((tmp_path / "other").iterdir()), "what is not trusted is not kept"


def test_a_byte_changed_after_the_signature_is_noticed_when_pinned(database_uri: str, tmp_path: Path) -> None:
    mlflow.set_tracking_uri(database_uri)
    mlflow.set_registry_uri(database_uri)
    log_onnx("forged")
    team = Signer(tmp_path, "team")
    sign("forged/1", database_uri, team.private)
    change_artifacts(database_uri, "forged", lambda folder: flip_a_byte(folder / "model.onnx"))
    with pytest.raises(ModelTrustError, match="does not hold: .*Hash mismatch for 'model.onnx'"):
        resolve_pin("forged/1", database_uri, tmp_path / "cache", Trust(signed_by=team.public))


# --- bytes that changed ---


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda folder: flip_a_byte(folder / "model.onnx"), "model.onnx has other bytes"),
        (lambda folder: (folder / "extra.bin").write_bytes(b"x"), "extra.bin was not pinned"),
        (lambda folder: (folder / "conda.yaml").unlink(), "conda.yaml is missing"),
    ],
    ids=["changed", "added", "removed"],
)
def test_files_changed_under_a_version_stop_the_run_before_the_first_row(
    database_uri: str, tmp_path: Path, edit: Callable[[Path], None], said: str
) -> None:
    mlflow.set_tracking_uri(database_uri)
    mlflow.set_registry_uri(database_uri)
    name = f"tampered-{said.split(maxsplit=1)[0]}"
    log_onnx(name)
    pin = resolve_pin(f"{name}/1", database_uri, tmp_path / "one")
    change_artifacts(database_uri, name, edit)
    with pytest.raises(ModelPinError, match=f"no longer what this run pinned.*{said}") as caught:
        cache.fetch(pin, tmp_path / "two", database_uri)
    assert caught.value.differences == [said]
    assert not list((tmp_path / "two").iterdir()), "nothing of it may lie where it could be opened"


def test_a_spoilt_cache_is_downloaded_again(uri: str, tmp_path: Path) -> None:
    pin = resolve_pin("triage@champion", uri, tmp_path)
    folder = cache.folder_of(pin.digest, tmp_path)
    (folder / "model.onnx").write_bytes((folder / "model.onnx").read_bytes()[:-1])
    assert cache.differences(cache.fetch(pin, tmp_path, uri), pin.files) == []


# --- a registry that is down, hangs, or wants another login ---


def test_nobody_listening_is_told_at_once(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(RegistryUnavailableError, match=r"nobody answers at http://127.0.0.1:9"):
        resolve_pin("triage@champion", "http://someone:secret@127.0.0.1:9", tmp_path)
    assert time.monotonic() - started < 30


@pytest.mark.slow
def test_a_registry_that_hangs_is_given_up(
    mlflow_process: MlflowServer, server_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    retries, seconds = (int(_PATIENCE[f"MLFLOW_HTTP_REQUEST_{name}"]) for name in ("MAX_RETRIES", "TIMEOUT"))
    assert (1 + retries) * seconds <= 20, "what the pages promise"
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")  # the site's own setting goes before ours
    pin = resolve_pin("triage@champion", server_uri, tmp_path / "one")
    mlflow_process.pause()
    for ask in (
        lambda: resolve_pin("triage@champion", server_uri, tmp_path / "two"),
        lambda: cache.fetch(pin, tmp_path / "two", server_uri),
    ):
        started = time.monotonic()
        with pytest.raises(RegistryUnavailableError, match="did not answer as it should"):
            ask()
        assert time.monotonic() - started < 45
    assert cache.fetch(pin, tmp_path / "one", server_uri).is_dir(), "who has the files needs no registry"
    mlflow_process.resume()
    assert cache.fetch(pin, tmp_path / "two", server_uri).is_dir()


def test_a_registry_that_dies_in_the_middle_of_a_download_is_given_up(
    tcp_proxy: Callable[[str, int], Any], server_uri: str, tmp_path: Path
) -> None:
    parts = urlsplit(server_uri)
    proxy = tcp_proxy(str(parts.hostname), int(parts.port or 0))
    pin = resolve_pin("triage@champion", f"http://{proxy.address}", tmp_path / "one")
    proxy.delay(0.5)
    threading.Timer(0.7, proxy.close).start()
    started = time.monotonic()
    with pytest.raises(RegistryUnavailableError):
        cache.fetch(pin, tmp_path / "two", f"http://{proxy.address}")
    assert time.monotonic() - started < 90
    assert not list((tmp_path / "two").iterdir())


@pytest.mark.parametrize("byte_count", [100, 1500, 9000])
def test_a_download_that_is_cut_leaves_nothing_or_the_whole(
    tcp_proxy: Callable[[str, int], Any], server_uri: str, tmp_path: Path, byte_count: int
) -> None:
    pin, parts = resolve_pin("triage@champion", server_uri, tmp_path / "one"), urlsplit(server_uri)
    proxy = tcp_proxy(str(parts.hostname), int(parts.port or 0))
    proxy.cut_after(byte_count)
    try:
        folder = cache.fetch(pin, tmp_path / "two", f"http://{proxy.address}")  # MLflow may have asked again
        assert cache.hash_files(folder) == pin.files
    except RegistryUnavailableError:
        assert not [path for path in (tmp_path / "two").iterdir() if not path.name.startswith(".")]
        proxy.heal()
        assert cache.fetch(pin, tmp_path / "two", f"http://{proxy.address}").is_dir(), "the retry has it"


def test_no_password_gets_into_pins_or_messages(server_uri: str, tmp_path: Path) -> None:
    parts = urlsplit(server_uri)
    uri = f"http://someone:s%40cret@{parts.netloc}"
    pin = resolve_pin("triage@champion", uri, tmp_path)
    assert pin.registry == server_uri
    assert "cret" not in json.dumps(pin.to_dict())
    assert "MLFLOW_TRACKING_PASSWORD" not in os.environ
    with pytest.raises(ModelPinError) as caught:
        resolve_pin("absent@champion", uri, tmp_path)
    assert "cret" not in str(caught.value) and "cret" not in probe_registry(uri)


def test_a_login_that_is_refused_is_no_outage(httpserver: Any, tmp_path: Path) -> None:
    httpserver.expect_request("/").respond_with_data("")
    for method in ("GET", "POST"):
        httpserver.expect_request(
            "/api/2.0/mlflow/registered-models/get", method=method, headers={"Authorization": "Basic dTpw"}
        ).respond_with_json({"error_code": "PERMISSION_DENIED", "message": "no"}, status=403)
    address = httpserver.url_for("").removeprefix("http://").rstrip("/")
    with pytest.raises(ConnectionConfigError, match="refuses this login \\(403\\)") as caught:
        resolve_pin("triage@champion", f"http://u:p@{address}", tmp_path)
    assert "u:p" not in str(caught.value)


def test_a_database_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(ConnectionConfigError, match="no such file"):
        resolve_pin("triage@champion", f"sqlite:///{tmp_path}/typo.db", tmp_path / "cache")
    assert not (tmp_path / "typo.db").exists()


def test_a_registry_of_files_works_where_mlflow_still_opens_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"file://{tmp_path}/registry"
    with pytest.raises(ConnectionConfigError, match="MLFLOW_ALLOW_FILE_STORE"):
        resolve_pin("triage@champion", uri, tmp_path / "cache")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    fill(uri)
    pin = resolve_pin("triage@champion", uri, tmp_path / "cache")
    assert pin.version == "1" and cache.fetch(pin, tmp_path / "other", uri).is_dir()


def test_the_probe_names_the_models(uri: str) -> None:
    assert probe_registry(uri).startswith(f"{uri} answers, its registered models: ")


def test_a_pin_leaves_no_settings_behind(database_uri: str, tmp_path: Path) -> None:
    before = dict(os.environ)
    resolve_pin("triage@champion", database_uri, tmp_path)
    assert dict(os.environ) == before
    shutil.rmtree(tmp_path)
