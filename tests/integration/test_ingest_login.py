"""A broker that does not let us in: each wrong way to come is told apart, in seconds, with the next move."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from airflow_ai_provider.core.ingest.kafka import KafkaReader
from airflow_ai_provider.errors import AiProviderError, ConnectionConfigError, SourceError, SourceUnavailableError

if TYPE_CHECKING:
    from tests.servers.kafka import KafkaBroker

pytestmark = pytest.mark.integration
DEADLINE_S = 10


def login(name: str, password: str, mechanism: str = "PLAIN") -> dict[str, str]:
    told = {"sasl.mechanism": mechanism, "sasl.username": name, "sasl.password": password}
    return {"security.protocol": "SASL_PLAINTEXT", **told}


def refusal(bootstrap: str, topic: str, settings: dict[str, str]) -> AiProviderError:
    reader = KafkaReader({"bootstrap.servers": bootstrap, **settings}, topic, deadline_s=DEADLINE_S)
    began = time.monotonic()
    with pytest.raises(AiProviderError) as told:
        reader.plan({}, {}, None, None)
    reader.close()
    assert time.monotonic() - began < 2 * DEADLINE_S + 20, "seconds, not a hang"
    assert bootstrap in str(told.value)
    assert settings.get("sasl.password", "nothing secret") not in str(told.value)
    return told.value


def test_who_may_come_is_let_in_and_nobody_else(kafka_broker: KafkaBroker) -> None:
    topic = kafka_broker.create_topic("login")
    door, plain = kafka_broker.login_bootstrap, kafka_broker.bootstrap
    reader = KafkaReader({"bootstrap.servers": door, **login("reader", "right")}, topic, deadline_s=30)
    assert reader.plan({}, {}, None, None).is_empty
    reader.close()

    wrong = refusal(door, topic, login("reader", "hunter2"))
    assert isinstance(wrong, ConnectionConfigError)
    assert "Invalid username or password" in str(wrong)
    assert "Correct security.protocol" in str(wrong)

    other = refusal(door, topic, login("reader", "right-one", "SCRAM-SHA-256"))
    assert isinstance(other, ConnectionConfigError)
    assert "supported mechanisms: PLAIN" in str(other)

    stranger = refusal(door, topic, login("stranger", "unloved"))
    assert isinstance(stranger, SourceError)
    assert "grant the connection's user the right to read it" in str(stranger)

    encrypted = refusal(plain, topic, {"security.protocol": "SSL"})
    assert isinstance(encrypted, SourceUnavailableError), "a broker that restarts breaks handshakes off, too"
    assert "security.protocol" in str(encrypted)

    naked = refusal(door, topic, {})
    assert isinstance(naked, SourceUnavailableError)
    assert "security.protocol" in str(naked)
