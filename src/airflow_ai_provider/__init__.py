"""Validated ingestion, pinned inference, decisions by confidence and actions with undo, for Apache Airflow.

The public face, loaded lazily (PEP 562): importing the package loads no operator, no model library, no table library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_FACE = {
    "ApiActionOperator": "operators.act",
    "BatchInferenceOperator": "operators.infer",
    "CompensateOperator": "operators.act",
    "ConfidenceBranchOperator": "operators.decide",
    "GatherPredictionsOperator": "operators.infer",
    "IngestShardOperator": "operators.shard",
    "LandBatchOperator": "operators.shard",
    "PinModelOperator": "operators.infer",
    "PlanIngestOperator": "operators.shard",
    "ReplayQuarantineOperator": "operators.ingest",
    "ReviewOperator": "operators.decide",
    "ValidatedIngestOperator": "operators.ingest",
    "FindBatchesOperator": "operators.batch",
    "PromoteModelOperator": "operators.model",
    "QuantizeModelOperator": "operators.model",
    "Fallback": "core.decide.policy",
    "Gate": "core.infer.compare",
    "FileSource": "core.ingest.source",
    "KafkaSink": "core.ingest.sink",
    "KafkaSource": "core.ingest.source",
    "Limits": "core.ingest.limit",
    "Policy": "core.decide.policy",
    "Runner": "core.infer.runner",
    "Undo": "core.act.value",
    "build_dag": "dag_factory",
    "load_pipelines": "dag_factory",
    "on_model": "schedule",
    "on_topic": "schedule",
    "errors": "errors",
    "placement": "place",
    "shards": "core.infer.shard",
}

__all__ = ["__version__", *_FACE]  # noqa: PLE0604 - the names are those of _FACE, each resolved by __getattr__

if TYPE_CHECKING:
    from airflow_ai_provider import errors as errors
    from airflow_ai_provider.core.act.value import Undo as Undo
    from airflow_ai_provider.core.decide.policy import Fallback as Fallback
    from airflow_ai_provider.core.decide.policy import Policy as Policy
    from airflow_ai_provider.core.infer.compare import Gate as Gate
    from airflow_ai_provider.core.infer.runner import Runner as Runner
    from airflow_ai_provider.core.infer.shard import shards as shards
    from airflow_ai_provider.core.ingest.limit import Limits as Limits
    from airflow_ai_provider.core.ingest.sink import KafkaSink as KafkaSink
    from airflow_ai_provider.core.ingest.source import FileSource as FileSource
    from airflow_ai_provider.core.ingest.source import KafkaSource as KafkaSource
    from airflow_ai_provider.dag_factory import build_dag as build_dag
    from airflow_ai_provider.dag_factory import load_pipelines as load_pipelines
    from airflow_ai_provider.operators.act import ApiActionOperator as ApiActionOperator
    from airflow_ai_provider.operators.act import CompensateOperator as CompensateOperator
    from airflow_ai_provider.operators.batch import FindBatchesOperator as FindBatchesOperator
    from airflow_ai_provider.operators.decide import ConfidenceBranchOperator as ConfidenceBranchOperator
    from airflow_ai_provider.operators.decide import ReviewOperator as ReviewOperator
    from airflow_ai_provider.operators.infer import BatchInferenceOperator as BatchInferenceOperator
    from airflow_ai_provider.operators.infer import GatherPredictionsOperator as GatherPredictionsOperator
    from airflow_ai_provider.operators.infer import PinModelOperator as PinModelOperator
    from airflow_ai_provider.operators.ingest import ReplayQuarantineOperator as ReplayQuarantineOperator
    from airflow_ai_provider.operators.ingest import ValidatedIngestOperator as ValidatedIngestOperator
    from airflow_ai_provider.operators.model import PromoteModelOperator as PromoteModelOperator
    from airflow_ai_provider.operators.model import QuantizeModelOperator as QuantizeModelOperator
    from airflow_ai_provider.operators.shard import IngestShardOperator as IngestShardOperator
    from airflow_ai_provider.operators.shard import LandBatchOperator as LandBatchOperator
    from airflow_ai_provider.operators.shard import PlanIngestOperator as PlanIngestOperator
    from airflow_ai_provider.place import placement as placement
    from airflow_ai_provider.schedule import on_model as on_model
    from airflow_ai_provider.schedule import on_topic as on_topic


def __getattr__(name: str) -> Any:
    if name not in _FACE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_FACE[name]}")
    value = module if name == "errors" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
