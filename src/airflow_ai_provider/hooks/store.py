"""Airflow connection → the store that keeps batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseHook

from airflow_ai_provider.connection import find_connection, home
from airflow_ai_provider.errors import ConnectionConfigError

if TYPE_CHECKING:
    from airflow_ai_provider.core.store import Store


class StoreHook(BaseHook):
    """Open the store at a connection's URI.

    Extras: ``uri`` (``file:///data/ai``, ``s3://bucket/prefix``), ``endpoint_url`` for an S3 API of your own; login and
    password are the access key and its secret. Without the default connection, batches go to
    ``$AIRFLOW_HOME/ai_provider/store``, which suits one machine.

    :param ai_store_conn_id: connection of type ``ai_store``.
    """

    conn_name_attr = "ai_store_conn_id"
    default_conn_name = "ai_store_default"
    conn_type = "ai_store"
    hook_name = "AI batch store"

    def __init__(self, ai_store_conn_id: str = default_conn_name, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ai_store_conn_id = ai_store_conn_id

    def get_store(self) -> Store:
        """Open the store.

        :raises ConnectionConfigError: when the connection is missing or has no ``uri``; a retry does not help.
        """
        from airflow_ai_provider.core.store import Store

        connection = find_connection(self.ai_store_conn_id, self.conn_type, default=self.default_conn_name)
        if connection is None:
            return Store(f"file://{home()}/store")
        extra = connection.extra_dejson
        uri = extra.get("uri")
        if not uri:
            raise ConnectionConfigError(
                f"connection {self.ai_store_conn_id!r} has no 'uri' in its extras. "
                "Set it to where batches shall lie, for example file:///data/ai or s3://bucket/ai.",
                conn_id=self.ai_store_conn_id,
            )
        options = {"key": connection.login, "secret": connection.password, "endpoint_url": extra.get("endpoint_url")}
        return Store(uri, {k: v for k, v in options.items() if v})

    def test_connection(self) -> tuple[bool, str]:
        """Write and read a few bytes."""
        try:
            store = self.get_store()
            store.write_bytes(".connection-test", b"ok")
            return store.read_bytes(".connection-test") == b"ok", f"wrote and read back at {store.root}"
        except Exception as error:  # the UI shows whatever went wrong
            return False, str(error)
