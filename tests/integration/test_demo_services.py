"""The demo's processes: started, watched, and ended to the last one; the topic on a broker that is not the demo's."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition

from demo.services import DemoFailedError, Services, free_port, stop_all
from demo.topic import PARTITIONS, make_topic
from include.messages import make_messages, publish
from tests.servers.kafka import KafkaBroker

# A server as nasty as Airflow: a child in a process group of its own that ignores SIGTERM, and holds a port.
_NASTY = """
import os, signal, socket, sys, time
holder = socket.create_server(("127.0.0.1", int(sys.argv[1])))
if os.fork() == 0:
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("child", os.getpid(), flush=True)
time.sleep(600)
"""


def _is_alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] not in "ZX"


def test_stop_ends_children_that_left_their_group_and_frees_the_port(tmp_path: Path) -> None:
    services, port = Services(tmp_path, {}), free_port()
    service = services.start("nasty", [sys.executable, "-c", _NASTY, str(port)])
    services.wait("nasty", lambda s: "child" in s.log.read_text(), 90)
    child = int(service.log.read_text().split()[1])
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    try:
        assert os.getpgid(child) != os.getpgid(service.process.pid)
        assert stop_all(tmp_path, deadline_s=1) == 2
        service.process.wait(60)
        assert not _is_alive(child)
        assert bystander.poll() is None
        socket.create_server(("127.0.0.1", port)).close()
        assert stop_all(tmp_path) == 0
    finally:
        bystander.kill()
        bystander.wait()


def test_stop_ends_children_whose_parent_is_dead(tmp_path: Path) -> None:
    services = Services(tmp_path, {})
    service = services.start("nasty", [sys.executable, "-c", _NASTY, str(free_port())])
    services.wait("nasty", lambda s: "child" in s.log.read_text(), 90)
    child = int(service.log.read_text().split()[1])
    service.process.kill()
    service.process.wait()
    assert _is_alive(child)
    assert stop_all(tmp_path, deadline_s=0.5) == 1
    assert not _is_alive(child)


def test_a_process_number_that_somebody_else_has_now_is_left_alone(tmp_path: Path) -> None:
    services = Services(tmp_path, {})
    services.start("short", [sys.executable, "-c", "pass"]).process.wait()
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    try:
        notes = tmp_path / "processes.json"
        ended = str(services._services["short"].process.pid)
        notes.write_text(notes.read_text().replace(ended, str(bystander.pid)))
        assert stop_all(tmp_path) == 0
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_a_server_that_ends_names_its_log_and_the_last_lines(tmp_path: Path) -> None:
    services = Services(tmp_path, {})
    services.start("broken", [sys.executable, "-c", "print('no such table: dag'); raise SystemExit(3)"])
    with pytest.raises(DemoFailedError, match="broken ended by itself with status 3") as caught:
        services.wait("broken", lambda _: False, 90)
    assert str(tmp_path / "logs" / "broken.log") in str(caught.value)
    assert "no such table: dag" in str(caught.value)


def test_a_server_that_is_never_ready_is_told(tmp_path: Path) -> None:
    services = Services(tmp_path, {})
    services.start("slow", [sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        with pytest.raises(DemoFailedError, match="slow is not ready after"):
            services.wait("slow", lambda _: False, 0.3)
    finally:
        assert stop_all(tmp_path) == 1


@pytest.mark.integration
def test_an_earlier_demos_topic_is_made_anew_and_nobody_elses(kafka_broker: KafkaBroker) -> None:
    client = {"bootstrap.servers": kafka_broker.bootstrap}
    said: list[str] = []
    for _ in range(2):
        make_topic(client, "demo-biopsies", said.append)
        delivered = publish(client, "demo-biopsies", make_messages(), said.append)
        assert {d.partition for d in delivered} == set(range(PARTITIONS))
        assert len({(d.partition, d.offset) for d in delivered}) == len(delivered) == 285
        assert _high_watermarks(client, "demo-biopsies") == len(delivered)
    kafka_broker.create_topic("somebodys", partitions=2)
    producer = Producer(client)
    producer.produce("somebodys", b"precious", partition=1)
    assert producer.flush(60) == 0
    with pytest.raises(DemoFailedError, match="not the demo's"):
        make_topic(client, "somebodys", said.append)
    assert _high_watermarks(client, "somebodys") == 1


def _high_watermarks(client: dict[str, str], topic: str) -> int:
    consumer = Consumer({**client, "group.id": "look"})
    deadline = time.monotonic() + 60
    try:
        partitions = consumer.list_topics(topic, timeout=30).topics[topic].partitions
        while time.monotonic() < deadline:
            ends = [consumer.get_watermark_offsets(TopicPartition(topic, p), timeout=30)[1] for p in partitions]
            if sum(ends):
                return sum(ends)
        return 0
    finally:
        consumer.close()
