"""Airflow connection → the model registry's address."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from airflow.sdk import BaseHook

from airflow_ai_provider.connection import address_of, find_connection
from airflow_ai_provider.errors import ConnectionConfigError

if TYPE_CHECKING:
    from airflow.sdk import Connection

    from airflow_ai_provider.core.infer.pin import MlflowRegistry


class MlflowRegistryHook(BaseHook):
    """Name the MLflow registry of a connection.

    Host (with ``http://`` or ``https://``, or scheme in *schema*) and port of the tracking server, or extra
    ``tracking_uri`` for one without a server (``sqlite:////data/mlflow.db``). Login and password are sent as basic
    authentication. Extras: ``ui_url`` (where people open MLflow, when it is not the host), ``allow_pickle`` (models
    that may be unpickled, with commas between), ``signed_by`` (PEM file, or its text: every model pinned through this
    connection must be signed by this key or authority).

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
        connection = self._connection()
        if uri := connection.extra_dejson.get("tracking_uri"):
            return str(uri)
        if not connection.host:
            raise ConnectionConfigError(
                f"connection {self.mlflow_conn_id!r} names no server. Set host (http://mlflow:5000) "
                "or extra 'tracking_uri' (sqlite:////data/mlflow.db).",
                conn_id=self.mlflow_conn_id,
            )
        login, password = (quote(text or "", safe="") for text in (connection.login, connection.password))
        return address_of(connection, f"{login}:{password}@" if login else "")

    def get_registry(
        self, cache_dir: str, allow_pickle: Sequence[str] = (), served: bool = False, signed_by: str | None = None
    ) -> MlflowRegistry:
        """Return the registry, with what of it may be opened: what the task says, and what the connection says.

        :param cache_dir: where this machine keeps model files.
        :param allow_pickle: beside those of the connection.
        :param served: its models run on a model server and are not opened here.
        :param signed_by: PEM file or text; None takes the connection's.
        :raises ConnectionConfigError: as :meth:`tracking_uri`; or there is no such key file.
        """
        from airflow_ai_provider.core.infer.pin import MlflowRegistry
        from airflow_ai_provider.core.infer.trust import Trust

        extra = self._connection().extra_dejson
        named = [name.strip() for name in str(extra.get("allow_pickle") or "").split(",") if name.strip()]
        key = self._key(str(signed_by or extra.get("signed_by") or ""))
        trust = Trust(frozenset([*allow_pickle, *named]), served, key)
        return MlflowRegistry(self.tracking_uri(), cache_dir, trust)

    def ui_link(self, name: str, version: str) -> str:
        """Return where people see a model version; empty when the registry has no UI.

        :param name: registered model.
        """
        connection = self._connection()
        address = str(connection.extra_dejson.get("ui_url") or "")
        if not address:
            uri = self.tracking_uri()
            address = uri if uri.startswith(("http://", "https://")) else ""
        scheme, _, place = address.rpartition("://")
        host, slash, path = place.partition("/")
        bare = f"{scheme}://{host.rpartition('@')[2]}{slash}{path}".rstrip("/")
        return f"{bare}/#/models/{quote(name, safe='')}/versions/{version}" if address else ""

    def _connection(self) -> Connection:
        connection = find_connection(self.mlflow_conn_id, self.conn_type)
        if connection is None:
            raise AssertionError("find_connection returns None for an embedded default only")
        return connection

    def _key(self, signed_by: str) -> str:
        if not signed_by or "-----BEGIN" in signed_by:
            return signed_by
        try:
            return Path(signed_by).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConnectionConfigError(
                f"the key {signed_by!r} that models must be signed by cannot be read: {error}. Put the PEM file on "
                f"every worker, or its text into extra 'signed_by' of connection {self.mlflow_conn_id!r}.",
                conn_id=self.mlflow_conn_id,
            ) from error

    def test_connection(self) -> tuple[bool, str]:
        """Ask the registry for a model."""
        try:
            from airflow_ai_provider.core.infer.pin import probe_registry

            return True, probe_registry(self.tracking_uri())
        except Exception as error:  # the UI shows whatever went wrong
            return False, str(error)
