"""Wake a DAG when a Kafka topic has grown.

Invariants: an event is a wake-up and never the data: the run reads from its own position; nothing is consumed and no
group is joined; what came after an event is noticed against the offsets of that event, so the end of a burst wakes too;
a broker that is away is waited for and never ends the watch.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from airflow.triggers.base import BaseEventTrigger, TriggerEvent
from asgiref.sync import sync_to_async

from airflow_ai_provider.errors import AiProviderError

if TYPE_CHECKING:
    from airflow_ai_provider.core.ingest.kafka import KafkaReader

_LONGEST_PAUSE_S = 300.0


class TopicGrowthTrigger(BaseEventTrigger):
    """Fire when a topic holds records that it did not hold at the last event, at most once per interval.

    For an ``AssetWatcher``; :func:`airflow_ai_provider.schedule.on_topic` makes the whole schedule. Only committed
    records count (the last stable offset). The first look fires when the topic is not empty: what came while no
    triggerer ran is not known, and a run too many finds nothing and ends.

    :param topic: an existing topic; one that is missing is waited for.
    :param kafka_conn_id: connection of type ``kafka``.
    :param interval_s: seconds between two looks, and so the least between two events.
    """

    def __init__(self, topic: str, kafka_conn_id: str = "kafka_default", interval_s: float = 10.0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped there
        self.topic = topic
        self.kafka_conn_id = kafka_conn_id
        self.interval_s = interval_s

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Return class path and arguments."""
        return (
            "airflow_ai_provider.triggers.topic.TopicGrowthTrigger",
            {"topic": self.topic, "kafka_conn_id": self.kafka_conn_id, "interval_s": self.interval_s},
        )

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Look, compare, fire, for ever."""
        seen: dict[int, int] = {}
        pause = self.interval_s
        reader: KafkaReader | None = None
        try:
            while True:
                try:
                    reader = reader or await self._open()
                    # a thread of its own: a broker that hangs must not hold up the other triggers
                    ends = await asyncio.to_thread(reader.ends)
                except AiProviderError as error:
                    await _closed(reader)
                    reader = None
                    pause = min(2 * pause, _LONGEST_PAUSE_S)
                    self.log.warning("topic %s is not watched for %.0f s: %s", self.topic, pause, error)
                else:
                    pause = self.interval_s
                    grown = growth(seen, ends)
                    seen = ends
                    if grown:
                        self.log.info("topic %s has grown by %d offsets", self.topic, grown)
                        named = {str(partition): end for partition, end in sorted(ends.items())}
                        yield TriggerEvent({"topic": self.topic, "ends": named})  # type: ignore[no-untyped-call]
                await asyncio.sleep(pause)
        finally:
            await _closed(reader)

    async def _open(self) -> KafkaReader:
        config = await sync_to_async(self._config)()
        from airflow_ai_provider.core.ingest.kafka import KafkaReader

        return KafkaReader(config, self.topic)

    def _config(self) -> dict[str, Any]:
        from airflow_ai_provider.hooks.kafka import KafkaConfigHook

        return KafkaConfigHook(self.kafka_conn_id).get_config()


def growth(seen: dict[int, int], ends: dict[int, int]) -> int:
    """Return by how many offsets a topic is ahead of what was seen.

    A topic partition that ends before what was seen belongs to a topic made anew: all of it is new.

    :param seen: topic partition → its end at the last event.
    :param ends: topic partition → its end now.
    """
    return sum(end - seen.get(p, 0) if end >= seen.get(p, 0) else end for p, end in ends.items())


async def _closed(reader: KafkaReader | None) -> None:
    if reader is not None:
        await asyncio.to_thread(reader.close)
