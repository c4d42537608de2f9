"""The ledger's database, opened: SQLite (the default) or PostgreSQL by URL.

Invariants: what is opened is durable: every commit is on disk before it returns; a URL that names no durable database
is refused without quoting it, password and all; with ``ledger_sql.py`` the door to SQLAlchemy.
"""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from airflow_ai_provider.core.ledger_schema import WRITE
from airflow_ai_provider.errors import ConnectionConfigError, LedgerUnavailableError, MissingExtraError

_LOCK_TIMEOUT_S = 30


def open_engine(url: str) -> sa.Engine:
    """Open a database.

    :param url: ``sqlite:////data/ledger.db`` or ``postgresql://user:password@host/database``.
    :raises ConnectionConfigError: when the URL names no durable database that is supported; a retry does not help.
    :raises MissingExtraError: when the driver is not installed; a retry does not help.
    """
    try:
        parsed = sa.make_url(url)
        if parsed.drivername == "postgresql":  # SQLAlchemy would take psycopg2
            parsed = parsed.set(drivername="postgresql+psycopg")
        backend, keeps = parsed.get_backend_name(), parsed.database not in (None, "", ":memory:")
        if backend == "sqlite" and keeps:
            return _open_sqlite(parsed)
        if backend == "postgresql":
            wait = {"connect_timeout": 10}
            return sa.create_engine(parsed, hide_parameters=True, pool_pre_ping=True, connect_args=wait)
    except (ArgumentError, NoSuchModuleError, ValueError):
        pass  # its text quotes the URL, password and all
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"the ledger on PostgreSQL needs {error.name}: pip install 'airflow-ai-provider[postgres]'."
        ) from error
    raise ConnectionConfigError(
        "the ledger's database URL names no database that it can keep its promises on. Give a SQLite file "
        "(sqlite:////path/ledger.db) or PostgreSQL (postgresql://user@host/database) in the ai_ledger connection."
    )


def _open_sqlite(url: sa.URL) -> sa.Engine:
    folder = Path(str(url.database)).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LedgerUnavailableError(
            f"the ledger's folder {folder} cannot be made: {error}. Make it writable, or name another in ai_ledger."
        ) from error
    engine = sa.create_engine(url, hide_parameters=True, connect_args={"timeout": _LOCK_TIMEOUT_S})
    sa.event.listen(engine, "connect", _prepare_sqlite)
    sa.event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # we begin transactions ourselves, see _begin_sqlite
    _write_ahead(connection)
    connection.execute("PRAGMA synchronous=FULL")  # WAL's default loses the last commits with the power
    connection.execute("PRAGMA wal_autocheckpoint=4000")  # pages; a copy to the file per 16 MB, not per 4
    connection.execute("PRAGMA foreign_keys=ON")


def _write_ahead(connection: Any) -> None:
    """Have readers (the UI) not wait for writers. Of those who open a new file at once, SQLite refuses all but one,
    without waiting; what the one has set is for all."""
    deadline = time.monotonic() + _LOCK_TIMEOUT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
        time.sleep(0.01)


def _begin_sqlite(connection: sa.Connection) -> None:
    # A transaction that reads first and writes later would fail at once with "locked" when another has written.
    write = connection.get_execution_options().get(WRITE)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
