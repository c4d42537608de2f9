"""Quantise and promote with a registry in memory: gates, retries, two at once, killed at every step."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import pytest

from airflow_ai_provider.core.batch import ROW_ID, BatchRef, Pin
from airflow_ai_provider.core.infer.compare import Gate
from airflow_ai_provider.core.infer.trial import Move, move_alias, promote, quantized_version
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.errors import GateFailedError, IdempotencyConflictError, ModelPinError, SpecError
from airflow_ai_provider.testing import MemoryLedger, MemoryRegistry
from tests.core.infer import models
from tests.core.infer.batches import PIN, land

CHAMPION = replace(PIN, alias="champion")
CHALLENGER = replace(PIN, version="2", digest="sha256:" + "2" * 64)
THIRD = replace(PIN, version="3", digest="sha256:" + "3" * 64)


Dense = tuple[Pin, Path, BatchRef]


class KilledError(Exception):
    """Stands for a kill: nothing catches it."""


def moved(
    registry: MemoryRegistry, ledger: MemoryLedger, to: Pin = CHALLENGER, run: str = "r1", old: Pin = CHAMPION
) -> dict[str, object]:
    return move_alias(registry, ledger, Move("champion", old, to, run, "orders-1"))


# --- moving an alias ---


def test_an_alias_is_moved_once_and_a_retry_returns_the_move() -> None:
    calls: list[int] = []
    registry = MemoryRegistry({"sum": {"champion": "1"}}, lambda: calls.append(1))
    ledger = MemoryLedger()
    first = moved(registry, ledger)
    assert first == {"moved": True, "from": "1", "to": "2"}
    assert moved(registry, ledger) == first
    assert registry.aliases("sum") == {"champion": "2"}
    assert len(calls) == 1
    assert [seen.version for seen in ledger.alias_history("", "sum", "champion")] == ["2"]


def test_an_alias_that_somebody_moved_stays_where_it_is() -> None:
    registry, ledger = MemoryRegistry({"sum": {"champion": "7"}}), MemoryLedger()
    with pytest.raises(ModelPinError, match="points to version 7, and the trial was held against version 1"):
        moved(registry, ledger)
    assert registry.aliases("sum") == {"champion": "7"}


def test_of_two_promotions_at_once_one_is_refused_and_says_whose_turn_it_is() -> None:
    ledger = MemoryLedger()

    def other() -> None:
        with pytest.raises(IdempotencyConflictError, match="by another run"):
            moved(MemoryRegistry({"sum": {"champion": "1"}}), ledger, THIRD, "r2")

    registry = MemoryRegistry({"sum": {"champion": "1"}}, other)
    moved(registry, ledger)
    assert registry.aliases("sum") == {"champion": "2"}
    with pytest.raises(ModelPinError, match="points to version 2"):
        moved(registry, ledger, THIRD, "r2")


def test_an_alias_can_go_there_and_back_again() -> None:
    registry, ledger = MemoryRegistry({"sum": {"champion": "1"}}), MemoryLedger()
    for number in range(3):
        moved(registry, ledger, CHALLENGER, f"up-{number}")
        moved(registry, ledger, CHAMPION, f"down-{number}", old=CHALLENGER)
    assert registry.aliases("sum") == {"champion": "1"}
    assert len(ledger.entries("models:sum")) == 6


@pytest.mark.parametrize("step", ["reserve", "sent", "aliases", "set_alias", "saw_aliases", "record"])
@pytest.mark.parametrize("after", [False, True])
def test_a_kill_at_any_step_costs_nothing(step: str, after: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    registry, ledger = MemoryRegistry({"sum": {"champion": "1"}}), MemoryLedger()
    owner = registry if hasattr(registry, step) else ledger
    real: Callable[..., object] = getattr(owner, step)

    def killed(*arguments: object) -> object:
        if after:
            real(*arguments)
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(owner, step, killed)
        with pytest.raises(KilledError):
            moved(registry, ledger)
    assert moved(registry, ledger)["to"] == "2"
    assert registry.aliases("sum") == {"champion": "2"}
    assert [entry.state for entry in ledger.entries("models:sum")] == ["done"]


# --- trials ---


def quantised(dense: Dense, store: Store, registry: MemoryRegistry, method: str, gate: Gate) -> str:
    pin, folder, batch = dense
    return quantized_version(pin, folder, batch, store, registry, method=method, gate=gate, pipeline="p")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


@pytest.fixture
def dense(tmp_path: Path, store: Store) -> Dense:
    """A dense net, its files, and a batch whose label is what the net itself says."""
    folder = tmp_path / "dense"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(models.dense_onnx([12, 64, 64, 3]))
    names = [f"f{i}" for i in range(12)]
    pin = models.pin_folder(
        folder, "onnx", models.columns_signature(names), classes=["a", "b", "c"], calibration={"method": "identity"}
    )
    random = np.random.default_rng(1)
    table = pa.table({ROW_ID: [f"t/{i}" for i in range(600)], **{name: random.normal(size=600) for name in names}})
    return pin, folder, land(store, [table.slice(0, 400), table.slice(400)])


@pytest.mark.parametrize("method", ["dynamic", "static"])
def test_a_quantised_version_is_registered_once_with_its_figures(method: str, dense: Dense, store: Store) -> None:
    folder = dense[1]
    registry = MemoryRegistry({"dense": {}})
    gate = Gate(min_agreement=0.9)
    before = (folder / "model.onnx").read_bytes()
    version = quantised(dense, store, registry, method, gate)
    again = quantised(dense, store, registry, method, gate)
    (made,) = registry.registered["dense"]
    assert version == again == made["version"] == "2"
    assert made["metadata"] == {"classes": ["a", "b", "c"]}, "the calibration of other weights does not hold"
    assert made["tags"]["ai.quantized_from"] == "dense/1"
    assert float(made["tags"]["ai.agreement"]) >= 0.9
    kinds = {node.op_type for node in onnx.load_from_string(made["bytes"]).graph.node}
    assert kinds & {"MatMulInteger", "DynamicQuantizeLinear", "QuantizeLinear", "QLinearMatMul"}
    assert (folder / "model.onnx").read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == ["model.onnx"]


def test_a_quantised_model_that_differs_too_much_is_not_registered(dense: Dense, store: Store) -> None:
    registry = MemoryRegistry({"dense": {}})
    with pytest.raises(GateFailedError, match="speedup .* at least 999") as caught:
        quantised(dense, store, registry, "dynamic", Gate(min_speedup=999))
    assert registry.registered == {}
    assert caught.value.comparison["row_count"] == 600


def test_a_model_without_anything_to_quantise_is_refused(store: Store) -> None:
    pin, folder = models.cancer_onnx()
    batch = land(store, [models.cancer_rows()])
    with pytest.raises(SpecError, match="found nothing to quantise"):
        quantised((pin, folder, batch), store, MemoryRegistry({}), "dynamic", Gate(min_agreement=0.9))


@pytest.mark.parametrize(
    ("method", "flavor", "text"), [("int4", "onnx", "none of dynamic"), ("dynamic", "torch", "not onnx")]
)
def test_what_cannot_be_quantised_is_said(method: str, flavor: str, text: str, dense: Dense, store: Store) -> None:
    pin, folder, batch = dense
    with pytest.raises(SpecError, match=text):
        quantised(
            (replace(pin, flavor=flavor), folder, batch), store, MemoryRegistry({}), method, Gate(min_agreement=0.9)
        )


def test_an_empty_reference_batch_is_refused(dense: Dense, store: Store) -> None:
    pin, folder, _ = dense
    empty = land(store, [], "nothing-1")
    with pytest.raises(SpecError, match="is empty"):
        quantised((pin, folder, empty), store, MemoryRegistry({}), "static", Gate(min_agreement=0.9))


def test_a_better_challenger_takes_the_alias_and_a_report_says_why(dense: Dense, store: Store, tmp_path: Path) -> None:
    pin, folder, batch = dense
    other = tmp_path / "other" / "dense"
    other.mkdir(parents=True)
    (other / "model.onnx").write_bytes(models.dense_onnx([12, 64, 64, 3], seed=9))
    rival = replace(models.pin_folder(other, "onnx", pin.signature, **pin.metadata), version="2")
    champion, registry, ledger = (
        replace(pin, alias="champion"),
        MemoryRegistry({"dense": {"champion": "1"}}),
        MemoryLedger(),
    )
    given: dict[str, Any] = {
        **{"batch": batch, "device": "cpu", "store": store, "ledger": ledger, "registry": registry},
        **{"pipeline": "p", "run_id": "r1"},
    }
    with pytest.raises(GateFailedError, match="agreement"):
        promote((champion, folder), (rival, other), gate=Gate(min_agreement=0.99), **given)
    assert registry.aliases("dense") == {"champion": "1"}
    assert ledger.entries("models:dense") == []

    told = promote((champion, folder), (rival, other), gate=Gate(min_agreement=0), **given)
    assert registry.aliases("dense") == {"champion": "2"}
    assert (told["moved"], told["from"], told["to"]) == (True, "1", "2")
    report = Path(str(told["report"]))
    assert "agreement" in report.read_text()
    assert json.loads(report.with_suffix(".json").read_text())["alias"] == "champion"
    assert json.loads(json.dumps(told)) == told


def test_only_an_alias_of_the_same_model_can_be_moved(dense: Dense, store: Store) -> None:
    pin, folder, batch = dense
    given: dict[str, Any] = {
        **{"batch": batch, "device": "cpu", "store": store, "ledger": MemoryLedger(), "registry": MemoryRegistry({})},
        **{"pipeline": "p", "run_id": "r1", "gate": Gate(min_agreement=0.5)},
    }
    with pytest.raises(SpecError, match="pinned without an alias"):
        promote((pin, folder), (replace(pin, version="2"), folder), **given)
    with pytest.raises(SpecError, match="two models"):
        promote((replace(pin, alias="champion"), folder), (replace(pin, name="other"), folder), **given)
