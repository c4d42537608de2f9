"""Airflow connection → the model registry's address."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from airflow.sdk import BaseHook

from airflow_ai_provider.connection import find_connection
from airflow_ai_provider.errors import ConnectionConfigError


class MlflowRegistryHook(BaseHook):
    """Name the MLflow registry of a connection.

    Host (with ``http://`` or ``https://``, or scheme in *schema*) and port of the tracking server, or extra
    ``tracking_uri`` for one without a server (``sqlite:////data/mlflow.db``). Login and password are sent as basic
    authentication.

    :param mlflow_conn_id: connection of type ``mlflow``.
    """

    conn_name_attr = "mlflow_conn_id"
    default_conn_name = "mlflow_default"
    conn_type = "mlflow"
    hook_name = "MLflow registry"

    def __init__(self, mlflow_conn_id: str = default_conn_name, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.mlflow_conn_id = mlflow_conn_id

    def tracking_uri(self) -> str:
        """Return the tracking URI, with credentials when the connection has them.

        :raises ConnectionConfigError: when the connection is missing or names no server; a retry does not help.
        """
        connection = find_connection(self.mlflow_conn_id, self.conn_type)
        if connection is None:
            raise AssertionError("find_connection returns None for an embedded default only")
        if uri := connection.extra_dejson.get("tracking_uri"):
            return str(uri)
        if not connection.host:
            raise ConnectionConfigError(
                f"connection {self.mlflow_conn_id!r} names no server. Set host (http://mlflow:5000) "
                "or extra 'tracking_uri' (sqlite:////data/mlflow.db).",
                conn_id=self.mlflow_conn_id,
            )
        scheme, _, host = connection.host.rpartition("://")
        login = (
            f"{quote(connection.login, safe='')}:{quote(connection.password or '', safe='')}@"
            if connection.login
            else ""
        )
        port = f":{connection.port}" if connection.port else ""
        return f"{scheme or connection.schema or 'http'}://{login}{host}{port}"

    def test_connection(self) -> tuple[bool, str]:
        """Ask the registry for a model."""
        try:
            from airflow_ai_provider.core.infer.pin import probe_registry

            return True, probe_registry(self.tracking_uri())
        except Exception as error:  # the UI shows whatever went wrong
            return False, str(error)
