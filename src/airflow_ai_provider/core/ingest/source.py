"""What the author writes to say where rows come from: frozen values, checked on creation, cheap to import.

Invariants: a value does no I/O and loads no client; equal values have equal digests; :func:`open_source` is the only
place that turns one into a reader.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from typing import TYPE_CHECKING, Any

from airflow_ai_provider.core.batch import digest_of
from airflow_ai_provider.errors import SpecError

if TYPE_CHECKING:
    from airflow_ai_provider.core.ingest.contract import Source
    from airflow_ai_provider.core.ingest.encoded.registry import Schemas

_PLAIN = ("text", "bytes")
_KAFKA_FORMATS = ("json", "json_schema", "avro", "protobuf", *_PLAIN)
_KAFKA_BY = ("cursor", "window")
_PARTITION = re.compile(r"(?<!\{)\{partition(?::([^{}]+))?\}(?!\})")
_FILE_FORMATS = ("auto", "jsonl", "csv", "parquet", "image")
_VERIFY = ("changed", "always")


@dataclass(frozen=True)
class KafkaSource:
    """Take rows from a Kafka topic, each once per pipeline.

    :param topic: an existing topic; one object per message. Templated.
    :param key: column that names what a row is about; None: actions are keyed by the row's own id.
    :param by: ``cursor`` takes what was not taken yet (a backfill takes its data interval);
        ``window`` always takes the data interval, by the records' timestamps.
    :param kafka_conn_id: connection of type ``kafka``.
    :param format: how a message's value is written: ``json``; ``json_schema``, ``avro`` or ``protobuf`` in Confluent's
        wire format; ``text`` or ``bytes``, which is the column ``value``.
    :param group: consumer group whose offsets are published after landing, for lag tools only; None takes the
        connection's ``group.id``.
    :param schema_registry_conn_id: connection of type ``schema_registry``, for these three.
    :param reader_schema: Avro schema (JSON text) or ``.proto`` text to read all messages by, or the name of such a file
        (``*.avsc``, ``*.proto``); None: each by the schema it was written by.
    :raises SpecError: on creation, when a value cannot be run; a retry does not help.
    """

    topic: str
    key: str | None = None
    by: str = "cursor"
    kafka_conn_id: str = "kafka_default"
    format: str = "json"
    group: str | None = None
    schema_registry_conn_id: str = "schema_registry_default"
    reader_schema: str | None = None

    def __post_init__(self) -> None:
        _demand_text(self, "topic", "kafka_conn_id", "schema_registry_conn_id")
        _demand_one_of(self, "by", _KAFKA_BY)
        _demand_one_of(self, "format", _KAFKA_FORMATS)

    @property
    def schema_file(self) -> str | None:
        """The file that the reader schema is in, where a file is named."""
        named = self.reader_schema or ""
        return named if "\n" not in named and named.endswith((".avsc", ".proto")) else None

    @property
    def has_schemas(self) -> bool:
        """True when messages can be read with a schema registry only."""
        return self.format in ("json_schema", "avro", "protobuf")

    @property
    def digest(self) -> str:
        """SHA-256 of the value."""
        return digest_of(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON."""
        return {"kind": "kafka", **asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> KafkaSource:
        """Read what :meth:`to_dict` wrote."""
        return cls(**_arguments(cls, data))


@dataclass(frozen=True)
class FileSource:
    """Take rows from files, each file once per pipeline and content.

    :param path: a file, a folder or a pattern (``/data/in/*.jsonl``, ``s3://bucket/in/*.parquet``): anything that
        fsspec opens. ``{partition}`` in it is the run's partition key, without one the date that its data interval
        begins on; ``{partition:%Y/%m/%d}`` is that time, so written. Templated.
    :param key: column that names what a row is about; None: actions are keyed by the row's own id.
    :param format: ``jsonl``, ``csv``, ``parquet``, ``image`` (one row per file), or ``auto``: by the files' suffix.
    :param name: what the source is called in batch names and the ledger; None takes it from the path.
    :param fs_conn_id: connection of type ``ai_store`` or ``aws`` with the keys to the files; None: what the worker has
        from its environment.
    :param verify: ``changed``: a file that was seen before is read again only when its file system says that it has
        changed; ``always``: each listed file is read in each run.
    :raises SpecError: on creation, when a value cannot be run; a retry does not help.
    """

    path: str
    key: str | None = None
    format: str = "auto"
    name: str | None = None
    fs_conn_id: str | None = None
    verify: str = "changed"

    def __post_init__(self) -> None:
        _demand_text(self, "path", *(("fs_conn_id",) if self.fs_conn_id is not None else ()))
        _demand_one_of(self, "format", _FILE_FORMATS)
        _demand_one_of(self, "verify", _VERIFY)

    @property
    def digest(self) -> str:
        """SHA-256 of the value."""
        return digest_of(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON."""
        return {"kind": "files", **asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FileSource:
        """Read what :meth:`to_dict` wrote."""
        return cls(**_arguments(cls, data))

    @property
    def is_partitioned(self) -> bool:
        """True when each run takes the files of its own partition."""
        return _PARTITION.search(self.path) is not None

    @property
    def folder(self) -> str | None:
        """The folder above all partitions, that files are named relative to; None when there are no partitions."""
        found = _PARTITION.search(self.path)
        return self.path[: found.start()].rpartition("/")[0] if found else None

    def path_of(self, key: str | None, time: datetime | None) -> str:
        """Return the path of one partition.

        :param key: the run's partition key.
        :param time: the partition's time, or when the run's data interval begins.
        :raises SpecError: when the run has neither, or its key cannot stand in a path; a retry does not help.
        """

        def place(found: re.Match[str]) -> str:
            if found[1]:
                return _time_of(key, time, self.path).strftime(found[1])
            return key or _time_of(key, time, self.path).strftime("%Y-%m-%d")

        if key and (set(key) & set("*?[]{}") or ".." in key):
            raise SpecError(
                f"FileSource: partition key {key!r} cannot stand in {self.path}: it has one of * ? [ ] {{ }} or '..'. "
                "Give the partition another key, or name the path by time: {partition:%Y-%m-%d}.",
                faults=[("partition", "not a name")],
            )
        return _PARTITION.sub(place, self.path)


_KINDS: dict[str, type[KafkaSource] | type[FileSource]] = {"kafka": KafkaSource, "files": FileSource}


def source_from_dict(data: Mapping[str, Any]) -> KafkaSource | FileSource:
    """Read what either value's ``to_dict`` wrote.

    :raises SpecError: when it is of no known kind; a retry does not help.
    """
    kind = data.get("kind")
    if kind not in _KINDS:
        raise SpecError(f"a source has kind {kind!r}; known kinds are {sorted(_KINDS)}.", faults=[("kind", "unknown")])
    return _KINDS[kind].from_dict(data)


def open_source(
    value: KafkaSource | FileSource,
    *,
    kafka_config: Mapping[str, Any] | None = None,
    storage_options: Mapping[str, Any] | None = None,
    schemas: Schemas | None = None,
    columns: Sequence[str] = (),
    folder: str | None = None,
) -> Source:
    """Make the reader of a source value; nothing is contacted yet.

    :param kafka_config: client configuration of the Kafka connection, with ``bootstrap.servers``.
    :param storage_options: keyword arguments of the files' file system.
    :param schemas: the schema registry, for formats that have schemas.
    :param columns: columns that the expectations declare: messages of a schema with none of them are rejected.
    :param folder: that files are named relative to; None: the path's own.
    :raises SpecError: when the reader schema cannot be used, or there is no registry; a retry does not help.
    """
    if isinstance(value, KafkaSource):
        from airflow_ai_provider.core.ingest.kafka import KafkaReader

        reader = KafkaReader(dict(kafka_config or {}), value.topic, key=value.key, group=value.group)
        return reader if value.format == "json" else _encoded(reader, value, schemas, columns)
    from airflow_ai_provider.core.ingest.files import FileReader

    return FileReader(
        value.path,
        format=value.format,
        name=value.name,
        key=value.key,
        storage_options=dict(storage_options or {}),
        folder=folder,
        verify=value.verify,
    )


def _encoded(reader: Source, value: KafkaSource, schemas: Schemas | None, columns: Sequence[str]) -> Source:
    from airflow_ai_provider.core.ingest.encoded.framed_json import FramedJsonSource
    from airflow_ai_provider.core.ingest.encoded.source import open_encoded, open_plain

    if value.format in _PLAIN:
        return open_plain(reader, value.format)
    if schemas is None:
        raise SpecError(
            f"KafkaSource: format={value.format!r} needs a schema registry; name its connection.",
            faults=[("schema_registry_conn_id", "no registry")],
        )
    if value.format == "json_schema":
        return FramedJsonSource(reader, schemas)
    return open_encoded(reader, value.format, schemas, value.reader_schema, columns)


def _time_of(key: str | None, time: datetime | None, path: str) -> datetime:
    if time is not None:
        return time
    try:
        return datetime.fromisoformat(key or "")
    except ValueError:
        has = f"the partition key {key!r}, which is no time" if key else "neither a partition key nor a data interval"
        raise SpecError(
            f"FileSource: {path} names a partition, and the run has {has}. Use a schedule that gives runs one "
            '(CronDataIntervalTimetable, CronPartitionTimetable; in a pipeline file "@daily" does), or plain '
            "{partition} for a key that is no time.",
            faults=[("path", "the run has no such partition")],
        ) from None


def _arguments(cls: type[Any], data: Mapping[str, Any]) -> dict[str, Any]:
    return {f.name: data[f.name] for f in fields(cls) if f.name in data}


def _demand_text(value: Any, *names: str) -> None:
    for name in names:
        text = getattr(value, name)
        if not isinstance(text, str) or not text.strip():
            raise SpecError(
                f"{type(value).__name__}: {name}={text!r}; it must be a text that is not empty.",
                faults=[(name, "empty")],
            )


def _demand_one_of(value: Any, name: str, allowed: tuple[str, ...]) -> None:
    found = getattr(value, name)
    if found not in allowed:
        raise SpecError(
            f"{type(value).__name__}: {name}={found!r}; it must be one of {', '.join(allowed)}.",
            faults=[(name, f"must be one of {', '.join(allowed)}")],
        )
