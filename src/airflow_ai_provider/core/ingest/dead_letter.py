"""Send the quarantined rows of a landed batch to a dead-letter topic, each once. A door to confluent_kafka.

Invariants: nothing is sent before the batch is durable; letters and how many there are so far are committed in one
Kafka transaction, so a kill at any instruction neither loses nor doubles one; the ledger is marked last, and a marked
batch is never sent again.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, ConfigResource  # type: ignore[attr-defined]  # re-exported, unsaid

from airflow_ai_provider.core.batch import QUARANTINE, ROW_ID, BatchRef, digest_of
from airflow_ai_provider.core.ingest.contract import ORIGIN, PAYLOAD, REASONS, STAGE
from airflow_ai_provider.core.ingest.kafka_config import Told, admin_config, consumer_config
from airflow_ai_provider.core.ledger import Claim, Ledger
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.errors import ConnectionConfigError, SourceError, SourceUnavailableError

log = logging.getLogger(__name__)

_LETTERS, _BYTES = 10_000, 32 * 1024 * 1024  # of one transaction: fewer letters cost more per letter, bytes cost memory
_REASON, _REASONS = 500, 8  # characters of one, and how many, go along: brokers bound a record, headers and all
_LIMIT, _OVERHEAD = 1_048_588, 200  # bytes: Kafka's default bound of a record, and what a record is beside its parts
_DENIED = (
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.GROUP_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
    KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED,
)


@dataclass(frozen=True)
class Letter:
    """One quarantined row on its way.

    :param value: the row's bytes; None for a tombstone.
    """

    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes]]

    @property
    def size(self) -> int:
        """Bytes of the record, as good as exact."""
        parts = sum(len(name) + len(value) + 4 for name, value in self.headers)
        return len(self.key or b"") + len(self.value or b"") + parts + _OVERHEAD


def send_letters(
    store: Store, ledger: Ledger, claim: Claim, topic: str, config: Mapping[str, Any], *, patience_s: float = 60.0
) -> int:
    """Send what a landed batch has in quarantine, unless it was sent.

    1. Ask the ledger whether it was sent.
    2. Settle what a killed try left, and read how many letters got through.
    3. Send the others, some thousand per transaction, with their number committed in the same transaction.
    4. Mark it in the ledger.

    :param claim: of the batch, landed.
    :param config: client settings of the Kafka connection.
    :param patience_s: how long one answer of the broker is waited for.
    :return: how many letters this call sent.
    :raises SourceUnavailableError: when the broker does not answer; a retry sends only what is missing.
    :raises SourceError: when there is no such topic; a retry does not help.
    :raises ConnectionConfigError: when the broker does not allow it; a retry does not help.
    """
    ref = claim.ref
    if ref is None or not ref.counts.get("quarantined"):
        return 0
    if ledger.has_lettered(claim.pipeline, claim.run_id, ref, topic):  # 1
        return 0
    total, before = int(ref.counts["quarantined"]), 0
    courier: Courier | None = None
    try:
        name = f"ai-letters-{digest_of([claim.pipeline, topic, ref.digest])[7:39]}"
        courier = Courier(config, topic, name, patience_s)
        before = courier.settle()  # 2
        for letters in _chunks(_letters(store, ref, claim, skip=before)):  # 3
            courier.send(letters)
    except KafkaException as error:
        raise _told(error.args[0], ref, topic, courier.sent if courier else 0, total) from error
    finally:
        if courier is not None:
            courier.close()
    ledger.lettered(claim.pipeline, claim.run_id, ref, topic)  # 4
    log.info("sent %d of %d quarantined rows of batch %s to topic %s", total - before, total, ref.batch_id, topic)
    return total - before


class Courier:
    """Send the letters of one batch in transactions that also count them.

    The count is a committed offset of a consumer group of the batch's own: the one thing that Kafka commits together
    with records, and that can be read after a crash.

    :param name: of the transactional id and of the group; the same for every try.
    """

    def __init__(self, config: Mapping[str, Any], topic: str, name: str, patience_s: float) -> None:
        self._config, self._topic, self._name, self._patience_s = dict(config), topic, name, patience_s
        self.sent = 0
        told = Told(str(config.get("bootstrap.servers")))
        self._says: dict[str, Any] = {"error_cb": told.heard, "logger": told}
        self._limit = self._find_limit()
        self._reader = Consumer({**consumer_config(config, name), **self._says})
        self._producer = Producer(self._settings())

    def settle(self) -> int:
        """Finish or undo what an earlier try left open, and return how many letters got through."""
        self._producer.init_transactions(self._patience_s)
        (found,) = self._reader.committed([TopicPartition(self._topic, 0)], timeout=self._patience_s)
        self.sent = max(found.offset, 0)
        return self.sent

    def send(self, letters: Sequence[Letter]) -> None:
        """Deliver letters, all or none, and count them."""
        producer, reports = self._producer, _Reports()
        producer.begin_transaction()
        for letter in letters:
            self._produce(letter, reports)
        producer.flush(self._patience_s)
        if reports.fault is not None or reports.delivered != len(letters):
            raise KafkaException(reports.fault or KafkaError(KafkaError._TIMED_OUT))
        count = TopicPartition(self._topic, 0, self.sent + len(letters))
        producer.send_offsets_to_transaction([count], self._reader.consumer_group_metadata(), self._patience_s)
        self._commit()
        self.sent += len(letters)

    def close(self) -> None:
        """Leave the broker; what is unfinished is settled by the next try."""
        self._reader.close()

    def _produce(self, letter: Letter, reports: _Reports) -> None:
        value = letter.value
        headers: list[tuple[str, str | bytes | None]] = list(letter.headers)
        if value is not None and letter.size > self._limit:
            # refused by the broker, it would take the whole transaction with it, in every try
            headers.append(("ai.payload_bytes_left_out", str(len(value)).encode()))
            value = None
        until = time.monotonic() + self._patience_s
        while True:
            try:
                self._producer.produce(self._topic, value, letter.key, headers=headers, on_delivery=reports.note)
                return
            except BufferError:  # the queue is full: let some leave
                if time.monotonic() > until:
                    raise KafkaException(KafkaError(KafkaError._QUEUE_FULL)) from None
                self._producer.poll(0.1)

    def _commit(self) -> None:
        """Commit; an answer that did not come is asked for again: to abort now could undo what was committed."""
        until = time.monotonic() + self._patience_s
        while True:
            try:
                self._producer.commit_transaction(self._patience_s)
                return
            except KafkaException as error:
                if not error.args[0].retriable() or time.monotonic() > until:
                    raise

    def _find_limit(self) -> int:
        """Ask how large a record of the topic may be; who may not ask gets Kafka's default."""
        admin = AdminClient({**admin_config(self._config), **self._says})
        if self._topic not in admin.list_topics(timeout=self._patience_s).topics:
            raise SourceError(
                f"there is no topic {self._topic} for dead letters. Create it, or correct its name; then clear the "
                "task: its batch is landed, only the letters are sent.",
                topic=self._topic,
            )
        asked = ConfigResource(ConfigResource.Type.TOPIC, self._topic)
        try:
            found = admin.describe_configs([asked], request_timeout=self._patience_s)[asked].result(self._patience_s)
            return int(found["max.message.bytes"].value)
        except KafkaException as error:
            if error.args[0].code() not in _DENIED:
                raise
            return _LIMIT

    def _settings(self) -> dict[str, Any]:
        return {
            **admin_config(self._config),
            **self._says,
            "transactional.id": self._name,
            "enable.idempotence": True,
            "transaction.timeout.ms": 60_000,
            "message.timeout.ms": min(60_000, int(self._patience_s * 1000)),
            "message.max.bytes": min(max(self._limit, 1000), 1_000_000_000),
            "batch.size": min(max(self._limit - _OVERHEAD, 1), 1_000_000),  # records travel together
        }


