"""One real schema registry (Apicurio, spoken to by Confluent's REST API), its schemas in memory.

Invariants: schemas last as long as the process: kill() and restart() give an empty registry on the same port.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.servers.process import Server, ServerFailedError, ServerProcess, free_port

_TOOL = Path(__file__).resolve().parents[2] / "tools" / "registry_app.sh"
_TYPE = "application/vnd.schemaregistry.v1+json"


class SchemaRegistryServer(Server):
    """Start a registry on a free port; close() ends it."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/apis/ccompat/v7"
        app = _app()
        (jar,) = app.glob("apicurio-registry-app-*-runner.jar")
        folder = Path(tempfile.mkdtemp(prefix="registry-"))
        bind = ["-Dquarkus.http.host=127.0.0.1", f"-Dquarkus.http.port={self.port}"]
        process = ServerProcess(
            ["java", "-Xmx400m", f"-Djava.io.tmpdir={folder}", *bind, "-jar", str(jar)],
            log=folder / "server.out",
            ready=lambda _: self._answers(),
        )
        super().__init__(folder, process)

    def register(
        self,
        subject: str,
        schema: str | Mapping[str, Any],
        schema_type: str = "AVRO",
        references: Sequence[Mapping[str, Any]] = (),
    ) -> int:
        """Register a schema under a subject and return its id."""
        return register(self.url, subject, schema, schema_type, references)

    def set_compatibility(self, subject: str, level: str) -> None:
        """Set a subject's rule: ``BACKWARD``, ``NONE`` …"""
        _ask(self.url, "PUT", f"/config/{subject}", {"compatibility": level})

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/subjects", timeout=2) as answer:
            return bool(answer.status == 200)
        return False


def register(
    url: str,
    subject: str,
    schema: str | Mapping[str, Any],
    schema_type: str = "AVRO",
    references: Sequence[Mapping[str, Any]] = (),
) -> int:
    """Register a schema with the registry at a URL and return its id."""
    text = schema if isinstance(schema, str) else json.dumps(schema)
    body = {"schema": text, "schemaType": schema_type, "references": list(references)}
    return int(_ask(url, "POST", f"/subjects/{subject}/versions", body)["id"])


def _ask(url: str, method: str, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": _TYPE}, method=method)
    with urllib.request.urlopen(request, timeout=30) as answer:
        found: dict[str, Any] = json.load(answer)
        return found


def _app() -> Path:
    try:
        done = subprocess.run(["bash", str(_TOOL)], capture_output=True, text=True, timeout=900, check=False)
    except FileNotFoundError as error:
        raise ServerFailedError("bash is not installed: run  make test  or tools/system_packages.sh") from error
    if done.returncode != 0:
        raise ServerFailedError(f"{_TOOL.name} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return Path(done.stdout.split()[-1])
