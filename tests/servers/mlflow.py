"""One real MLflow tracking server: runs and registry in SQLite, artifacts through the server's own proxy."""

from __future__ import annotations

import shutil
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

from tests.servers.process import Server, ServerProcess, free_port


class MlflowServer(Server):
    """Start a server on a free port; close() ends it and removes its data."""

    def __init__(self) -> None:
        folder = Path(tempfile.mkdtemp(prefix="mlflow-"))
        port = free_port()
        self.uri = f"http://127.0.0.1:{port}"
        server = ServerProcess(
            [
                *(sys.executable, "-m", "mlflow", "server"),
                *("--backend-store-uri", f"sqlite:///{folder}/mlflow.db"),
                *("--artifacts-destination", str(folder / "artifacts")),
                *("--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
            ],
            log=folder / "server.out",
            ready=lambda _: self._healthy(),  # it creates its tables first, which a busy machine makes long
            env={"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},  # else it starts a queue consumer of its own
        )
        super().__init__(folder, server)
        self._empty = folder / "empty.db"
        shutil.copy(folder / "mlflow.db", self._empty)

    def fresh_database(self, folder: Path) -> str:
        """Put a database without models into a folder (making its tables takes MLflow twenty seconds): its URI."""
        shutil.copy(self._empty, folder / "mlflow.db")
        return f"sqlite:///{folder}/mlflow.db"

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError):
            return False
