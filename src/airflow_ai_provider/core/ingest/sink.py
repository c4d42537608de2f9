"""What the author writes to say where quarantined rows are sent as well: a frozen value, cheap to import."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from airflow_ai_provider.errors import SpecError


@dataclass(frozen=True)
class KafkaSink:
    """Send to a Kafka topic.

    :param topic: an existing topic. Templated.
    :param kafka_conn_id: connection of type ``kafka``.
    :raises SpecError: on creation, when it is no topic's name; a retry does not help.
    """

    topic: str
    kafka_conn_id: str = "kafka_default"

    def __post_init__(self) -> None:
        if "{{" not in self.topic and not re.fullmatch(r"[\w.-]{1,249}", self.topic):
            raise SpecError(
                f"KafkaSink: topic={self.topic!r}; a topic's name has letters, digits, . _ and - only.",
                faults=[("topic", "not a topic name")],
            )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON."""
        return asdict(self)

    @classmethod
    def of(cls, value: KafkaSink | Mapping[str, Any] | str) -> KafkaSink:
        """Read a sink, what :meth:`to_dict` wrote, or a topic's name."""
        if isinstance(value, KafkaSink):
            return value
        return cls(value) if isinstance(value, str) else cls(**value)