class _Reports:
    """What became of the letters of one transaction. A report that does not come is no success."""

    def __init__(self) -> None:
        self.delivered = 0
        self.fault: KafkaError | None = None

    def note(self, error: KafkaError | None, _: Any) -> None:
        """Take one report."""
        # by identity: comparing a KafkaError with None leaves an exception set that surfaces elsewhere
        if error is None:
            self.delivered += 1
        elif self.fault is None:
            self.fault = error


def _letters(store: Store, ref: BatchRef, claim: Claim, skip: int) -> Iterator[Letter]:
    """Make the letters of a batch, always in the same order, behind those that got through."""
    common = {"ai.pipeline": claim.pipeline, "ai.run_id": claim.run_id, "ai.batch_id": ref.batch_id}
    for part in store.read(ref, QUARANTINE):
        if skip >= part.num_rows:
            skip -= part.num_rows
            continue
        for row in part.slice(skip).to_pylist():
            yield _letter(row, common)
        skip = 0


def _letter(row: Mapping[str, Any], common: Mapping[str, str]) -> Letter:
    reasons = list(row[REASONS] or [])
    told = [reason[:_REASON] for reason in reasons[:_REASONS]]
    told += [f"{len(reasons) - _REASONS} more"] if len(reasons) > _REASONS else []
    facts = {**common, "ai.row_id": row[ROW_ID], "ai.stage": row[STAGE]}
    facts["ai.reasons"] = json.dumps(told, ensure_ascii=False)
    for name in ORIGIN:
        if name != "_key" and row.get(name) is not None:
            value = row[name]
            facts[f"ai{name.replace('_', '.', 1)}"] = value.isoformat() if hasattr(value, "isoformat") else str(value)
    headers = [(name, value.encode(errors="replace")) for name, value in facts.items()]
    return Letter(row["_key"] if "_key" in row else row[ROW_ID].encode(errors="replace"), row[PAYLOAD], headers)


def _chunks(letters: Iterator[Letter]) -> Iterator[list[Letter]]:
    held: list[Letter] = []
    size = 0
    for letter in letters:
        held.append(letter)
        size += len(letter.value or b"")
        if len(held) >= _LETTERS or size >= _BYTES:
            yield held
            held, size = [], 0
    if held:
        yield held


def _told(error: KafkaError, ref: BatchRef, topic: str, sent: int, total: int) -> Exception:
    what = (
        f"batch {ref.batch_id} is landed; {sent} of its {total} quarantined rows are in topic {topic}: {error.str()}."
    )
    if error.code() in _DENIED:
        return ConnectionConfigError(
            f"{what} Allow the connection's user to write to the topic, to use transactional ids and groups that begin "
            "with ai-letters-; then clear the task: only the letters are sent.",
            topic=topic,
        )
    return SourceUnavailableError(f"{what} The retry sends only the others.", topic=topic, sent=sent)
