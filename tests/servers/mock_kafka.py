"""librdkafka's in-process cluster in a holder process, for tests of consume, produce, commit and offsets.

Limits: no admin create_topics (a topic appears on first produce, with four topic partitions), no offsets_for_times, no
transactions, about 5 MiB kept per topic partition. The holder ends when its standard input closes, so it cannot outlive
its owner.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.servers.process import ServerFailedError

_ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def mock_cluster() -> Iterator[str]:
    """Hold a cluster for the length of the block and give its bootstrap address."""
    command = [sys.executable, "-m", "tests.servers.mock_kafka"]
    holder = subprocess.Popen(command, cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdin is not None
    assert holder.stdout is not None
    try:
        address = holder.stdout.readline().strip()
        if not address:
            raise ServerFailedError(f"the in-process cluster gave no address; its holder ended with {holder.wait(60)}")
        yield address
    finally:
        holder.stdin.close()
        holder.stdout.close()
        holder.wait(60)


def _hold() -> None:
    from confluent_kafka.admin import AdminClient

    cluster = AdminClient({"test.mock.num.brokers": 1})
    broker = next(iter(cluster.list_topics(timeout=60).brokers.values()))
    sys.stdout.write(f"{broker.host}:{broker.port}\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    _hold()
