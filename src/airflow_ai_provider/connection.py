"""Look an Airflow connection up, and say what to do when it is not there."""

from __future__ import annotations

from airflow.sdk import BaseHook, Connection, conf
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


def home() -> str:
    """Return the folder of the embedded defaults, ``<folder of airflow.cfg>/ai_provider``."""
    return f"{conf.get('core', 'dags_folder').rpartition('/')[0]}/ai_provider"
