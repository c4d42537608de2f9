"""Fixtures that all tests share: a private Airflow home, and real servers that start when a test first asks.

Invariants: AIRFLOW_HOME is set before anything imports airflow; a test that asks for no server starts none; what a test
did to a shared server (kill, pause) is undone before the next test gets it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import pytest

from tests.servers.process import Server

if TYPE_CHECKING:
    from tests.servers.kafka import KafkaBroker
    from tests.servers.mlflow import MlflowServer
    from tests.servers.postgres import PostgresServer
    from tests.servers.proxy import TcpProxy
    from tests.servers.registry import SchemaRegistryServer
    from tests.servers.s3 import S3Server

with contextlib.suppress(ImportError):  # a GPU machine may have the core alone
    from hypothesis import HealthCheck, settings

    # A machine at work is slow to draw examples: that says nothing about the code.
    settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("shared")

S = TypeVar("S", bound=Server)
_servers: list[Server] = []  # those that run now, shared by the session
_HOME = Path(tempfile.mkdtemp(prefix="airflow-home-"))
os.environ |= {
    "AIRFLOW_HOME": str(_HOME),
    "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
    "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{_HOME}/airflow.db",
    # nothing that the tests start reports to anybody
    "DO_NOT_TRACK": "true",
    "GX_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def pytest_unconfigure() -> None:
    shutil.rmtree(_HOME, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    wants_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if wants_gpu and not _has_gpu():
        for item in wants_gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


def pytest_runtest_setup() -> None:
    for server in _servers:
        server.ensure_running()


def _serve(start: Callable[[], S]) -> Iterator[S]:
    server = start()
    _servers.append(server)
    yield server
    _servers.remove(server)
    server.close()


def _has_gpu() -> bool:
    tool = shutil.which("nvidia-smi")
    return tool is not None and subprocess.run([tool, "-L"], capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="module", autouse=True)
def mlflow_forgets() -> Iterator[None]:
    """MLflow keeps the addresses that a module set, for this process and its children: not for the next module."""
    yield
    mlflow = sys.modules.get("mlflow")
    if mlflow is not None:
        mlflow.set_tracking_uri("")
        mlflow.set_registry_uri("")
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "MLFLOW_EXPERIMENT_ID"):
        os.environ.pop(name, None)


@pytest.fixture(scope="session")
def airflow_db() -> None:
    """Airflow's own SQLite database in the private home, migrated once."""
    subprocess.run(
        [sys.executable, "-m", "airflow", "db", "migrate"], check=True, capture_output=True, text=True, timeout=240
    )


@pytest.fixture(scope="session")
def kafka_broker() -> Iterator[KafkaBroker]:
    """A real broker: bootstrap, create_topic, kill, pause, resume, restart."""
    from tests.servers.kafka import KafkaBroker

    yield from _serve(KafkaBroker)


@pytest.fixture(scope="session")
def mock_kafka() -> Iterator[str]:
    """Bootstrap address of librdkafka's in-process cluster, held by a process of its own."""
    from tests.servers.mock_kafka import mock_cluster

    with mock_cluster() as address:
        yield address


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A real PostgreSQL: port, url, fresh_url, kill, pause, resume, restart."""
    from tests.servers.postgres import PostgresServer

    yield from _serve(PostgresServer)


@pytest.fixture(scope="session")
def fresh_postgres_url(postgres_server: PostgresServer) -> Callable[[], str]:
    """Makes a new, empty database at each call and gives its SQLAlchemy URL."""
    return postgres_server.fresh_url


@pytest.fixture
def postgres_url(fresh_postgres_url: Callable[[], str]) -> str:
    """SQLAlchemy URL of an empty database that is this test's alone."""
    return fresh_postgres_url()


@pytest.fixture(scope="session")
def schema_registry() -> Iterator[SchemaRegistryServer]:
    """A real schema registry: url, register, set_compatibility, kill, pause, resume, restart (which empties it)."""
    from tests.servers.registry import SchemaRegistryServer

    yield from _serve(SchemaRegistryServer)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A real S3 API: options, bucket, port, kill, pause, resume, restart (which empties it)."""
    from tests.servers.s3 import S3Server

    yield from _serve(S3Server)


@pytest.fixture(scope="session")
def mlflow_process() -> Iterator[MlflowServer]:
    """A real MLflow server: uri, kill, pause, resume, restart."""
    from tests.servers.mlflow import MlflowServer

    yield from _serve(MlflowServer)


@pytest.fixture
def mlflow_server(mlflow_process: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> MlflowServer:
    """The same server, with MLFLOW_TRACKING_URI pointing at it for this test."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_process.uri)
    return mlflow_process


@pytest.fixture
def tcp_proxy() -> Iterator[Callable[[str, int], TcpProxy]]:
    """Makes a fault proxy in front of a host and port."""
    from tests.servers.proxy import TcpProxy

    proxies: list[TcpProxy] = []

    def make(host: str, port: int) -> TcpProxy:
        proxies.append(TcpProxy(host, port))
        return proxies[-1]

    yield make
    for proxy in proxies:
        proxy.close()
