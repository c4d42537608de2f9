"""Models as operators: make a smaller one, and let a better one take over, each only through a gate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseOperator

from airflow_ai_provider.connection import model_cache
from airflow_ai_provider.core.batch import Pin
from airflow_ai_provider.core.infer.compare import Gate
from airflow_ai_provider.retry import RETRY_POLICY
from airflow_ai_provider.run import run_of

if TYPE_CHECKING:
    from pathlib import Path


class QuantizeModelOperator(BaseOperator):
    """Register a new version of an ONNX model with weights of eight bits, if it does as well on a reference batch.

    Both versions predict the batch and a gate compares them. The new version gets the source's signature and classes,
    tags that name the source and the figures, and no alias; its calibration is left out, for confidence changes with
    the weights. A retry or clear finds the version that was registered and makes no second one.

    :param model: the pin of the source (the pin task's output). Templated.
    :param batch: reference of the batch to compare on. Templated.
    :param method: ``dynamic`` (dense nets and transformers) or ``static`` (convolutions too; takes ranges of the
        activations from the batch). Templated.
    :param gate: what the new version must reach; None asks for an agreement of 0.99. Templated.
    :param mlflow_conn_id: connection of the MLflow registry.
    :param store_conn_id: connection of the store.
    :return: the pin of the new version (XCom).
    :raises GateFailedError: it does not do as well; a retry does not help.
    :raises SpecError: the model is not ONNX, or nothing in it can be quantised; a retry does not help.
    """

    template_fields: Sequence[str] = ("model", "batch", "method", "gate")
    ui_color = "#e4dcff"

    def __init__(
        self,
        *,
        model: Any,
        batch: Any,
        method: str = "dynamic",
        gate: Gate | Mapping[str, Any] | None = None,
        mlflow_conn_id: str = "mlflow_default",
        store_conn_id: str = "ai_store_default",
        **kwargs: Any,
    ) -> None:
        super().__init__(**{"retry_policy": RETRY_POLICY, **kwargs})
        self.model = model
        self.batch = batch
        self.method = method
        self.gate = gate
        self.mlflow_conn_id = mlflow_conn_id
        self.store_conn_id = store_conn_id

    def execute(self, context: Any) -> dict[str, Any]:
        """Quantise, compare, register."""
        from airflow_ai_provider.core.batch import BatchRef
        from airflow_ai_provider.core.infer.pin import resolve_pin
        from airflow_ai_provider.core.infer.registry import RegistryWriter
        from airflow_ai_provider.core.infer.trial import quantized_version
        from airflow_ai_provider.hooks.mlflow import MlflowRegistryHook
        from airflow_ai_provider.hooks.store import StoreHook

        pin, uri = Pin.from_dict(self.model), MlflowRegistryHook(self.mlflow_conn_id).tracking_uri()
        version = quantized_version(
            pin,
            _fetch(pin, uri),
            BatchRef.from_dict(self.batch),
            StoreHook(self.store_conn_id).get_store(),
            RegistryWriter(uri),
            method=self.method,
            gate=_gate(self.gate) or Gate(min_agreement=0.99),
            pipeline=run_of(context).pipeline,
        )
        return resolve_pin(f"{pin.name}/{version}", uri, model_cache()).to_dict()


class PromoteModelOperator(BaseOperator):
    """Let an alias point to a challenger, if it does better than the champion on the same batch.

    Both predict the batch, a gate compares them, and the alias moves from the champion's version to the challenger's:
    compare and set, guarded by the ledger. Nothing moves when the gate fails, or when somebody moved the alias
    meanwhile. A retry or clear of a promotion that was made returns it. To move back, promote the other way round.

    :param champion: the pin of the alias (the pin task's output for ``name@alias``). Templated.
    :param challenger: the pin of another version of the same model. Templated.
    :param batch: reference of the batch to compare on. Templated.
    :param gate: what the challenger must reach. Templated.
    :param device: ``auto``, ``cpu``, ``cuda`` or ``require_cuda``, as for inference. Templated.
    :param mlflow_conn_id: connection of the MLflow registry.
    :param store_conn_id: connection of the store, which takes the report.
    :param ledger_conn_id: connection of the ledger.
    :return: ``moved``, ``from``, ``to``, ``comparison`` and the ``report``'s URI (XCom).
    :raises GateFailedError: the challenger does not pass; a retry does not help.
    :raises ModelPinError: the alias points to another version than the champion's; a retry does not help.
    """

    template_fields: Sequence[str] = ("champion", "challenger", "batch", "gate", "device")
    ui_color = "#e4dcff"

    def __init__(
        self,
        *,
        champion: Any,
        challenger: Any,
        batch: Any,
        gate: Gate | Mapping[str, Any],
        device: str = "auto",
        mlflow_conn_id: str = "mlflow_default",
        store_conn_id: str = "ai_store_default",
        ledger_conn_id: str = "ai_ledger_default",
        **kwargs: Any,
    ) -> None:
        super().__init__(**{"retry_policy": RETRY_POLICY, **kwargs})
        self.champion = champion
        self.challenger = challenger
        self.batch = batch
        self.gate = gate
        self.device = device
        self.mlflow_conn_id = mlflow_conn_id
        self.store_conn_id = store_conn_id
        self.ledger_conn_id = ledger_conn_id

    def execute(self, context: Any) -> dict[str, Any]:
        """Compare, then move the alias."""
        from airflow_ai_provider.core.batch import BatchRef
        from airflow_ai_provider.core.infer.registry import RegistryWriter
        from airflow_ai_provider.core.infer.trial import promote
        from airflow_ai_provider.hooks.ledger import LedgerHook
        from airflow_ai_provider.hooks.mlflow import MlflowRegistryHook
        from airflow_ai_provider.hooks.store import StoreHook

        uri, run = MlflowRegistryHook(self.mlflow_conn_id).tracking_uri(), run_of(context)
        pins = [Pin.from_dict(self.champion), Pin.from_dict(self.challenger)]
        return promote(
            *((pin, _fetch(pin, uri)) for pin in pins),
            batch=BatchRef.from_dict(self.batch),
            gate=_gate(self.gate),
            device=self.device,
            store=StoreHook(self.store_conn_id).get_store(),
            ledger=LedgerHook(self.ledger_conn_id).get_ledger(),
            registry=RegistryWriter(uri),
            pipeline=run.pipeline,
            run_id=run.run_id,
        )


def _gate(gate: Gate | Mapping[str, Any] | None) -> Any:
    return Gate.from_dict(gate) if isinstance(gate, Mapping) else gate


def _fetch(pin: Pin, uri: str) -> Path:
    from airflow_ai_provider.core.infer.cache import fetch

    return fetch(pin, model_cache(), uri)
