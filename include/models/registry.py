"""Register a trained model in MLflow once, however often its script runs.

Invariants: a version carries the digest of what was trained as a tag; the same digest is never registered twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def register_once(
    name: str, digest: str, tracking_uri: str, log: Callable[[], Any], *, alias: str, facts: dict[str, Any]
) -> str:
    """Register a model unless it is registered already, and let the alias point at it.

    :param name: registered model.
    :param digest: of all that was trained; becomes the version's tag ``digest``.
    :param tracking_uri: MLflow's address.
    :param log: logs and registers the model within the active MLflow run, and returns MLflow's answer.
    :param alias: moved to this version; empty leaves all aliases alone.
    :param facts: parameters of the training run, shown in MLflow.
    :return: the model version.
    """
    import mlflow

    mlflow.set_tracking_uri(tracking_uri)
    mlflow.set_registry_uri(tracking_uri)  # else one that this process has set before still holds
    client = mlflow.MlflowClient()
    known = [v for v in client.search_model_versions(f"name = '{name}'") if v.tags.get("digest") == digest]
    if known:
        version = str(known[0].version)
    else:
        mlflow.set_experiment(name)
        with mlflow.start_run(run_name=f"train {name}"):
            mlflow.log_params(facts)
            version = str(log().registered_model_version)
        client.set_model_version_tag(name, version, "digest", digest)
    if alias:
        client.set_registered_model_alias(name, alias, version)
    return version
