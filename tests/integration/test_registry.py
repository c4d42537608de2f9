"""The schema registry for real: schemas, references and versions, its faults and ours, Confluent's own serializers."""

from __future__ import annotations

import json
import pickle
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest

from airflow_ai_provider.core.ingest.encoded.avro.decoder import AvroDecoder
from airflow_ai_provider.core.ingest.encoded.protobuf.decoder import ProtobufDecoder
from airflow_ai_provider.core.ingest.encoded.protobuf.schema import ProtoFile
from airflow_ai_provider.core.ingest.encoded.registry import MAX_ANSWER, RegisteredSchema, SchemaRegistry, Schemas
from airflow_ai_provider.errors import ConnectionConfigError, RegistryUnavailableError
from airflow_ai_provider.testing.registry import MemorySchemas

if TYPE_CHECKING:
    from tests.servers.proxy import TcpProxy
    from tests.servers.registry import SchemaRegistryServer

pytestmark = pytest.mark.integration

ROW = {"type": "record", "name": "Row", "fields": [{"name": "a", "type": "int"}]}


def new_subject() -> str:
    return f"s{uuid.uuid4().hex[:10]}-value"


@pytest.fixture(params=["real", "memory"])
def registered(request: pytest.FixtureRequest) -> Callable[[str, Any, str], tuple[Schemas, int]]:
    """Registers a schema and gives where to look it up: the real server, and the fake that must behave as it does."""
    if request.param == "memory":
        memory = MemorySchemas()
        return lambda subject, schema, kind: (memory, memory.add(subject, schema, kind))
    server: SchemaRegistryServer = request.getfixturevalue("schema_registry")

    def register(subject: str, schema: Any, kind: str) -> tuple[Schemas, int]:
        return SchemaRegistry(server.url, subject=subject), server.register(subject, schema, kind)

    return register


def test_a_schema_by_id_with_subject_and_version(registered: Callable[..., tuple[Schemas, int]]) -> None:
    subject = new_subject()
    schemas, first = registered(subject, ROW, "AVRO")
    assert schemas.schema(first) == RegisteredSchema(first, "AVRO", json.dumps(ROW), {}, subject, 1)
    wider = {**ROW, "fields": [*ROW["fields"], {"name": "b", "type": "int", "default": 0}]}  # type: ignore[misc]
    schemas, second = registered(subject, wider, "AVRO")
    found = schemas.schema(second)
    assert found is not None
    assert (found.subject, found.version) == (subject, 2)
    schemas, proto = registered(new_subject(), 'syntax = "proto3"; message M { int32 a = 1; }', "PROTOBUF")
    found = schemas.schema(proto)
    assert found is not None
    assert found.kind == "PROTOBUF"


def test_an_id_that_nobody_has_is_none(registered: Callable[..., tuple[Schemas, int]]) -> None:
    schemas, _ = registered(new_subject(), ROW, "AVRO")
    assert [schemas.schema(n) for n in (10**6, 2**31 - 1)] == [None, None]


def test_references_of_references_come_in_the_order_they_are_needed(schema_registry: SchemaRegistryServer) -> None:
    one, two, three = (new_subject() for _ in range(3))
    schema_registry.register(one, {**ROW, "name": "One"})
    inner = {"type": "record", "name": "Two", "fields": [{"name": "one", "type": "One"}]}
    schema_registry.register(two, inner, references=[{"name": "One", "subject": one, "version": 1}])
    outer = {"type": "record", "name": "Three", "fields": [{"name": "two", "type": "Two"}]}
    refers = [{"name": "Two", "subject": two, "version": 1}]
    number = schema_registry.register(three, outer, references=refers)
    registry = SchemaRegistry(schema_registry.url)
    found = registry.schema(number)
    assert found is not None
    assert list(found.references) == ["One", "Two"]
    payload = b"\0" + number.to_bytes(4, "big") + b"\x0e"
    assert AvroDecoder(registry).decode([payload]).rows.to_pylist() == [{"two": {"one": {"a": 7}}}]


