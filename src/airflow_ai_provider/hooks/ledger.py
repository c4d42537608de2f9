"""Airflow connection → the ledger."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from airflow.sdk import BaseHook

from airflow_ai_provider.connection import find_connection, home
from airflow_ai_provider.errors import ConnectionConfigError

if TYPE_CHECKING:
    from airflow_ai_provider.core.ledger import Ledger


class LedgerHook(BaseHook):
    """Open the ledger at a connection's database.

    Either extra ``url`` (any SQLAlchemy URL), or host, port, schema, login and password of a PostgreSQL database.
    Without the default connection, the ledger is SQLite at ``$AIRFLOW_HOME/ai_provider/ledger.db``, which suits one
    machine; use PostgreSQL as soon as tasks run on several.

    :param ai_ledger_conn_id: connection of type ``ai_ledger``.
    """

    conn_name_attr = "ai_ledger_conn_id"
    default_conn_name = "ai_ledger_default"
    conn_type = "ai_ledger"
    hook_name = "AI ledger"

    def __init__(self, ai_ledger_conn_id: str = default_conn_name, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ai_ledger_conn_id = ai_ledger_conn_id

    def get_ledger(self) -> Ledger:
        """Open the ledger, making its tables where they are missing.

        :raises ConnectionConfigError: when the connection says neither ``url`` nor host; a retry does not help.
        :raises LedgerUnavailableError: when the database does not answer; a retry may help.
        """
        from airflow_ai_provider.core.ledger_sql import open_ledger

        return open_ledger(self._url())

    def _url(self) -> str:
        connection = find_connection(self.ai_ledger_conn_id, self.conn_type, default=self.default_conn_name)
        if connection is None:
            Path(home()).mkdir(parents=True, exist_ok=True)
            return f"sqlite:///{home()}/ledger.db"
        if url := connection.extra_dejson.get("url"):
            return str(url)
        if not connection.host:
            raise ConnectionConfigError(
                f"connection {self.ai_ledger_conn_id!r} names no database. Set extra 'url' "
                "(postgresql+psycopg://user:password@host/database), or host, schema, login and password.",
                conn_id=self.ai_ledger_conn_id,
            )
        login = f"{quote(connection.login or '', safe='')}:{quote(connection.password or '', safe='')}@"
        port = f":{connection.port}" if connection.port else ""
        return f"postgresql+psycopg://{login if connection.login else ''}{connection.host}{port}/{connection.schema}"

    def test_connection(self) -> tuple[bool, str]:
        """Open the database and look something up."""
        try:
            self.get_ledger().look_up("connection-test")
            return True, "the ledger answers"
        except Exception as error:  # the UI shows whatever went wrong
            return False, str(error)
