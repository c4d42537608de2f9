"""Look an Airflow connection up, read address and login from it, and say what to do when it is not there."""

from __future__ import annotations

import os
from base64 import b64encode
from pathlib import Path

from airflow.sdk import BaseHook, Connection
from airflow.sdk.exceptions import AirflowNotFoundException

from airflow_ai_provider.errors import ConnectionConfigError


def find_connection(conn_id: str, conn_type: str, *, default: str = "") -> Connection | None:
    """Return a connection, or None when the one that may be missing is missing.

    :param conn_id: the connection asked for.
    :param conn_type: its type, for the message.
    :param default: the id that has an embedded default and so may be missing; empty when none may.
    :raises ConnectionConfigError: when it is missing; a retry does not help.
    """
    try:
        return BaseHook.get_connection(conn_id)
    except AirflowNotFoundException as error:
        if conn_id == default:
            return None
        raise ConnectionConfigError(
            f"connection {conn_id!r} is not defined. Add it in the UI (Admin → Connections) or with: "
            f"airflow connections add {conn_id} --conn-type {conn_type} …",
            conn_id=conn_id,
        ) from error


def demand_host(connection: Connection | None, conn_id: str, whose: str) -> Connection:
    """Return a connection that names a host.

    :param conn_id: the connection asked for.
    :param whose: what the host is, with an example, for the message.
    :raises ConnectionConfigError: when it names none; a retry does not help.
    """
    if connection is None or not connection.host:
        raise ConnectionConfigError(f"connection {conn_id!r} names no host. Set host to {whose}.", conn_id=conn_id)
    return connection


def address_of(connection: Connection, login: str = "") -> str:
    """Return the URL of a connection: scheme before the host, else in *schema*, else http; a path may follow the host.

    :param login: put before the host, with its ``@``.
    """
    scheme, _, place = str(connection.host).rpartition("://")
    host, slash, path = place.partition("/")
    port = f":{connection.port}" if connection.port else ""
    return f"{scheme or connection.schema or 'http'}://{login}{host}{port}{slash}{path}"


def authorization_of(connection: Connection) -> dict[str, str]:
    """Return the HTTP header of a connection's secret: basic for login and password, bearer for a password alone."""
    if connection.login:
        token = b64encode(f"{connection.login}:{connection.password or ''}".encode()).decode()
        return {"Authorization": f"Basic {token}"}
    return {"Authorization": f"Bearer {connection.password}"} if connection.password else {}


def home() -> str:
    """Return the folder of the embedded defaults, ``$AIRFLOW_HOME/ai_provider``."""
    # Airflow's own rule: no setting says where its home is, and the dags folder may be a read-only checkout elsewhere.
    return str(Path(os.environ.get("AIRFLOW_HOME") or "~/airflow").expanduser() / "ai_provider")


def model_cache() -> str:
    """Return where this machine keeps model files, by digest: what is configured, else below :func:`home`."""
    from airflow.sdk.configuration import conf

    return conf.get("ai_provider", "model_cache_folder", fallback="") or f"{home()}/models"