def test_confluents_own_avro_serializer_is_read(schema_registry: SchemaRegistryServer) -> None:
    from confluent_kafka.schema_registry import SchemaRegistryClient
    from confluent_kafka.schema_registry.avro import AvroSerializer
    from confluent_kafka.serialization import MessageField, SerializationContext

    topic = new_subject().removesuffix("-value")
    schema = {
        "type": "record",
        "name": "Row",
        "fields": [
            {"name": "a", "type": "int"},
            {"name": "at", "type": {"type": "long", "logicalType": "timestamp-millis"}},
            {"name": "note", "type": ["null", "string"]},
        ],
    }
    write = AvroSerializer(SchemaRegistryClient({"url": schema_registry.url}), json.dumps(schema))
    context = SerializationContext(topic, MessageField.VALUE)
    rows = [{"a": i, "at": datetime(2026, 1, 1, tzinfo=UTC), "note": None if i % 2 else "x"} for i in range(10)]
    decoder = AvroDecoder(SchemaRegistry(schema_registry.url, subject=f"{topic}-value"))
    block = decoder.decode([write(row, context) for row in rows])
    assert block.rows.to_pylist() == rows
    assert [(f["subject"], f["version"]) for f in decoder.facts] == [(f"{topic}-value", 1)]


def test_confluents_own_protobuf_serializer_is_read(schema_registry: SchemaRegistryServer) -> None:
    from confluent_kafka.schema_registry import SchemaRegistryClient
    from confluent_kafka.schema_registry.protobuf import ProtobufSerializer
    from confluent_kafka.serialization import MessageField, SerializationContext

    topic = new_subject().removesuffix("-value")
    text = 'syntax = "proto3"; package p; message A { int32 x = 1; } message B { string y = 1; optional int64 z = 2; }'
    file = ProtoFile(text, {})
    messages = [file.named("p.A")(x=5), file.named("p.B")(y="é", z=0)]
    client = SchemaRegistryClient({"url": schema_registry.url})
    context = SerializationContext(topic, MessageField.VALUE)
    payloads = [ProtobufSerializer(type(message), client)(message, context) for message in messages]
    block = ProtobufDecoder(SchemaRegistry(schema_registry.url)).decode(payloads)
    assert not block.faults
    assert block.rows.to_pylist() == [{"x": 5, "y": None, "z": None}, {"x": None, "y": "é", "z": 0}]
    assert block.schema_ids.null_count == 0


def test_rules_of_the_registry_and_reading_old_rows_by_the_new_schema(schema_registry: SchemaRegistryServer) -> None:
    """BACKWARD: what the registry lets in as a next version reads the rows of the one before."""
    subject = new_subject()
    old = schema_registry.register(subject, ROW)
    schema_registry.set_compatibility(subject, "BACKWARD")
    wider = {**ROW, "fields": [{"name": "a", "type": "long"}, {"name": "b", "type": "string", "default": "-"}]}
    new = schema_registry.register(subject, wider)
    registry = SchemaRegistry(schema_registry.url)
    reader = registry.schema(new)
    assert reader is not None
    payloads = [b"\0" + old.to_bytes(4, "big") + b"\x02", b"\0" + new.to_bytes(4, "big") + b"\x04\x02x"]
    block = AvroDecoder(registry, reader.text).decode(payloads)
    assert block.rows.to_pylist() == [{"a": 1, "b": "-"}, {"a": 2, "b": "x"}]


def test_what_it_read_before_it_went_down_is_kept(
    schema_registry: SchemaRegistryServer, tcp_proxy: Callable[[str, int], TcpProxy]
) -> None:
    number = schema_registry.register(new_subject(), ROW)
    proxy = tcp_proxy("127.0.0.1", schema_registry.port)
    registry = SchemaRegistry(f"http://{proxy.address}/apis/ccompat/v7", timeout_s=4)
    payload = b"\0" + number.to_bytes(4, "big") + b"\x02"
    decoder = AvroDecoder(registry)
    decoder.decode([payload])
    proxy.refuse()
    assert decoder.decode([payload]).rows.to_pylist() == [{"a": 1}]
    started = time.monotonic()
    with pytest.raises(
        RegistryUnavailableError, match=f"http://{proxy.address}/apis/ccompat/v7 gave no answer"
    ) as caught:
        decoder.decode([b"\0" + (number + 1000).to_bytes(4, "big")])
    assert time.monotonic() - started < 30
    assert pickle.loads(pickle.dumps(caught.value)).url == registry.url
    proxy.heal()
    assert registry.schema(number + 1000) is None


@pytest.mark.parametrize("fault", ["swallow", "late", "cut"])
def test_faults_on_the_way_end_by_the_deadline_or_are_tried_again(
    fault: str, schema_registry: SchemaRegistryServer, tcp_proxy: Callable[[str, int], TcpProxy]
) -> None:
    number = schema_registry.register(new_subject(), ROW)
    proxy = tcp_proxy("127.0.0.1", schema_registry.port)
    url = f"http://{proxy.address}/apis/ccompat/v7"
    if fault == "cut":
        proxy.cut_after(150)  # in the middle of the answer, once
        assert SchemaRegistry(url, timeout_s=30).schema(number) is not None
        return
    registry = SchemaRegistry(url, timeout_s=2)
    proxy.swallow() if fault == "swallow" else proxy.delay(60)
    started = time.monotonic()
    with pytest.raises(RegistryUnavailableError):
        registry.schema(number)
    assert time.monotonic() - started < 30


