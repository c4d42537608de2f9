"""Airflow connection → the store that keeps batches, and the keys to the file systems that sources read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from airflow.sdk import BaseHook

from airflow_ai_provider.connection import find_connection, home
from airflow_ai_provider.errors import ConnectionConfigError

if TYPE_CHECKING:
    from airflow.sdk import Connection

    from airflow_ai_provider.core.store import Store


class StoreHook(BaseHook):
    """Open the store at a connection's URI.

    Extras: ``uri`` (``file:///data/ai``, ``s3://bucket/prefix``), ``endpoint_url`` for an S3 API of your own,
    ``timeout_s``, ``options`` (further keyword arguments of the file system); login and password are the access key and
    its secret. Without the default connection, batches go to ``$AIRFLOW_HOME/ai_provider/store``, which suits one
    machine. A source's ``fs_conn_id`` names such a connection too, or one of type ``aws``; its ``uri`` is not read.

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
        uri = connection.extra_dejson.get("uri")
        if not uri:
            raise ConnectionConfigError(
                f"connection {self.ai_store_conn_id!r} has no 'uri' in its extras. "
                "Set it to where batches shall lie, for example file:///data/ai or s3://bucket/ai.",
                conn_id=self.ai_store_conn_id,
            )
        return Store(uri, self._options(connection))

    def get_options(self) -> dict[str, Any]:
        """Return the keyword arguments of the file system, for a source's files.

        :raises ConnectionConfigError: when the connection is missing, or its fields are wrong; a retry does not help.
        """
        connection = find_connection(self.ai_store_conn_id, self.conn_type)
        assert connection is not None  # none may be missing
        return self._options(connection)

    def _options(self, connection: Connection) -> dict[str, Any]:
        extra = connection.extra_dejson
        further, timeout_s = extra.get("options") or {}, extra.get("timeout_s")
        if not isinstance(further, dict):
            self._refuse("options", further, "an object of the file system's keyword arguments")
        if timeout_s is not None and (not isinstance(timeout_s, int | float) or timeout_s <= 0):
            self._refuse("timeout_s", timeout_s, "a number of seconds above 0")
        options = {
            "key": connection.login,
            "secret": connection.password,
            "token": extra.get("aws_session_token"),
            "endpoint_url": extra.get("endpoint_url"),
            "timeout_s": timeout_s,
        }
        if extra.get("region_name"):
            options["client_kwargs"] = {"region_name": extra["region_name"]}
        return {**{k: v for k, v in options.items() if v}, **further}

    def _refuse(self, field: str, value: Any, rule: str) -> NoReturn:
        shown = type(value).__name__ if field == "options" else repr(value)  # what is in it may be secret
        raise ConnectionConfigError(
            f"connection {self.ai_store_conn_id!r} has {field}={shown} in its extras; it must be {rule}. Correct it.",
            conn_id=self.ai_store_conn_id,
        )

    def test_connection(self) -> tuple[bool, str]:
        """Write and read a few bytes."""
        try:
            store = self.get_store()
            store.write_bytes(".connection-test", b"ok")
            return store.read_bytes(".connection-test") == b"ok", f"wrote and read back at {store.root}"
        except Exception as error:  # the UI shows whatever went wrong
            return False, str(error)
