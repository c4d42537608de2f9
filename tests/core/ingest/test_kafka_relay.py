"""The relay of consumers: in order, one ahead at most, all closed."""

from __future__ import annotations

from typing import ClassVar

import pytest

from airflow_ai_provider.core.batch import Slice
from airflow_ai_provider.core.ingest.kafka_relay import Relay


class Client:
    """What the relay needs of a consumer: that it can be closed."""

    open: ClassVar[list[Client]] = []

    def __init__(self, part: Slice) -> None:
        self.part = part
        self.open.append(self)

    def close(self) -> None:
        self.open.remove(self)


@pytest.fixture(autouse=True)
def none_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Client, "open", [])


SLICES = [Slice(str(number), 0, 10) for number in range(4)]


def test_each_slice_has_its_consumer_and_one_more_at_most_is_open() -> None:
    with Relay(SLICES, Client) as relay:
        for number, part in enumerate(SLICES):
            taken = relay.take()
            assert taken.part == part
            for _ in range(3):  # asked again, it does not begin another
                relay.begin()
            assert [client.part for client in Client.open] == SLICES[number : number + 2]
    assert Client.open == []


def test_a_read_that_is_given_up_leaves_none_open() -> None:
    with pytest.raises(KeyboardInterrupt), Relay(SLICES, Client) as relay:
        relay.take()
        relay.begin()
        raise KeyboardInterrupt
    assert Client.open == []


def test_nothing_to_read_opens_nothing() -> None:
    with Relay([], Client) as relay:
        relay.begin()
    assert Client.open == []
