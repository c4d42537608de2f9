"""Airflow connection → a sender of HTTP actions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseHook

from airflow_ai_provider.connection import address_of, authorization_of, demand_host, find_connection

if TYPE_CHECKING:
    from airflow_ai_provider.core.act.http import HttpSender


class ApiHook(BaseHook):
    """Open a sender to the HTTP API of a connection.

    Host (with ``http://`` or ``https://``, or scheme in *schema*) and port; login and password are sent as basic
    authentication, password alone as a bearer token. Extras: ``headers`` (an object), ``timeout_s`` (per request,
    default 30), ``patience_s`` (how long a receiver that is away is tried again, default 60), ``in_flight`` (requests
    at a time, default 64).

    :param ai_api_conn_id: connection of type ``ai_api``.
    """

    conn_name_attr = "ai_api_conn_id"
    default_conn_name = "ai_api_default"
    conn_type = "ai_api"
    hook_name = "AI action API"

    def __init__(self, ai_api_conn_id: str = default_conn_name, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ai_api_conn_id = ai_api_conn_id

    def get_sender(self) -> HttpSender:
        """Open the sender; nothing is sent yet.

        :raises ConnectionConfigError: when the connection is missing or names no host; a retry does not help.
        """
        from airflow_ai_provider.core.act.http import HttpSender

        connection = find_connection(self.ai_api_conn_id, self.conn_type)
        connection = demand_host(connection, self.ai_api_conn_id, "the API's address (http://tickets:8000)")
        extra = connection.extra_dejson
        headers = {str(name): str(value) for name, value in (extra.get("headers") or {}).items()}
        return HttpSender(
            address_of(connection),
            headers=headers | authorization_of(connection),
            timeout_s=float(extra.get("timeout_s") or 30),
            patience_s=float(extra.get("patience_s") or 60),
            in_flight=int(extra.get("in_flight") or 64),
        )

    def test_connection(self) -> tuple[bool, str]:
        """Ask the API's address for anything; every HTTP answer counts."""
        try:
            return True, self.get_sender().probe()
        except Exception as error:  # the UI shows whatever went wrong
            return False, str(error)
