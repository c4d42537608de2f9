"""Each server fixture is the real thing: it answers, and breaks and comes back as the tests of faults need it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import socketserver
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from sqlalchemy import create_engine, text

if TYPE_CHECKING:
    from tests.servers.kafka import KafkaBroker
    from tests.servers.mlflow import MlflowServer
    from tests.servers.postgres import PostgresServer
    from tests.servers.proxy import TcpProxy

pytestmark = pytest.mark.integration


def _produce(bootstrap: str, topic: str, values: list[bytes]) -> None:
    reports: list[object] = []
    producer = Producer({"bootstrap.servers": bootstrap})
    for value in values:
        producer.produce(topic, value, partition=0, on_delivery=lambda error, _: reports.append(error))
    assert producer.flush(30) == 0
    assert reports == [None] * len(values)


def _consume(bootstrap: str, topic: str, count: int) -> list[bytes]:
    consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": uuid.uuid4().hex, "enable.auto.commit": False})
    consumer.assign([TopicPartition(topic, 0, 0)])
    values: list[bytes] = []
    deadline = time.monotonic() + 30
    while len(values) < count and time.monotonic() < deadline:
        for message in consumer.consume(count, 0.5):
            assert message.error() is None
            values.append(message.value() or b"")
    consumer.close()
    return values


def test_the_broker_keeps_what_it_acknowledged_over_a_kill(kafka_broker: KafkaBroker) -> None:
    topic = kafka_broker.create_topic(f"servers-{uuid.uuid4().hex[:8]}", partitions=2)
    _produce(kafka_broker.bootstrap, topic, [b"one", b"two"])
    kafka_broker.kill()
    kafka_broker.restart()
    _produce(kafka_broker.bootstrap, topic, [b"three"])
    assert _consume(kafka_broker.bootstrap, topic, 3) == [b"one", b"two", b"three"]


def test_a_paused_broker_is_silent_until_it_resumes(kafka_broker: KafkaBroker) -> None:
    topic = kafka_broker.create_topic(f"servers-{uuid.uuid4().hex[:8]}")
    reports: list[object] = []
    producer = Producer({"bootstrap.servers": kafka_broker.bootstrap})
    kafka_broker.pause()
    producer.produce(topic, b"late", partition=0, on_delivery=lambda error, _: reports.append(error))
    assert producer.flush(1) == 1
    assert reports == []
    kafka_broker.resume()
    assert producer.flush(30) == 0
    assert reports == [None]


def test_the_in_process_cluster_gives_back_what_was_produced(mock_kafka: str) -> None:
    topic = f"mock-{uuid.uuid4().hex[:8]}"
    _produce(mock_kafka, topic, [b"one", b"two"])
    assert _consume(mock_kafka, topic, 2) == [b"one", b"two"]


def test_each_postgres_database_is_empty_and_outlives_a_kill(
    postgres_server: PostgresServer, fresh_postgres_url: Callable[[], str]
) -> None:
    first, second = fresh_postgres_url(), fresh_postgres_url()
    engine = create_engine(first)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE kept (n int)"))
        connection.execute(text("INSERT INTO kept VALUES (41), (1)"))
    engine.dispose()
    postgres_server.kill()
    postgres_server.restart()
    with engine.connect() as connection:
        assert connection.execute(text("SELECT sum(n) FROM kept")).scalar_one() == 42
        assert connection.execute(text("SHOW fsync")).scalar_one() == "on"
    engine.dispose()
    other = create_engine(second)
    with other.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM pg_tables WHERE tablename = 'kept'")).scalar_one() == 0
    other.dispose()


def _mlflow(uri: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        f"{uri}/api/2.0/mlflow/{path}", data=data, headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return dict(json.load(answer))


def test_the_registry_keeps_a_version_its_alias_and_its_files_over_a_kill(mlflow_server: MlflowServer) -> None:
    uri = mlflow_server.uri
    assert os.environ["MLFLOW_TRACKING_URI"] == uri
    name = f"servers-{uuid.uuid4().hex[:8]}"
    run = _mlflow(uri, "runs/create", {"experiment_id": "0"})["run"]["info"]
    file = f"{uri}/api/2.0/mlflow-artifacts/artifacts/0/{run['run_id']}/artifacts/model/weights"
    assert run["artifact_uri"] == f"mlflow-artifacts:/0/{run['run_id']}/artifacts"
    urllib.request.urlopen(urllib.request.Request(file, data=b"\x01\x02", method="PUT"), timeout=30).close()
    _mlflow(uri, "registered-models/create", {"name": name})
    source = {"name": name, "run_id": run["run_id"], "source": f"{run['artifact_uri']}/model"}
    version = _mlflow(uri, "model-versions/create", source)["model_version"]["version"]
    _mlflow(uri, "registered-models/alias", {"name": name, "alias": "champion", "version": version})
    mlflow_server.kill()
    mlflow_server.restart()
    found = _mlflow(uri, f"registered-models/alias?name={name}&alias=champion")["model_version"]
    assert (found["name"], found["version"], found["run_id"]) == (name, "1", run["run_id"])
    with urllib.request.urlopen(file, timeout=30) as answer:
        assert answer.read() == b"\x01\x02"


class _Shout(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # the proxy's cuts reach this end too
            for line in self.rfile:
                self.wfile.write(line.upper())


class _ShoutServer(socketserver.ThreadingTCPServer):
    daemon_threads = True


@pytest.fixture
def shouting(tcp_proxy: Callable[[str, int], TcpProxy]) -> Iterator[TcpProxy]:
    with _ShoutServer(("127.0.0.1", 0), _Shout) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield tcp_proxy("127.0.0.1", server.server_address[1])
        server.shutdown()


def _connect(proxy: TcpProxy) -> socket.socket:
    return socket.create_connection((proxy.host, proxy.port), timeout=5)


def test_the_proxy_forwards_and_delays(shouting: TcpProxy) -> None:
    with _connect(shouting) as client:
        client.sendall(b"hello\n")
        assert client.recv(100) == b"HELLO\n"
        shouting.delay(0.4)
        began = time.monotonic()
        client.sendall(b"again\n")
        assert client.recv(100) == b"AGAIN\n"
        assert time.monotonic() - began >= 0.4


def test_the_proxy_cuts_in_the_middle_of_an_answer(shouting: TcpProxy) -> None:
    with _connect(shouting) as client:
        shouting.cut_after(3)
        client.sendall(b"hello\n")
        assert client.recv(100) == b"HEL"
        with pytest.raises(ConnectionResetError):
            client.recv(100)
    with _connect(shouting) as client:
        client.sendall(b"whole\n")
        assert client.recv(100) == b"WHOLE\n"


def test_the_proxy_resets_refuses_and_heals(shouting: TcpProxy) -> None:
    with _connect(shouting) as client:
        client.sendall(b"hello\n")
        assert client.recv(100) == b"HELLO\n"
        shouting.refuse()
        with pytest.raises(ConnectionResetError):
            client.recv(100)
    with pytest.raises(ConnectionRefusedError):
        _connect(shouting)
    shouting.heal()
    with _connect(shouting) as client:
        client.sendall(b"back\n")
        assert client.recv(100) == b"BACK\n"


def test_the_proxy_swallows_answers_while_the_connection_stays(shouting: TcpProxy) -> None:
    shouting.swallow("answer")
    with _connect(shouting) as client:
        client.settimeout(0.5)
        client.sendall(b"hello\n")
        with pytest.raises(TimeoutError):
            client.recv(100)


def test_airflows_database_is_there(airflow_db: None) -> None:
    from airflow.settings import engine

    assert engine is not None
    with engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM dag")).scalar_one() == 0
