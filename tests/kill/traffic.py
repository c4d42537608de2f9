"""A topic that fills while others are killed: plain, committed and aborted messages, good ones and bad ones.

Invariants: a message's number says what it holds and what must become of it; each number is sent once; what became of
it (committed or aborted) is known when :meth:`Traffic.stop` returns, however often the broker died in between; a
transaction whose end nobody can tell, for the broker died over it, is ``unsettled``: whole or not there at all.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable

from confluent_kafka import KafkaException, Producer

PARTITIONS = 2
_BAD: tuple[Callable[[int], tuple[bytes | None, str]], ...] = (
    lambda n: (b'{"n": %d' % n, "broken_json"),
    lambda n: (b'{"n": %d}{"n": 1}' % n, "broken_json"),
    lambda n: (b"null", "broken_json"),
    lambda n: (b'{"n": %d, "v": "\xff"}' % n, "broken_json"),
    lambda n: (b'{"n": "%d", "v": 1}' % n, "wrong_type"),
    lambda n: (b'{"n": %d, "v": -1}' % n, "out_of_range"),
    lambda n: (None, "tombstone"),
)


def message(number: int) -> tuple[bytes | None, str | None]:
    """What the message of this number holds, and the code it is rejected with; None: it is good by itself."""
    if number % 9 == 4:
        return _BAD[number // 9 % len(_BAD)](number)
    fields = {"n": number, "v": number % 100, "u": unique(number), "text": "x" * (number % 300)}
    return json.dumps(fields).encode(), None


def unique(number: int) -> int:
    """What should be there once in a batch: some have that of their neighbour, some that of a message long before."""
    return number - {3: 1, 7: 41}.get(number % 20, 0)


class Traffic:
    """Fill a topic from a thread of its own.

    :param bootstrap: the broker.
    :param topic: has :data:`PARTITIONS` topic partitions.
    :param seed: decides what is sent, in which order, and which transactions are aborted.
    :param pause_s: between two bursts.
    """

    def __init__(self, bootstrap: str, topic: str, seed: int, pause_s: float = 0.1) -> None:
        self._topic, self._chance, self._pause_s = topic, random.Random(seed), pause_s
        settings = {"bootstrap.servers": bootstrap, "linger.ms": 5, "reconnect.backoff.max.ms": 500, "log_level": 2}
        # never given up: a message whose outcome nobody knows could not be held against anything
        self._plain = Producer({**settings, "enable.idempotence": True, "message.timeout.ms": 0})
        self._bound = {**settings, "transactional.id": f"traffic-{topic}"}
        self._binding = self._open_binding()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._ended = threading.Event()
        self._count = 0
        self._error: Exception | None = None
        self.committed: set[int] = set()
        self.aborted: set[int] = set()
        self.unsettled: list[set[int]] = []

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End when everything sent has its outcome."""
        self._ended.set()
        self._thread.join(120)
        assert not self._thread.is_alive(), "traffic does not end"
        if self._error is not None:
            raise self._error

    def send_last(self) -> None:
        """Put one more message into every topic partition, so that the last batch publishes every offset."""
        for partition in range(PARTITIONS):
            self.committed |= self._send(self._plain, 1, partition)
        assert self._plain.flush(60) == 0

    def _run(self) -> None:
        try:
            while not self._ended.is_set():
                self._burst()
                time.sleep(self._pause_s * self._chance.random() * 2)
            assert self._plain.flush(60) == 0
        except Exception as error:
            self._error = error

    def _burst(self) -> None:
        if self._chance.random() < 0.4:
            self.committed |= self._send(self._plain, self._chance.randint(1, 40))
            self._plain.poll(0)
            return
        self._binding.begin_transaction()
        bound = self._send(self._binding, self._chance.randint(1, 40))
        # plain messages that come to lie behind the open transaction
        self.committed |= self._send(self._plain, self._chance.randint(0, 5))
        time.sleep(self._pause_s * self._chance.random())
        try:
            if self._chance.random() < 0.6 and _insist(self._binding.commit_transaction):
                self.committed |= bound
            else:
                _insist(self._binding.abort_transaction)
                self.aborted |= bound
        except KafkaException as error:
            if not error.args[0].fatal():
                raise
            self.unsettled.append(bound)
            self._binding = self._open_binding()  # the next one of the same name ends the transaction, either way

    def _open_binding(self) -> Producer:
        producer = Producer(self._bound)
        _insist(producer.init_transactions)
        return producer

    def _send(self, producer: Producer, count: int, partition: int | None = None) -> set[int]:
        numbers = set(range(self._count, self._count + count))
        self._count += count
        # what becomes of a transaction's messages its commit says: one that never arrived makes it fail
        told = _demand if producer is self._plain else None
        for number in sorted(numbers):
            to = self._chance.randrange(PARTITIONS) if partition is None else partition
            producer.produce(self._topic, message(number)[0], key=str(number), partition=to, on_delivery=told)
        return numbers


def _demand(error: object, _: object) -> None:
    assert error is None, error


def _insist(step: Callable[[float], None]) -> bool:
    """Ask until there is an answer; False: the transaction must be aborted."""
    deadline = time.monotonic() + 120
    while True:
        try:
            step(5)
        except KafkaException as error:
            fault = error.args[0]
            if fault.txn_requires_abort():
                return False
            if not fault.retriable() or time.monotonic() > deadline:
                raise
        else:
            return True
