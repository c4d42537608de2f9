"""Infer as operators: pin the model once per run, then predict a batch with exactly that model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseOperator, BaseOperatorLink
from airflow.sdk.execution_time.xcom import XCom

from airflow_ai_provider.errors import SpecError
from airflow_ai_provider.retry import retried
from airflow_ai_provider.run import find_file, run_of

if TYPE_CHECKING:
    from airflow_ai_provider.core.batch import Pin
    from airflow_ai_provider.core.infer.cluster import Job
    from airflow_ai_provider.core.infer.engine import Engine
    from airflow_ai_provider.core.infer.runner import Runner
    from airflow_ai_provider.core.infer.worker import Worker


class ModelVersionLink(BaseOperatorLink):
    """Open the pinned version in MLflow. Without an MLflow server there is nothing to open."""

    key = "model_version_link"
    name = "Model version"

    @property
    def xcom_key(self) -> str:
        """Name the XCom that holds the link."""
        return self.key

    def get_link(self, operator: Any, *, ti_key: Any) -> str:
        """Return what the task has noted; empty when there is no server to open."""
        # what this returns replaces the XCom once the task is done, so it is read back and not left out
        return XCom.get_value(ti_key=ti_key, key=self.key) or ""


class PinModelOperator(BaseOperator):
    """Fix one model for the whole run: an alias becomes a version and the digest of its bytes, once.

    Every later task of the run, on every worker and retry, loads exactly these bytes or fails. Clearing this task in
    the same run returns the same pin, wherever the alias points by then; the ledger keeps the history of pins.

    :param model: ``name@alias`` or ``name/version`` of a registered model. Templated.
    :param model_policy: where an alias is looked up: ``current``, ``as_run`` (what this window was run with), ``as_of``
        (where it pointed when the window ended), or several, tried in order. ``auto`` is ``current``, and in a backfill
        ``as_run, current``. Templated.
    :param allow_pickle: names of models that may be unpickled, which lets their files run code on the workers.
    :param served: the model runs on a model server; its files are pinned, whatever their format, and not opened.
    :param signed_by: PEM file (or its text) of the key or authority that must have signed the model; None takes the
        connection's.
    :param mlflow_conn_id: connection of the MLflow registry.
    :param ledger_conn_id: connection of the ledger.
    :return: the pin (XCom): version, digest of every artifact file, signature.
    :raises ModelPinError: no such model or version, no answer of the policy, not to be trusted; a retry does not help.
    :raises RegistryUnavailableError: the registry does not answer; a retry may help.
    """

    template_fields: Sequence[str] = ("model", "model_policy")
    operator_extra_links = (ModelVersionLink(),)
    ui_color = "#e4dcff"

    def __init__(
        self,
        *,
        model: str,
        model_policy: str | Sequence[str] = "auto",
        allow_pickle: Sequence[str] = (),
        served: bool = False,
        signed_by: str | None = None,
        mlflow_conn_id: str = "mlflow_default",
        ledger_conn_id: str = "ai_ledger_default",
        **kwargs: Any,
    ) -> None:
        super().__init__(**retried(kwargs))
        self.model = model
        self.model_policy = model_policy
        self.allow_pickle = allow_pickle
        self.served = served
        self.signed_by = signed_by
        self.mlflow_conn_id = mlflow_conn_id
        self.ledger_conn_id = ledger_conn_id

    def execute(self, context: Any) -> dict[str, Any]:
        """Choose the version by the policy, unless this run has its pin already."""
        from airflow_ai_provider.core.infer.choose import Asked, choose, read_policies
        from airflow_ai_provider.hooks.ledger import LedgerHook
        from airflow_ai_provider.hooks.mlflow import MlflowRegistryHook

        run, hook = run_of(context), MlflowRegistryHook(self.mlflow_conn_id)
        policies = read_policies(self.model_policy, run.is_backfill)
        at = run.due or datetime.now(UTC)
        asked = Asked(run.pipeline, run.run_id, self.model, policies, run.period, at)
        registry = hook.get_registry(this_worker().cache_dir, self.allow_pickle, self.served, self._key())
        pin, why = choose(asked, LedgerHook(self.ledger_conn_id).get_ledger(), registry)
        self.log.info("%s is version %s, %s, for the whole run: %s", self.model, pin.version, pin.digest[:19], why)
        if link := hook.ui_link(pin.name, pin.version):
            context["ti"].xcom_push(key=ModelVersionLink.key, value=link)
        return pin.to_dict()

    def _key(self) -> str | None:
        is_file = self.signed_by and "-----BEGIN" not in self.signed_by
        return find_file(self.dag, self.signed_by, "keys") if is_file and self.signed_by else self.signed_by


class BatchInferenceOperator(BaseOperator):
    """Predict every row of a batch with the pinned model, each row predicted or failed with its reason.

    The model's bytes are checked against the pin and its device against ``device`` before the first row. A retry goes
    on after the last finished part; the same batch and pin give the same predictions, byte for byte.

    :param batch: reference of the batch (the ingest task's output). Templated.
    :param model: the pin (the pin task's output). Templated.
    :param device: ``auto`` takes a GPU when the engine has one, ``cpu``, ``cuda``; ``require_cuda`` refuses to run on
        anything else. Templated.
    :param runner: how it is predicted: a ``Runner``, or the same as a mapping; None takes its defaults. Templated.
    :param max_failed: share or count of rows that may fail; more fail the task. None sets no limit. Templated.
    :param shard: ``2/4`` predicts the second quarter of the batch's parts only and lands nothing: map the task over
        ``shards(4)`` and land with :class:`GatherPredictionsOperator`. None predicts all. Templated.
    :param mlflow_conn_id: connection of the MLflow registry, for a worker that has not the model's files yet.
    :param store_conn_id: connection of the store.
    :return: reference of the predictions (XCom); with ``shard``, the shard's report.
    :raises ModelPinError: bytes differ from the pin, or the server serves another version; a retry does not help.
    :raises DeviceError: the required device is not what the engine runs on; a retry does not help.
    """

    template_fields: Sequence[str] = ("batch", "model", "device", "runner", "max_failed", "shard")
    ui_color = "#e4dcff"

    def __init__(
        self,
        *,
        batch: Any,
        model: Any,
        device: str = "auto",
        runner: Runner | Mapping[str, Any] | None = None,
        max_failed: float | str | None = None,
        shard: str | None = None,
        mlflow_conn_id: str = "mlflow_default",
        store_conn_id: str = "ai_store_default",
        **kwargs: Any,
    ) -> None:
        super().__init__(**retried(kwargs))
        self.batch = batch
        self.model = model
        self.device = device
        self.runner = runner
        self.max_failed = max_failed
        self.shard = shard
        self.mlflow_conn_id = mlflow_conn_id
        self.store_conn_id = store_conn_id

    def execute(self, context: Any) -> dict[str, Any]:
        """Check the pin, open the engine, predict."""
        from airflow_ai_provider.core.batch import BatchRef, Pin, share_or_count
        from airflow_ai_provider.core.infer.batch_size import SizeMemory
        from airflow_ai_provider.core.infer.cluster import Job
        from airflow_ai_provider.core.infer.flow import infer
        from airflow_ai_provider.core.infer.gather import predict_shard
        from airflow_ai_provider.core.infer.runner import Runner
        from airflow_ai_provider.core.infer.shard import Shard
        from airflow_ai_provider.hooks.store import StoreHook

        batch, pin = BatchRef.from_dict(self.batch), Pin.from_dict(self.model)
        runner = self.runner if isinstance(self.runner, Runner) else Runner.from_dict(self.runner or {})
        store, limit = StoreHook(self.store_conn_id).get_store(), share_or_count(self.max_failed)
        pipeline, worker = run_of(context).pipeline, this_worker()
        if runner.engine != "local":
            return self._spread(Job(batch, pin, store, pipeline, self.device, runner, worker), limit)
        memory, measured = SizeMemory(worker.cache_dir), _gauge_of(pipeline)
        asked: Any = {"pipeline": pipeline, "batch_size": runner.batch_size, "memory": memory, "measured": measured}
        if self.shard:
            _demand_no_limit(limit)
            opened = partial(self._open, pin, runner, context)
            return predict_shard(batch, pin, store, opened, Shard.parse(self.shard), **asked).to_dict()
        with self._open(pin, runner, context) as engine:
            return infer(batch, pin, store, engine, max_failed=limit, **asked).to_dict()

    def _spread(self, job: Job, limit: float | int | None) -> dict[str, Any]:
        """Have a cluster predict, which fetches the model from the registry by itself."""
        from airflow_ai_provider.core.infer.cluster import infer_on_cluster
        from airflow_ai_provider.hooks.mlflow import MlflowRegistryHook

        if self.shard:
            raise SpecError(
                f"shard={self.shard!r} and engine={job.runner.engine!r} both share the batch out. Leave one out.",
                faults=[("shard", "the cluster shares the batch out")],
            )
        registry = MlflowRegistryHook(self.mlflow_conn_id).tracking_uri()
        return infer_on_cluster(replace(job, registry=registry), max_failed=limit).to_dict()

    def _open(self, pin: Pin, runner: Runner, context: Any) -> AbstractContextManager[Engine]:
        """Open the model on this worker, or meet the server that has it."""
        if runner.endpoint:
            from airflow_ai_provider.hooks.model_server import ModelServerHook

            return ModelServerHook(runner.endpoint).open_engine(pin, self.device)
        from airflow_ai_provider.hooks.mlflow import MlflowRegistryHook

        registry, run = MlflowRegistryHook(self.mlflow_conn_id).tracking_uri, run_of(context)
        owner = f"{run.pipeline}/{run.task_key}"
        return this_worker().engine(pin, self.device, registry, tuning=runner.tuning, owner=owner)


class GatherPredictionsOperator(BaseOperator):
    """Land what mapped :class:`BatchInferenceOperator` tasks predicted, as the one batch that one task would have made.

    Every stored part is proved against its mark first; no model is loaded, so any worker can do it. A retry or clear
    lands the same bytes.

    :param batch: reference of the batch that the shards read (the ingest task's output). Templated.
    :param model: the pin that they used (the pin task's output). Templated.
    :param shards: their outputs (``scored.output`` of the mapped task). Templated.
    :param max_failed: share or count of rows of the whole batch that may fail. None sets no limit. Templated.
    :param store_conn_id: connection of the store.
    :return: reference of the predictions (XCom).
    :raises SpecError: a shard is missing or of another batch; a retry does not help.
    :raises DeviceError: the shards ran on unlike devices; a retry does not help.
    :raises CorruptBatchError: a part is not as its shard left it: clear the shards; a retry does not help.
    """

    template_fields: Sequence[str] = ("batch", "model", "shards", "max_failed")
    ui_color = "#e4dcff"

    def __init__(
        self,
        *,
        batch: Any,
        model: Any,
        shards: Any,
        max_failed: float | str | None = None,
        store_conn_id: str = "ai_store_default",
        **kwargs: Any,
    ) -> None:
        super().__init__(**retried(kwargs))
        self.batch = batch
        self.model = model
        self.shards = shards
        self.max_failed = max_failed
        self.store_conn_id = store_conn_id

    def execute(self, context: Any) -> dict[str, Any]:
        """Prove the parts, land the batch."""
        from airflow_ai_provider.core.batch import BatchRef, Pin, share_or_count
        from airflow_ai_provider.core.infer.gather import ShardReport, gather
        from airflow_ai_provider.hooks.store import StoreHook

        return gather(
            BatchRef.from_dict(self.batch),
            Pin.from_dict(self.model),
            StoreHook(self.store_conn_id).get_store(),
            [ShardReport.from_dict(report) for report in self.shards],
            pipeline=run_of(context).pipeline,
            max_failed=share_or_count(self.max_failed),
        ).to_dict()


def _gauge_of(pipeline: str) -> Callable[[str, float], None]:
    """Return what passes numbers of a running prediction on to who collects Airflow's metrics."""
    from airflow.sdk.observability import stats

    return lambda name, value: stats.gauge(f"ai_provider.infer.{name}", value, tags={"pipeline": pipeline})


def _demand_no_limit(limit: float | int | None) -> None:
    if limit is not None:
        raise SpecError(
            f"max_failed={limit} was given to a shard, which knows only its own rows. Give it to "
            "GatherPredictionsOperator, which judges the whole batch.",
            faults=[("max_failed", "a shard knows only its own rows")],
        )


def this_worker() -> Worker:
    """Return where this machine keeps models and locks of GPUs, as Airflow's configuration says."""
    import tempfile

    from airflow.sdk.configuration import conf

    from airflow_ai_provider.connection import model_cache
    from airflow_ai_provider.core.infer.worker import Worker

    return Worker(
        cache_dir=model_cache(),
        cache_gb=conf.getfloat("ai_provider", "model_cache_gb", fallback=20.0),
        lease_dir=conf.get("ai_provider", "gpu_lock_folder", fallback="")
        or f"{tempfile.gettempdir()}/airflow_ai_provider_gpus",
        patience_s=conf.getfloat("ai_provider", "gpu_patience_s", fallback=3600.0),
    )
