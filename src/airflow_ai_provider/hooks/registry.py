"""Airflow connection → a schema registry."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseHook

from airflow_ai_provider.connection import address_of, authorization_of, demand_host, find_connection

if TYPE_CHECKING:
    from airflow_ai_provider.core.ingest.encoded.registry import SchemaRegistry


class SchemaRegistryHook(BaseHook):
    """Open the schema registry of a connection: any that speaks Confluent's REST API.

    Host (with ``http://`` or ``https://``, or scheme in *schema*; a path such as ``/apis/ccompat/v7`` may follow) and
    port; login and password are sent as basic authentication, password alone as a bearer token. Extra: ``timeout_s``
    (per look-up, retries included; default 10).

    :param schema_registry_conn_id: connection of type ``schema_registry``.
    """

    conn_name_attr = "schema_registry_conn_id"
    default_conn_name = "schema_registry_default"
    conn_type = "schema_registry"
    hook_name = "Schema registry"

    def __init__(self, schema_registry_conn_id: str = default_conn_name, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.schema_registry_conn_id = schema_registry_conn_id

    def get_registry(self, subject: str = "") -> SchemaRegistry:
        """Open the registry; nothing is sent yet.

        :param subject: the subject to name a schema by when it is registered under several (``topic-value``).
        :raises ConnectionConfigError: when the connection is missing or names no host; a retry does not help.
        """
        from airflow_ai_provider.core.ingest.encoded.registry import SchemaRegistry

        connection = demand_host(
            find_connection(self.schema_registry_conn_id, self.conn_type),
            self.schema_registry_conn_id,
            "the registry's address (http://registry:8081, or http://apicurio:8080/apis/ccompat/v7)",
        )
        return SchemaRegistry(
            address_of(connection),
            headers=authorization_of(connection),
            subject=subject,
            timeout_s=float(connection.extra_dejson.get("timeout_s") or 10),
        )

    def test_connection(self) -> tuple[bool, str]:
        """Ask the registry for its subjects."""
        try:
            return True, self.get_registry().probe()
        except Exception as error:  # the UI shows whatever went wrong
            return False, str(error)
