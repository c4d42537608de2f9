"""The one door to Kafka of the verb ingest: plan a span of a topic, read it to the proven end, publish how far we are.

Invariants: the upper end is the last stable offset, fixed once; a read ends by offset, end-of-partition or position,
never by silence; a start that is gone or a topic that was made anew is an error, never a jump; topic partitions are
read one after the other in offset order, so the same span gives the same rows in the same order; clients are closed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from datetime import datetime
from typing import Any, TypeVar, cast

import pyarrow as pa
from confluent_kafka import (
    OFFSET_END,
    Consumer,
    IsolationLevel,
    KafkaError,
    KafkaException,
    Message,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # its stubs do not export them
    AdminClient,
    ClusterMetadata,
    OffsetSpec,
)

from airflow_ai_provider.core.batch import Slice, Span
from airflow_ai_provider.core.ingest.block import paused_gc
from airflow_ai_provider.core.ingest.kafka_config import Told, admin_config, consumer_config
from airflow_ai_provider.core.ingest.kafka_relay import Relay
from airflow_ai_provider.core.ingest.kafka_span import cap, demand_kept, demand_reached, demand_same
from airflow_ai_provider.core.ingest.kafka_table import table_of
from airflow_ai_provider.errors import AiProviderError, SourceError, SourceUnavailableError

log = logging.getLogger(__name__)
T = TypeVar("T")

_GONE = {
    KafkaError.UNKNOWN_TOPIC_OR_PART,
    KafkaError._UNKNOWN_TOPIC,
    KafkaError._UNKNOWN_PARTITION,
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.GROUP_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
    KafkaError._AUTO_OFFSET_RESET,
    KafkaError.OFFSET_OUT_OF_RANGE,
}
_EARLIEST, _LATEST = OffsetSpec.earliest(), OffsetSpec.latest()  # type: ignore[no-untyped-call]
_NO_TOPIC_ID = "AAAAAAAAAAAAAAAAAAAAAA"
_COUNT = 4096
"""Messages per call; more would leave the processor's cache before they are columns."""
_AHEAD = 100_000
"""Offsets left of a topic partition when the next one begins to fetch: more than fetching takes to begin, and few
enough that the two do not fill both their queues."""