@contextmanager
def answering(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that answers every connection in its own way; gives its URL."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=one, args=(client,), daemon=True).start()

    def one(client: socket.socket) -> None:
        with client:
            client.recv(65536)
            try:
                answer(client)
            except OSError:
                return  # the client hung up: that is what the test is about

    threading.Thread(target=serve, daemon=True).start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def says(status: str, body: bytes) -> Callable[[socket.socket], None]:
    head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n"
    return lambda client: client.sendall(head.encode() + b"Location: http://127.0.0.1:1/\r\n\r\n" + body)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (says("401 Unauthorized", b'{"error_code":40101}'), "refuses the login"),
        (says("403 Forbidden", b""), "refuses the login"),
        (says("404 Not Found", b"<html>nothing here</html>"), "does not answer as a schema registry does"),
        (says("200 OK", b"<html>a login page</html>"), "does not answer as a schema registry does"),
        (says("302 Found", b""), "does not answer as a schema registry does: /schemas/ids/7 gave 302"),
    ],
)
def test_answers_that_no_retry_mends(answer: Callable[[socket.socket], None], message: str) -> None:
    with answering(answer) as url, pytest.raises(ConnectionConfigError, match=message):
        SchemaRegistry(url, headers={"Authorization": "Basic bWU6czNjcmV0"}, timeout_s=30).schema(7)


def drip(client: socket.socket) -> None:
    client.sendall(b"HTTP/1.1 200 OK\r\n")
    for _ in range(1200):  # a minute
        client.sendall(b"X")
        time.sleep(0.05)


def flood(client: socket.socket) -> None:
    client.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
    for _ in range(MAX_ANSWER // 65536 + 10):
        client.sendall(b"[" * 65536)


@pytest.mark.parametrize("answer", [drip, flood, says("503 Later", b""), says("429 Slow down", b""), lambda _: None])
def test_answers_that_a_retry_may_mend(answer: Callable[[socket.socket], None]) -> None:
    started = time.monotonic()
    with answering(answer) as url, pytest.raises(RegistryUnavailableError, match="gave no answer") as caught:
        SchemaRegistry(url, headers={"Authorization": "Basic bWU6czNjcmV0"}, timeout_s=1).schema(7)
    assert time.monotonic() - started < 30
    assert "bWU6czNjcmV0" not in str(caught.value)


@pytest.mark.parametrize("url", ["registry:8081", "ftp://registry", "http://", "http://me:s3cret@registry:8081"])
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(ConnectionConfigError) as caught:
        SchemaRegistry(url)
    assert "s3cret" not in str(caught.value)


def test_login_and_token_are_sent(httpserver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from airflow_ai_provider.hooks.registry import SchemaRegistryHook

    httpserver.expect_request("/api/subjects", headers={"Authorization": "Basic bWU6cHc="}).respond_with_json(
        ["a", "b"]
    )
    httpserver.expect_request("/api/subjects", headers={"Authorization": "Bearer t0ken"}).respond_with_json([])
    place = {"conn_type": "schema_registry", "host": f"http://{httpserver.host}/api", "port": httpserver.port}
    monkeypatch.setenv("AIRFLOW_CONN_BASIC", json.dumps({**place, "login": "me", "password": "pw"}))
    monkeypatch.setenv("AIRFLOW_CONN_TOKEN", json.dumps({**place, "password": "t0ken"}))
    monkeypatch.setenv("AIRFLOW_CONN_NOBODY", json.dumps({**place, "extra": {"timeout_s": 1}}))
    url = f"http://{httpserver.host}:{httpserver.port}/api"
    assert SchemaRegistryHook("basic").test_connection() == (True, f"the registry at {url} answers; it has 2 subjects")
    assert SchemaRegistryHook("token").test_connection() == (True, f"the registry at {url} answers; it has 0 subjects")
    assert SchemaRegistryHook("nobody").test_connection()[0] is False


def test_a_connection_without_a_host_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    from airflow_ai_provider.hooks.registry import SchemaRegistryHook

    monkeypatch.setenv("AIRFLOW_CONN_EMPTY", json.dumps({"conn_type": "schema_registry"}))
    with pytest.raises(ConnectionConfigError, match="'empty' names no host"):
        SchemaRegistryHook("empty").get_registry()
