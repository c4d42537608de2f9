"""Hold librdkafka's in-process Kafka cluster for as long as this process lives, and print its address.

Limits: a topic appears on its first message, with four topic partitions; about 5 MiB of each are kept, in memory only.
"""

from __future__ import annotations

import signal
import threading


def hold() -> None:
    """Print ``host:port`` and wait for SIGTERM."""
    from confluent_kafka.admin import AdminClient

    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    cluster = AdminClient({"test.mock.num.brokers": 1})
    broker = next(iter(cluster.list_topics(timeout=30).brokers.values()))
    print(f"{broker.host}:{broker.port}", flush=True)
    ended.wait()


if __name__ == "__main__":
    hold()
