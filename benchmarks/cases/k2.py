"""K2: Avro messages (Confluent's wire format, 12 fields, 0.1 % malformed) from a real broker and registry, to Parquet.

The limit consumes the same messages and throws them away. Ours is the whole verb ingest (:mod:`benchmarks.ingesting`),
as one task, and in as many shards as there are cores. The neighbours keep topic partition, offset and time and write
one Parquet file; none of them keeps the malformed bytes.
"""

from __future__ import annotations

import gc
import io
import itertools
import json
import os
import random
import secrets
import struct
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from confluent_kafka import Message, Producer

from benchmarks import kafka, servers
from benchmarks.harness import Case, Place, Run

if TYPE_CHECKING:
    from airflow_ai_provider.core.batch import BatchRef
    from airflow_ai_provider.core.ingest.contract import Source, Validator
    from airflow_ai_provider.core.store import Store

TOPIC, PARTITIONS, BAD = "readings", 4, 1000  # one in so many is malformed
SCHEMA = {
    "type": "record",
    "name": "Reading",
    "fields": [
        {"name": "reading_id", "type": "string"},
        {"name": "device", "type": "string"},
        {"name": "site", "type": {"type": "enum", "name": "Site", "symbols": ["north", "south", "east", "west"]}},
        {"name": "taken_at", "type": {"type": "long", "logicalType": "timestamp-millis"}},
        {"name": "temperature", "type": "double"},
        {"name": "humidity", "type": "double"},
        {"name": "pressure", "type": "double"},
        {"name": "count", "type": "int"},
        {"name": "sequence", "type": "long"},
        {"name": "valid", "type": "boolean"},
        {"name": "note", "type": ["null", "string"]},
        {"name": "operator", "type": "string"},
    ],
}


def _reading(i: int, chance: random.Random) -> dict[str, Any]:
    return {
        "reading_id": f"reading-{i:012d}",
        "device": f"device-{chance.randrange(5000):05d}",
        "site": chance.choice(["north", "south", "east", "west"]),
        "taken_at": 1_767_225_600_000 + i * 250,
        "temperature": round(chance.gauss(20, 5), 3),
        "humidity": round(chance.random() * 100, 2),
        "pressure": round(chance.gauss(1013, 8), 2),
        "count": chance.randrange(100_000),
        "sequence": i,
        "valid": chance.random() < 0.98,
        "note": None if i % 3 else f"checked by hand, run {chance.randrange(1000)}",
        "operator": f"operator {chance.randrange(200)} of the night shift",
    }


