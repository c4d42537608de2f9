"""One real PostgreSQL server; each fresh_url() is a new, empty database in it.

Invariants: fsync stays on, so that tests of durability mean what they say; the data survive kill() and restart().
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import psycopg

from tests.servers.process import Server, ServerFailedError, ServerProcess, free_port


class PostgresServer(Server):
    """Start a server on a free port; close() ends it and removes its data. Root runs it as user postgres."""

    def __init__(self) -> None:
        user = "postgres" if os.geteuid() == 0 else None
        folder = Path(tempfile.mkdtemp(prefix="postgres-"))
        if user:
            shutil.chown(folder, user, user)
        self.port = free_port()
        self._numbers = itertools.count(1)
        # --no-sync skips only the flush of the empty cluster; the server itself runs with fsync on
        options = ["-A", "trust", "-U", "postgres", "-E", "UTF8", "--no-sync"]
        _answer([_binary("initdb"), "-D", str(folder / "data"), *options], folder, user)
        server = ServerProcess(
            [
                _binary("postgres"),
                *("-D", str(folder / "data"), "-p", str(self.port)),
                *("-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={folder}"),
                # after a kill, one call instead of an fsync of each of 1,000 files: a minute on a busy disk
                *("-c", "recovery_init_sync_method=syncfs"),
            ],
            log=folder / "server.out",
            ready=lambda _: self._answers(),
            stop_signal=signal.SIGINT,  # fast shutdown: SIGTERM would wait for every client to leave
            user=user,
        )
        super().__init__(folder, server)

    def url(self, database: str = "postgres") -> str:
        return f"postgresql+psycopg://postgres@127.0.0.1:{self.port}/{database}"

    def fresh_url(self) -> str:
        """The SQLAlchemy URL of a new, empty database."""
        name = f"fresh_{next(self._numbers)}"
        with self._connect() as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def _connect(self) -> psycopg.Connection:
        return psycopg.connect(
            host="127.0.0.1", port=self.port, user="postgres", dbname="postgres", autocommit=True, connect_timeout=30
        )

    def _answers(self) -> bool:
        try:
            self._connect().close()
        except psycopg.OperationalError:
            return False
        return True


def _answer(command: list[str], folder: Path, user: str | None) -> None:
    groups: list[str] | None = [] if user else None
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=folder,
        user=user,
        group=user,
        extra_groups=groups,
    )
    if done.returncode != 0:
        raise ServerFailedError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")


def _binary(name: str) -> str:
    """Debian keeps the server's programs off PATH, in one folder per major version: the newest wins."""
    versions = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: int(path.parts[-3]))
    found = str(versions[-1]) if versions else shutil.which(name)
    if not found:
        raise ServerFailedError(f"PostgreSQL's {name} is not installed: run  tools/system_packages.sh")
    return found
