"""Airflow connection → an engine on a model server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseHook

from airflow_ai_provider.connection import address_of, authorization_of, demand_host, find_connection
from airflow_ai_provider.errors import ConnectionConfigError, SpecError

if TYPE_CHECKING:
    from airflow_ai_provider.core.batch import Pin
    from airflow_ai_provider.core.infer.remote.endpoint import RemoteEndpoint
    from airflow_ai_provider.core.infer.remote.engine import RemoteEngine


class ModelServerHook(BaseHook):
    """Predict with a model on the server of a connection.

    Host (with ``http://`` or ``https://`` and a path if need be, or scheme in *schema*) and port; login and password
    are sent as basic authentication, password alone as a bearer token. Extras: ``protocol`` (``oip``, the default:
    Triton, KServe, MLServer; ``mlflow``; ``torchserve``; ``tensorflow``), ``model`` and ``version`` where the server
    names them otherwise than the registry, ``outputs`` (names, with commas between), ``timeout_s`` (per request,
    default 30), ``patience_s`` (over all tries of one, default 120), ``in_flight`` (requests at a time, default 8),
    ``headers`` (an object).

    :param ai_model_server_conn_id: connection of type ``ai_model_server``.
    """

    conn_name_attr = "ai_model_server_conn_id"
    default_conn_name = "ai_model_server_default"
    conn_type = "ai_model_server"
    hook_name = "AI model server"

    def __init__(self, ai_model_server_conn_id: str = default_conn_name, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ai_model_server_conn_id = ai_model_server_conn_id

    def open_engine(self, pin: Pin, device: str = "auto") -> RemoteEngine:
        """Meet the server and prove, where its protocol can, that it serves the pinned version.

        :raises ConnectionConfigError: when the connection is missing or wrong; a retry does not help.
        :raises DeviceError: ``require_cuda`` cannot be proved of a server; a retry does not help.
        """
        from airflow_ai_provider.core.infer.remote.client import open_remote

        endpoint, headers = self._read()
        return open_remote(pin, endpoint, headers, device)

    def test_connection(self) -> tuple[bool, str]:
        """Ask the server whether it is ready; every HTTP answer counts."""
        try:
            from airflow_ai_provider.core.infer.remote.client import probe_server

            return True, probe_server(*self._read())
        except Exception as error:  # the UI shows whatever went wrong
            return False, str(error)

    def _read(self) -> tuple[RemoteEndpoint, dict[str, str]]:
        from airflow_ai_provider.core.infer.remote.endpoint import RemoteEndpoint

        connection = demand_host(
            find_connection(self.ai_model_server_conn_id, self.conn_type),
            self.ai_model_server_conn_id,
            "the model server's address (http://triton:8000)",
        )
        extra = dict(connection.extra_dejson)
        headers = {str(name): str(value) for name, value in (extra.pop("headers", None) or {}).items()}
        headers |= authorization_of(connection)
        url = address_of(connection)
        try:
            return RemoteEndpoint.from_dict({"protocol": "oip", **_given(extra), "url": url}), headers
        except SpecError as error:
            raise ConnectionConfigError(
                f"connection {self.ai_model_server_conn_id!r}: {error}", conn_id=self.ai_model_server_conn_id
            ) from None


def _given(extra: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in extra.items() if value not in (None, "")}
