"""The second door to MLflow: what changes a registry. A pin only reads; here versions are made and aliases moved.

Invariants: a version is registered with its tags in one call, so that a retry finds it; no existing version is changed;
no alias is moved but the one asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import mlflow
import onnx
from mlflow import MlflowClient
from mlflow.models import Model

from airflow_ai_provider.core.batch import Pin


class RegistryWriter:
    """Register versions and move aliases.

    Every method raises RegistryUnavailableError when the registry does not answer; a retry may help.

    :param tracking_uri: as :func:`~airflow_ai_provider.core.infer.pin.resolve_pin` takes it.
    """

    def __init__(self, tracking_uri: str) -> None:
        self._uri = tracking_uri

    def _asking(self) -> AbstractContextManager[MlflowClient]:
        from airflow_ai_provider.core.infer.pin import asking

        return asking(self._uri)

    def aliases(self, name: str) -> dict[str, str]:
        """Return alias → version of a registered model."""
        from airflow_ai_provider.core.infer.pin import MlflowRegistry

        return MlflowRegistry(self._uri, "").aliases(name)

    def set_alias(self, name: str, alias: str, version: str) -> None:
        """Let an alias point to a version."""
        with self._asking() as client:
            client.set_registered_model_alias(name, alias, version)

    def find(self, name: str, tags: Mapping[str, str]) -> str | None:
        """Return the newest version of a model that carries all these tags; None when there is none."""
        with self._asking() as client:
            quote = '"' if "'" in name else "'"
            found = [
                int(version.version)
                for version in client.search_model_versions(f"name={quote}{name}{quote}")
                if tags.items() <= dict(version.tags).items()
            ]
        return str(max(found)) if found else None

    def register_onnx(
        self, source: Pin, folder: Path, path: Path, *, tags: Mapping[str, str], metadata: Mapping[str, Any]
    ) -> str:
        """Register an ONNX file as a new version of a model.

        :param source: the version that it was made of; its files lie in ``folder``, and its signature is taken over.
        :param path: the new file.
        :param tags: of the new version.
        :param metadata: of the new version, in place of the source's.
        :return: the new version. No alias points to it.
        """
        with self._asking() as client:
            original = Model.load(str(folder))
            needs = folder / "requirements.txt"
            mlflow.set_tracking_uri(client.tracking_uri)
            mlflow.set_registry_uri(client.tracking_uri)
            with mlflow.start_run(experiment_id=_experiment(client, source), run_name=f"made of {source.version}"):
                logged = mlflow.onnx.log_model(
                    onnx.load(str(path)),
                    name="model",
                    signature=original.signature,
                    metadata=dict(metadata),
                    pip_requirements=str(needs) if needs.is_file() and needs.stat().st_size else [],
                )
            made = client.create_model_version(
                source.name, logged.model_uri, logged.run_id, tags=dict(tags), model_id=logged.model_id
            )
        return str(made.version)


def _experiment(client: MlflowClient, source: Pin) -> str:
    """The experiment of the run that made the source; the default one when that run is gone."""
    run_id = client.get_model_version(source.name, source.version).run_id
    try:
        return str(client.get_run(run_id).info.experiment_id) if run_id else "0"
    except mlflow.exceptions.MlflowException:
        return "0"