class KafkaReader:
    """Read spans of one topic.

    :param config: client configuration with ``bootstrap.servers``; the settings that make reading safe win over it.
    :param topic: an existing topic.
    :param key: the author's key column.
    :param group: consumer group whose offsets are published after landing; None takes ``group.id``; without either,
        nothing is published.
    :param deadline_s: how long planning may wait for the broker, and publishing too.
    :param stall_s: how long a read may stand still before it fails; a broker's restart takes about 20 s.
    :param clock: seconds, monotonic.
    """

    format = "json"

    def __init__(
        self,
        config: Mapping[str, Any],
        topic: str,
        key: str | None = None,
        group: str | None = None,
        *,
        deadline_s: float = 10.0,
        stall_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name, self.key = f"kafka:{topic}", key
        self._config, self._topic, self._group = dict(config), topic, group or config.get("group.id")
        self._deadline_s, self._stall_s, self._clock = deadline_s, stall_s, clock
        self._planner: Consumer | None = None
        self._admin_client: AdminClient | None = None
        self._identity: str | None = None
        self._told = Told(self._bootstrap)

    @property
    def _bootstrap(self) -> str:
        return str(self._config.get("bootstrap.servers", "(no bootstrap.servers)"))

    def identity(self) -> str:
        """Return the topic's id, which a topic made anew under the same name does not share; empty when the broker
        gives none (before Kafka 3.1; librdkafka's in-process cluster).

        :raises SourceError: when the topic is not there; a retry does not help.
        :raises SourceUnavailableError: when the broker does not answer in time; a retry may help.
        """
        if self._identity is None:
            self._identity = self._ask_identity(self._deadline_s)
        return self._identity

    def plan(
        self,
        position: Mapping[str, int],
        taken: Mapping[str, str],
        window: tuple[datetime, datetime] | None,
        row_limit: int | None,
    ) -> Span:
        """Fix the next span: from the position (of a new topic partition: its first record) to the last stable offset.

        A window is taken by arrival: from the first record stamped at or after its start up to the first one stamped
        at or after its end, whatever the stamps between; records that came out of order may fall outside.

        :param row_limit: at most so many offsets, spread evenly over the topic partitions.
        :raises SourceError: when the topic, or records between position and first record, are not there any more; a
            retry does not help.
        :raises SourceUnavailableError: when the broker does not answer within the deadline; a retry may help.
        """
        identity, partitions = self.identity(), sorted(self._metadata().topics[self._topic].partitions)
        low = self._offsets(partitions, _EARLIEST)
        stable = self._offsets(partitions, _LATEST)
        high = self._offsets(partitions, _LATEST, is_stable=False)
        if window is None:
            first = {p: position.get(str(p), low[p]) for p in partitions}
            end = stable
            demand_kept(self._topic, self._bootstrap, low, {p: first[p] for p in partitions if first[p] < stable[p]})
            demand_reached(self._topic, self._bootstrap, high, first)
        else:
            first, end = (self._at_time(partitions, moment, stable) for moment in window)
        bounds = {p: (first[p], end[p]) for p in partitions if first[p] < end[p]}
        if row_limit is not None:
            bounds = cap(bounds, row_limit)
        slices = tuple(sorted(Slice(str(p), at, to) for p, (at, to) in bounds.items()))
        waiting = sum(high[p] - stable[p] for p in partitions)
        return Span(self.name, identity, slices, {"partitions": len(partitions), "waiting": waiting})

    def ends(self) -> dict[int, int]:
        """Return the last stable offset of each topic partition: how far a span planned now would reach.

        :raises SourceError: when the topic is not there; a retry does not help.
        :raises SourceUnavailableError: when the broker does not answer within the deadline; a retry may help.
        """
        return self._offsets(sorted(self._metadata().topics[self._topic].partitions), _LATEST)

    def read(self, span: Span) -> Iterator[pa.Table]:
        """Yield the span's records: ``_row_id``, ``_payload``, ``_key``, ``_topic``, ``_partition``, ``_offset``,
        ``_timestamp``.

        :raises SourceError: when records of the span are not there any more, or the topic was made anew; a retry does
            not help.
        :raises SourceUnavailableError: when nothing came for ``stall_s``; a retry reads the same span.
        """
        slices = sorted(span.slices, key=lambda s: int(s.partition))
        with Relay(slices, self._fetch) as relay:
            relay.begin()  # connects while the broker is asked
            demand_same(self._topic, self._bootstrap, span.identity, self._ask_identity(self._stall_s))
            first = {int(s.partition): s.first for s in slices}
            kept = self._offsets(list(first), _EARLIEST)
            demand_kept(self._topic, self._bootstrap, kept, first, is_claimed=True)
            for part in slices:
                yield from self._read_partition(relay, part, span.identity)
        # no second look at the first offsets: what is deleted before we come to it, the client reports
        # (auto.offset.reset=error), and what is deleted behind us is no loss
        demand_same(self._topic, self._bootstrap, span.identity, self._ask_identity(self._stall_s))

    def commit(self, span: Span) -> None:
        """Publish the span's ends as the group's offsets, forwards only; a failure is a warning, never an error."""
        if not self._group or not span.slices:
            return
        ends = [TopicPartition(self._topic, int(s.partition), s.end) for s in span.slices]
        try:
            fault = self._publish(ends)
        except KafkaException as error:
            fault = str(error)
        if fault:
            log.warning(
                "offsets of group %s on %s at %s were not published (%s). Rows are safe, for the ledger says what is "
                "taken; only lag tools show an old position until the next run.",
                self._group,
                self._topic,
                self._bootstrap,
                fault,
            )

    def close(self) -> None:
        """Close the clients."""
        if self._planner is not None:
            self._planner.close()
        self._planner = self._admin_client = None

    def _fetch(self, part: Slice) -> Consumer:
        consumer = self._consumer()
        consumer.assign([TopicPartition(self._topic, int(part.partition), part.first)])
        return consumer

    def _read_partition(self, relay: Relay[Consumer], part: Slice, identity: str) -> Iterator[pa.Table]:
        consumer = relay.take()
        reached, moved_at = part.first, self._clock()
        while reached < part.end:
            if part.end - reached <= _AHEAD:
                relay.begin()
            with paused_gc():
                messages, ended = self._sort_out(consumer.consume(min(_COUNT, part.end - reached), 0.2), part, reached)
                table = table_of(self._topic, identity, messages) if messages else None
            if table is not None:
                yield table
            now_at = part.end if ended else self._position(consumer, part, messages, reached)
            if now_at > reached:
                reached, moved_at = now_at, self._clock()
            elif self._clock() - moved_at > self._stall_s:
                raise SourceUnavailableError(
                    f"{self._topic}/{part.partition} at {self._bootstrap} stood still for {self._stall_s:.0f} s at "
                    f"offset {reached} of {part.end}; a read ends only at its proven end. Check the broker; the retry "
                    "reads the same span again.",
                    offset=reached,
                    bootstrap=self._bootstrap,
                )

    def _sort_out(self, messages: Sequence[Message], part: Slice, reached: int) -> tuple[Sequence[Message], bool]:
        """Part records of the slice from errors; the flag says that the end of the slice is proven."""
        if not messages:
            return messages, False
        # by truth: comparing a KafkaError with None leaves an exception set that surfaces elsewhere
        whole = not any(map(Message.error, messages))
        if whole and _at(messages[-1]) < part.end:
            return messages, _at(messages[-1]) == part.end - 1
        kept: list[Message] = []
        for message in messages:
            error = message.error()
            if error is None and _at(message) < part.end:
                kept.append(message)
            elif error is None or (error.code() == KafkaError._PARTITION_EOF and _at(message) >= part.end):
                return kept, True
            elif error.code() != KafkaError._PARTITION_EOF:
                self._raise_unless_passing(error, part, _at(kept[-1]) + 1 if kept else reached)
        return kept, bool(kept) and _at(kept[-1]) == part.end - 1

    def _raise_unless_passing(self, error: KafkaError, part: Slice, reached: int) -> None:
        if error.code() in _GONE:
            raise SourceError(
                f"{self._topic}/{part.partition} at {self._bootstrap}: offsets {reached} to {part.end - 1} cannot be "
                f"read ({error}). They were deleted, or the topic is gone or closed to us. Nothing was landed; "
                "what is still there can be taken with a backfill over its time.",
                first=reached,
                end=part.end,
            )
        if error.fatal():
            raise self._down(f"reading {self._topic}/{part.partition} at offset {reached}", error)
        log.warning("%s/%s: %s; reading goes on", self._topic, part.partition, error)

    def _position(self, consumer: Consumer, part: Slice, messages: Sequence[Message], reached: int) -> int:
        """How far the partition is read: past the last record, or past markers and aborted records after it."""
        if messages:
            return _at(messages[-1]) + 1
        here = TopicPartition(self._topic, int(part.partition))
        return max(int(consumer.position([here])[0].offset), reached)

    def _metadata(self) -> ClusterMetadata:
        """Probe the topic: a missing topic and a dead broker must be told apart, and from an empty topic."""
        try:
            cluster = self._ask_topics()
        except KafkaException as error:
            raise self._down(f"asking for topic {self._topic}", error.args[0]) from error
        found = cluster.topics[self._topic]
        fault = found.error or next((p.error for p in found.partitions.values() if p.error), None)
        if fault is not None and fault.code() in _GONE:
            raise SourceError(
                f"topic {self._topic} at {self._bootstrap} cannot be read: {fault}. Create it, correct its name, or "
                "grant the connection's user the right to read it.",
                topic=self._topic,
            )
        if fault is not None or not found.partitions:
            raise self._down(f"asking for topic {self._topic}", fault)
        return cluster

    def _ask_topics(self) -> ClusterMetadata:
        consumer, first_s = self._plan_consumer(), min(3.0, self._deadline_s)
        try:
            return cast(ClusterMetadata, consumer.list_topics(self._topic, timeout=first_s))
        except KafkaException:
            consumer.poll(0)  # now the client says why, if it knows
            if first_s == self._deadline_s or self._told.is_refused:
                raise
        return cast(ClusterMetadata, consumer.list_topics(self._topic, timeout=self._deadline_s - first_s))

    def _ask_identity(self, patience_s: float) -> str:
        if str(self._metadata().cluster_id).startswith("mock"):
            return ""  # librdkafka's in-process cluster never answers the question below

        def ask(left_s: float) -> str:
            # the controller is asked, which for seconds after a broker's death may be said to be the dead one
            timeout_s = min(left_s, 4.0)
            answers = self._admin().describe_topics(TopicCollection([self._topic]), request_timeout=timeout_s)
            try:
                return str(answers[self._topic].result(timeout_s + 1).topic_id)
            except KafkaException as error:
                if error.args[0].code() in (KafkaError._UNSUPPORTED_FEATURE, KafkaError.UNSUPPORTED_VERSION):
                    return _NO_TOPIC_ID
                raise

        found = self._insist(f"asking for the id of topic {self._topic}", ask, patience_s)
        return "" if found == _NO_TOPIC_ID else found

    def _offsets(self, partitions: Sequence[int], spec: OffsetSpec, *, is_stable: bool = True) -> dict[int, int]:
        """Ask for an offset of each topic partition; an answer below 0 is no answer (a stopped broker gives -1001)."""
        asked = {TopicPartition(self._topic, p): spec for p in partitions}
        isolation = IsolationLevel.READ_COMMITTED if is_stable else IsolationLevel.READ_UNCOMMITTED

        def ask(left_s: float) -> dict[int, int]:
            answers = self._admin().list_offsets(asked, isolation_level=isolation, request_timeout=left_s)
            found = {tp.partition: int(answer.result().offset) for tp, answer in answers.items()}
            if any(offset < 0 for offset in found.values()):
                raise KafkaException(f"it answered {found}")
            return found

        return self._insist(f"asking for offsets of {self._topic}", ask, self._deadline_s) if asked else {}

    def _insist(self, what: str, ask: Callable[[float], T], patience_s: float) -> T:
        """Ask until answered, by a new client each time: after a restart an old one keeps a fenced epoch for ever."""
        deadline = self._clock() + patience_s
        while True:
            try:
                return ask(max(deadline - self._clock(), 0.1))
            except KafkaException as error:
                if self._clock() + 0.5 > deadline or self._told.is_refused:
                    raise self._down(what, error.args[0]) from error
            self._admin_client = None
            time.sleep(0.5)

    def _at_time(self, partitions: Sequence[int], moment: datetime, stable: Mapping[int, int]) -> dict[int, int]:
        ms = int(moment.timestamp() * 1000)
        asked = [TopicPartition(self._topic, p, ms) for p in partitions]
        try:
            found = self._plan_consumer().offsets_for_times(asked, timeout=self._deadline_s)
        except KafkaException as error:
            raise self._down(f"asking for offsets of {self._topic} by time", error.args[0]) from error
        for answer in found:
            if answer.error is not None:
                raise self._down(f"asking for offsets of {self._topic} by time", answer.error)
        ends = {tp.partition: stable[tp.partition] if tp.offset in (OFFSET_END, -1) else tp.offset for tp in found}
        return {p: min(ends[p], stable[p]) for p in partitions}

    def _publish(self, ends: list[TopicPartition]) -> str | None:
        """Commit what is ahead of the group; return what went wrong."""
        answers: list[str | None] = []

        def answered(error: KafkaError | None, offsets: list[TopicPartition] | None) -> None:
            faults = [error, *(o.error for o in offsets or [])]
            answers.append(next((str(f) for f in faults if f is not None), None))

        with closing(self._consumer(on_commit=answered)) as consumer:
            held = consumer.committed(ends, timeout=self._deadline_s)
            ahead = [end for end, now in zip(ends, held, strict=True) if now.offset < end.offset]
            if not ahead:
                return None
            # asynchronous with a deadline of our own: a synchronous commit has none and can block for ever
            consumer.commit(offsets=ahead, asynchronous=True)
            deadline = self._clock() + self._deadline_s
            while not answers and self._clock() < deadline:
                consumer.poll(0.1)
        return answers[0] if answers else f"no answer within {self._deadline_s:.0f} s"

    def _consumer(self, **callbacks: Callable[..., None]) -> Consumer:
        group = self._group or f"airflow-ai-provider-{self._topic}"
        settings = {**consumer_config(self._config, group), "error_cb": self._told.heard, **callbacks}
        return Consumer(settings, logger=cast(logging.Logger, self._told))

    def _plan_consumer(self) -> Consumer:
        # never assigned: a call on an assigned, idle consumer waits behind its own fetch
        if self._planner is None:
            self._planner = self._consumer()
        return self._planner

    def _admin(self) -> AdminClient:
        if self._admin_client is None:
            self._admin_client = AdminClient(
                {**admin_config(self._config), "error_cb": self._told.heard},  # type: ignore[dict-item]  # callbacks are taken
                logger=cast(logging.Logger, self._told),
            )
        return self._admin_client

    def _down(self, what: str, fault: object) -> AiProviderError:
        return self._told.error(what, fault.str() if isinstance(fault, KafkaError) else fault)


def _at(message: Message) -> int:
    return cast(int, message.offset())
