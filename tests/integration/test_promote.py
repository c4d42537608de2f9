"""Quantise and promote as operators, against a real MLflow server; the fake registry is held to the same behaviour."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import numpy as np
import onnx
import pyarrow as pa
import pytest
from mlflow import MlflowClient
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, Schema

from airflow_ai_provider import Gate, PromoteModelOperator, QuantizeModelOperator
from airflow_ai_provider.core.batch import ROW_ID
from airflow_ai_provider.core.infer.pin import resolve_pin
from airflow_ai_provider.core.infer.registry import RegistryWriter
from airflow_ai_provider.core.infer.trial import Aliases, Versions
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.errors import GateFailedError
from airflow_ai_provider.testing import MemoryRegistry
from tests.core.infer import dense
from tests.core.infer.batches import land
from tests.servers.mlflow import MlflowServer

pytestmark = pytest.mark.integration
NAME, COLUMNS = "widths", [f"f{i}" for i in range(12)]


@pytest.fixture(scope="module")
def uri(mlflow_process: MlflowServer) -> str:
    """A registry with three versions of one model; the third predicts the other class."""
    mlflow.set_tracking_uri(mlflow_process.uri)
    mlflow.set_registry_uri(mlflow_process.uri)
    mlflow.set_experiment("promote")  # else the one of another registry, which another module has set
    signature = ModelSignature(Schema([ColSpec("double", name) for name in COLUMNS]), Schema([ColSpec("long")]))
    for seed in (0, 0, 5):
        mlflow.onnx.log_model(
            onnx.load_from_string(dense.dense_onnx([12, 64, 64, 2], seed=seed)),
            name="model",
            registered_model_name=NAME,
            signature=signature,
            pip_requirements=[],
            metadata={"classes": ["no", "yes"], "calibration": {"method": "identity"}},
        )
    return mlflow_process.uri


@pytest.fixture(autouse=True)
def champion_is_the_first(uri: str) -> None:
    MlflowClient(uri, uri).set_registered_model_alias(NAME, "champion", "1")


@pytest.fixture
def world(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("AIRFLOW_CONN_MLFLOW_DEFAULT", json.dumps({"conn_type": "mlflow", "host": uri}))
    store = {"conn_type": "ai_store", "extra": {"uri": str(tmp_path / "store")}}
    monkeypatch.setenv("AIRFLOW_CONN_AI_STORE_DEFAULT", json.dumps(store))
    ledger = {"conn_type": "ai_ledger", "extra": {"url": f"sqlite:///{tmp_path}/ledger.db"}}
    monkeypatch.setenv("AIRFLOW_CONN_AI_LEDGER_DEFAULT", json.dumps(ledger))
    random = np.random.default_rng(0)
    rows = pa.table({ROW_ID: [f"t/{i}" for i in range(400)], **{name: random.normal(size=400) for name in COLUMNS}})
    return SimpleNamespace(
        uri=uri,
        client=MlflowClient(uri, uri),
        batch=land(Store(str(tmp_path / "store")), [rows]).to_dict(),
        pin=lambda model: resolve_pin(model, uri, tmp_path / "models").to_dict(),
    )


def run(operator: Any, run_id: str = "r1") -> dict[str, Any]:
    task = SimpleNamespace(dag_id="models", task_id=operator.task_id, map_index=-1)
    made: dict[str, Any] = operator.execute(
        {"dag_run": SimpleNamespace(run_id=run_id, run_type="manual", conf={}), "ti": task, "params": {}}
    )
    return made


def test_a_quantised_version_is_registered_once_and_can_be_promoted(world: Any) -> None:
    source = world.pin(f"{NAME}@champion")
    quantise = QuantizeModelOperator(task_id="quantise", model=source, batch=world.batch, gate=Gate(min_agreement=0.9))
    made = run(quantise)
    assert made == run(quantise, "r2"), "a clear, or another run, finds what was registered"
    version = world.client.get_model_version(NAME, made["version"])
    assert version.tags["ai.quantized_from"] == f"{NAME}/1"
    assert made["metadata"] == {"classes": ["no", "yes"]}
    assert made["signature"] == source["signature"]
    assert made["digest"] != source["digest"]
    assert world.client.get_registered_model(NAME).aliases == {"champion": "1"}, "no alias is moved by quantising"

    promote = PromoteModelOperator(
        task_id="promote", champion=source, challenger=made, batch=world.batch, gate={"min_agreement": "0.9"}
    )
    told = run(promote)
    assert (told["moved"], told["to"]) == (True, made["version"])
    assert run(promote) == told, "a clear moves nothing twice"
    assert world.client.get_registered_model(NAME).aliases == {"champion": made["version"]}
    assert Path(told["report"]).is_file()

    assert run(promote, "r2")["moved"] is False, "it is there already"
    back = {**made, "alias": "champion"}
    again = PromoteModelOperator(
        task_id="back",
        champion=back,
        challenger={**source, "alias": ""},
        batch=world.batch,
        gate=Gate(min_agreement=0.9),
    )
    assert run(again)["to"] == "1"
    assert world.client.get_registered_model(NAME).aliases == {"champion": "1"}


def test_a_challenger_that_does_not_pass_moves_nothing_and_says_the_figures(world: Any) -> None:
    promote = PromoteModelOperator(
        task_id="promote",
        champion=world.pin(f"{NAME}@champion"),
        challenger=world.pin(f"{NAME}/3"),
        batch=world.batch,
        gate=Gate(min_agreement=0.99),
    )
    with pytest.raises(GateFailedError, match=f"{NAME}/3 does not pass its gate beside {NAME}/1 on 400 rows"):
        run(promote)
    assert world.client.get_registered_model(NAME).aliases == {"champion": "1"}


@pytest.mark.parametrize("kind", ["real", "memory"])
def test_a_registry_finds_what_it_registered_by_all_its_tags(kind: str, world: Any, tmp_path: Path) -> None:
    name = NAME
    registry: Any = RegistryWriter(world.uri) if kind == "real" else MemoryRegistry({name: {"champion": "1"}})
    holds_aliases: Aliases = registry
    holds_versions: Versions = registry
    source = resolve_pin(f"{name}/2", world.uri, tmp_path / "models")
    folder = tmp_path / "models" / source.digest.removeprefix("sha256:")
    tags = {"mark": kind, "other": "x"}
    assert holds_versions.find(name, tags) is None
    version = holds_versions.register_onnx(
        source, folder, folder / "model.onnx", tags=tags, metadata={"classes": ["a", "b"]}
    )
    assert holds_versions.find(name, tags) == holds_versions.find(name, {"mark": kind}) == version
    assert holds_versions.find(name, {"mark": kind, "other": "y"}) is None
    before = holds_aliases.aliases(name)
    holds_aliases.set_alias(name, f"probe-{kind}", version)
    assert holds_aliases.aliases(name) == {**before, f"probe-{kind}": version}
    if kind == "real":
        world.client.delete_registered_model_alias(name, "probe-real")
