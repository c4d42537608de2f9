"""A schema registry in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from airflow_ai_provider.core.ingest.encoded.registry import RegisteredSchema
from airflow_ai_provider.errors import RegistryUnavailableError


class MemorySchemas:
    """Hold schemas by id; count how often each id is asked for.

    :param is_down: while true, no id is answered.
    """

    def __init__(self) -> None:
        self._held: dict[int, RegisteredSchema] = {}
        self.asked: list[int] = []
        self.is_down = False

    def add(
        self,
        subject: str,
        schema: str | Mapping[str, Any] | list[Any],
        kind: str = "AVRO",
        references: Mapping[str, str] | None = None,
    ) -> int:
        """Register a schema as the subject's next version and return its id."""
        text = schema if isinstance(schema, str) else json.dumps(schema)
        version = 1 + sum(held.subject == subject for held in self._held.values())
        number = len(self._held) + 1
        self._held[number] = RegisteredSchema(number, kind, text, dict(references or {}), subject, version)
        return number

    def schema(self, schema_id: int) -> RegisteredSchema | None:
        """Return a schema, or None when there is none of this id.

        :raises RegistryUnavailableError: while :attr:`is_down`.
        """
        self.asked.append(schema_id)
        if self.is_down:
            raise RegistryUnavailableError("the registry in memory is down, as the test asked")
        return self._held.get(schema_id)
