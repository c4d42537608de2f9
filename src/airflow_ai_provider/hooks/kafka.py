"""Airflow connection → a Kafka client's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from airflow.providers.apache.kafka.hooks.base import KafkaBaseHook

from airflow_ai_provider.connection import find_connection
from airflow_ai_provider.errors import ConnectionConfigError


class KafkaConfigHook(KafkaBaseHook):
    """Read a ``kafka`` connection (the type of the apache-kafka provider) as a checked client configuration.

    Everything that the apache-kafka provider does for a connection (callbacks on its allow-list, managed tokens)
    holds here too.

    :param kafka_conn_id: connection of type ``kafka``.
    """

    def __init__(self, kafka_conn_id: str = KafkaBaseHook.default_conn_name) -> None:
        super().__init__(kafka_config_id=kafka_conn_id)  # type: ignore[no-untyped-call]  # untyped there

    def _get_client(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return dict(config)

    def get_config(self) -> dict[str, Any]:
        """Return the configuration.

        :raises ConnectionConfigError: when the connection is missing, names no broker, or asks for
            ``enable.auto.commit``, which would publish offsets of rows that are not yet durable, or to read records of
            transactions that may yet be aborted; a retry does not help.
        """
        find_connection(self.kafka_config_id, self.conn_type)
        try:
            config: dict[str, Any] = self.get_conn
        except ValueError as error:
            raise ConnectionConfigError(
                f"connection {self.kafka_config_id!r}: {error} Put it into the connection's extra.",
                conn_id=self.kafka_config_id,
            ) from error
        if str(config.get("enable.auto.commit", "false")).lower() == "true":
            raise ConnectionConfigError(
                f"connection {self.kafka_config_id!r} sets enable.auto.commit=true: offsets would be committed for "
                "rows that are not yet stored, and a crash would lose them. Remove it from the connection's extra; "
                "offsets are published after each batch has landed.",
                conn_id=self.kafka_config_id,
            )
        if str(config.get("isolation.level", "read_committed")).lower() != "read_committed":
            raise ConnectionConfigError(
                f"connection {self.kafka_config_id!r} sets isolation.level={config['isolation.level']}: rows of a "
                "transaction would be taken that may yet be aborted, and nothing takes them back. Remove it from the "
                "connection's extra; committed records are read as soon as they are.",
                conn_id=self.kafka_config_id,
            )
        return config