def make(place: Place) -> None:
    """Start broker and registry, register the schema, produce the messages."""
    import fastavro

    from airflow_ai_provider.core.ingest.encoded.registry import SchemaRegistry
    from tests.servers.registry import register

    found = servers.start(place.folder, "kafka", "registry")
    number = register(found["registry"], f"{TOPIC}-value", SCHEMA)
    assert SchemaRegistry(found["registry"]).schema(number) is not None
    kafka.create_topic(found["kafka"], TOPIC, PARTITIONS)
    producer = Producer({**kafka.PRODUCER, "bootstrap.servers": found["kafka"]})
    parsed, chance, header = fastavro.parse_schema(SCHEMA), random.Random(2), b"\0" + struct.pack(">i", number)
    failures: list[Any] = []
    for i in range(place.size):
        sink = io.BytesIO()
        fastavro.schemaless_writer(sink, parsed, _reading(i, chance))
        value = header + sink.getvalue()
        if i % BAD == BAD // 2:
            value = (value[:30], value + b"\0", value[:5])[i // BAD % 3]
        if i % 50_000 == 0:
            producer.flush(60)  # its queue holds 100,000
        producer.produce(TOPIC, value, partition=i % PARTITIONS, on_delivery=lambda e, _: failures.append(e))
        producer.poll(0)
    assert producer.flush(120) == 0
    assert failures == [None] * place.size


def open_limit(place: Place) -> Run:
    """Consume and discard."""

    def run() -> None:
        assert sum(map(len, kafka.messages(place, TOPIC, PARTITIONS))) == place.size

    return run


def open_source(found: dict[str, str]) -> Source:
    from airflow_ai_provider.core.ingest.encoded.avro.decoder import AvroDecoder
    from airflow_ai_provider.core.ingest.encoded.registry import SchemaRegistry
    from airflow_ai_provider.core.ingest.encoded.source import EncodedSource
    from airflow_ai_provider.core.ingest.kafka import KafkaReader

    reader = KafkaReader({"bootstrap.servers": found["kafka"]}, TOPIC, key="reading_id")
    return EncodedSource(reader, lambda: AvroDecoder(SchemaRegistry(found["registry"])))


def open_validator() -> Validator:
    from airflow_ai_provider.core.ingest.contract import AcceptAll

    return AcceptAll()


def open_ours(place: Place) -> Run:
    """Ingest one span, as one task does."""
    from benchmarks import ingesting

    return ingesting.open_one(place, open_source, open_validator)


def open_sharded(place: Place) -> Run:
    """The same in shards."""
    from benchmarks import ingesting

    return ingesting.open_sharded(place, open_source, open_validator)


def _per_message(place: Place, name: str, decode: Callable[[bytes], dict[str, Any]]) -> Run:
    """What people write: decode each message, collect, one frame, one file."""
    import pandas as pd

    def run() -> None:
        rows = []
        for messages in kafka.messages(place, TOPIC, PARTITIONS):
            for message in messages:
                try:
                    row = decode(message.value())  # type: ignore[arg-type]
                except Exception:
                    continue  # malformed: most people log it and go on
                row["_partition"], row["_offset"] = message.partition(), message.offset()
                row["_timestamp"] = message.timestamp()[1]
                rows.append(row)
        pd.DataFrame(rows).to_parquet(place.folder / f"{name}.parquet", compression="zstd")

    return run


def open_deserializer(place: Place) -> Run:
    """Confluent's AvroDeserializer, its schema cached."""
    from confluent_kafka.schema_registry import SchemaRegistryClient
    from confluent_kafka.schema_registry.avro import AvroDeserializer
    from confluent_kafka.serialization import MessageField, SerializationContext

    read = AvroDeserializer(SchemaRegistryClient({"url": servers.addresses(place.folder)["registry"]}))
    context = SerializationContext(TOPIC, MessageField.VALUE)
    return _per_message(place, "deserializer", lambda value: read(value, context))


def _strict_fastavro() -> Callable[[bytes], dict[str, Any]]:
    import fastavro

    parsed = fastavro.parse_schema(SCHEMA)

    def decode(value: bytes) -> dict[str, Any]:
        source = io.BytesIO(value)
        source.seek(5)
        row = fastavro.schemaless_reader(source, parsed, None)
        assert source.tell() == len(value)
        return row  # type: ignore[return-value]

    return decode


def open_fastavro(place: Place) -> Run:
    """fastavro per message; a body's end is checked, or it would take overlong ones."""
    return _per_message(place, "fastavro", _strict_fastavro())


class _Container:
    """Reads messages as one Avro container block, and proves by a sentinel behind each that none has moved."""

    def __init__(self, most: int) -> None:
        self._decode = _strict_fastavro()
        header = {"name": "h_", "type": {"type": "fixed", "name": "H", "size": 5}}
        fields = [header, *SCHEMA["fields"], {"name": "s_", "type": "long"}]
        self._nonce, self._sync = secrets.randbits(60), secrets.token_bytes(16)
        self._sentinels = [_zigzag(self._nonce + i) for i in range(most)]
        self._head = b"Obj\x01" + _zigzag(2)
        schema = json.dumps({**SCHEMA, "fields": fields}).encode()
        for text in (b"avro.schema", schema, b"avro.codec", b"null"):
            self._head += _zigzag(len(text)) + text
        self._head += b"\0" + self._sync

    def read(self, messages: list[Message]) -> Any:
        """Return a frame, or None when one of the messages is malformed."""
        import polars as pl

        count = len(messages)
        parts: list[bytes] = [b""] * (2 * count)
        parts[::2], parts[1::2] = list(map(Message.value, messages)), self._sentinels[:count]
        body = b"".join(parts)
        block = self._head + _zigzag(count) + _zigzag(len(body)) + body + self._sync
        try:
            frame = pl.read_avro(io.BytesIO(block))
        except BaseException as error:  # polars panics on malformed bytes, which is no Exception
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            return None
        expected = pl.int_range(self._nonce, self._nonce + count, eager=True)
        if frame.height != count or not (frame["s_"] == expected).all():
            return None
        at = list(map(Message.timestamp, messages))
        meta = {"_partition": list(map(Message.partition, messages)), "_offset": list(map(Message.offset, messages))}
        return frame.drop("h_", "s_").hstack(pl.DataFrame({**meta, "_timestamp": [t[1] for t in at]}))

    def good(self, messages: list[Message]) -> Iterator[Any]:
        """Read a block, or its parts of 100; of a part that fails, each message by itself."""
        frame = self.read(messages)
        if frame is not None:
            yield frame
        elif len(messages) > 100:
            for first in range(0, len(messages), 100):
                yield from self.good(messages[first : first + 100])
        else:
            yield self._one_by_one(messages)

    def _one_by_one(self, messages: list[Message]) -> Any:
        import polars as pl

        rows = []
        for message in messages:
            try:
                row = self._decode(message.value() or b"")
            except Exception:
                continue
            row["taken_at"] = row["taken_at"].replace(tzinfo=None)
            at = {"_partition": message.partition(), "_offset": message.offset(), "_timestamp": message.timestamp()[1]}
            rows.append({**row, **at})
        return pl.DataFrame(rows)


def open_polars(place: Place) -> Run:
    """The best by hand so far: 20,000 messages at a time through polars' Avro reader."""
    import polars as pl

    os.environ["RUST_BACKTRACE"] = "0"  # each malformed block would print one, and take its time over it
    container = _Container(20_000)
    names = [*(field["name"] for field in SCHEMA["fields"]), "_partition", "_offset", "_timestamp"]

    def run() -> None:
        gc.disable()
        frames, held = [], []
        for messages in itertools.chain(kafka.messages(place, TOPIC, PARTITIONS), [[]]):
            held += messages
            if len(held) >= 20_000 or not messages:
                frames += container.good(held)
                held = []
        plain = [frame.cast({"site": pl.String, "taken_at": pl.Datetime("ms"), "count": pl.Int64}) for frame in frames]
        pl.concat(plain).select(names).write_parquet(
            place.folder / "polars.parquet", compression="zstd", compression_level=1
        )
        gc.enable()

    return run


def _zigzag(number: int) -> bytes:
    number, out = number << 1, bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def check(place: Place) -> None:
    """All have the same good rows; ours has the malformed ones besides, byte for byte.

    AvroDeserializer takes messages with a byte too many for good ones: those rows of its are set aside.
    """
    from benchmarks import ingesting

    names = [field["name"] for field in SCHEMA["fields"]]
    ours, sharded = (_check_ours(place, ref, store, names) for ref, store in ingesting.landed(place))
    assert ours.equals(sharded)
    chance = random.Random(2)
    made = [_reading(i, chance) for i in range(place.size)]
    good = [row for i, row in enumerate(made) if i % BAD != BAD // 2]
    assert ours["reading_id"].to_pylist() == [row["reading_id"] for row in good]
    assert ours["temperature"].to_pylist() == [row["temperature"] for row in good]
    assert ours["note"].to_pylist() == [row["note"] for row in good]
    for name in ("deserializer", "fastavro", "polars"):
        theirs = _sorted(pq.read_table(place.folder / f"{name}.parquet"), names)
        taken = pc.is_in(theirs["sequence"], ours["sequence"].combine_chunks())
        overlong = sum(i // BAD % 3 == 1 for i in range(BAD // 2, place.size, BAD))
        assert pc.sum(pc.invert(taken)).as_py() == (overlong if name == "deserializer" else 0), name
        theirs = theirs.filter(taken)
        for column in ("_partition", "_offset", *names):
            mine, other = ours[column], theirs[column]
            if column == "taken_at":
                mine, other = (pc.cast(c, pa.timestamp("us", tz="UTC")) for c in (mine, other))
            assert mine.cast(other.type).combine_chunks().equals(other.combine_chunks()), (name, column)


def _check_ours(place: Place, ref: BatchRef, store: Store, names: list[str]) -> pa.Table:
    bad = len(range(BAD // 2, place.size, BAD))
    assert ref.counts == {"read": place.size, "accepted": place.size - bad, "quarantined": bad}, ref.counts
    for part in store.read(ref, "quarantine"):
        assert all(reasons[0].startswith("broken_avro: ") for reasons in part["_reasons"].to_pylist())
        assert part["_payload"].null_count == 0
    return _sorted(pa.concat_tables(store.read(ref, "accepted")), names)


def _sorted(table: pa.Table, names: list[str]) -> pa.Table:
    table = table.select([*names, "_partition", "_offset"])
    plain = [column.cast(pa.string()) if _is_text(column.type) else column for column in table.columns]
    return pa.table(plain, names=table.column_names).sort_by("sequence")


def _is_text(type_: pa.DataType) -> bool:
    return pa.types.is_dictionary(type_) or pa.types.is_large_string(type_) or pa.types.is_string_view(type_)


CASE = Case(
    title="Avro messages from a real broker and registry to Parquet, malformed ones split off",
    unit="messages/s",
    sizes=(400_000, 40_000),
    size_unit="messages",
    goal="≥ 0.35 of the limit, ≥ 8 times AvroDeserializer",
    make=make,
    check=check,
    contenders={
        "limit": open_limit,
        "ours": open_ours,
        "ours, two shards": open_sharded,
        "AvroDeserializer per message": open_deserializer,
        "fastavro per message": open_fastavro,
        "polars, one container block": open_polars,
    },
    packages=("confluent-kafka", "pyarrow", "numpy", "fastavro", "polars", "pandas"),
)
