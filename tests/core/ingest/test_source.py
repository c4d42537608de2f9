"""What the author writes: values that are checked, compared and carried as JSON, and cost no import."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime

import pytest

from airflow_ai_provider.core.ingest.files import FileReader
from airflow_ai_provider.core.ingest.kafka import KafkaReader
from airflow_ai_provider.core.ingest.source import FileSource, KafkaSource, open_source, source_from_dict
from airflow_ai_provider.errors import SpecError


@pytest.mark.parametrize(
    "value", [KafkaSource("t", key="id", group="g"), FileSource("/data/*.csv", name="n", format="csv")]
)
def test_a_value_survives_json_and_has_a_digest(value: KafkaSource | FileSource) -> None:
    again = source_from_dict(value.to_dict())
    assert again == value
    assert again.digest == value.digest != KafkaSource("other").digest
    assert hash(again) == hash(value)


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: KafkaSource(""), "topic"),
        (lambda: KafkaSource("t", by="offset"), "cursor, window"),
        (lambda: KafkaSource("t", format="xml"), "json"),
        (lambda: FileSource(" "), "path"),
        (lambda: FileSource("x", format="xls"), "parquet"),
        (lambda: source_from_dict({"kind": "carrier pigeon"}), "carrier pigeon"),
    ],
)
def test_what_cannot_be_run_is_refused_on_creation(make: object, what: str) -> None:
    with pytest.raises(SpecError, match=what):
        make()  # type: ignore[operator]


def test_opening_contacts_nothing() -> None:
    reader = open_source(KafkaSource("t", key="id"), kafka_config={"bootstrap.servers": "127.0.0.1:1"})
    assert isinstance(reader, KafkaReader)
    assert (reader.name, reader.key, reader.format) == ("kafka:t", "id", "json")
    reader.close()
    files = open_source(FileSource("/nowhere/*.csv", key="id"))
    assert isinstance(files, FileReader)
    assert (files.name, files.key, files.format) == ("files:nowhere", "id", "csv")


def test_the_values_load_no_giant() -> None:
    code = (
        "import sys; import airflow_ai_provider.core.ingest.source as s; s.KafkaSource('t'); s.FileSource('p').digest;"
        "giants = ('pyarrow', 'confluent_kafka', 'great_expectations', 'pandas', 'airflow');"
        "print([m for m in giants if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_path_of_a_partition() -> None:
    source = FileSource("s3://lake/in/day={partition}/*.parquet")
    day = datetime(2026, 11, 1, 6, tzinfo=UTC)
    assert source.is_partitioned
    assert source.folder == "s3://lake/in"
    assert source.path_of("2026-11-02", day) == "s3://lake/in/day=2026-11-02/*.parquet"
    assert source.path_of(None, day) == "s3://lake/in/day=2026-11-01/*.parquet"
    hourly = FileSource("/in/{partition:%Y/%m/%d/%H}")
    assert hourly.path_of("eu", day) == "/in/2026/11/01/06"
    assert hourly.path_of("2026-11-01T07:00:00", None) == "/in/2026/11/01/07"
    assert not FileSource("/in/{{ ds }}/{{partition}}/*.csv").is_partitioned, "a template is none"
    assert FileSource("/in/*.csv").folder is None
    for use, told in (
        (lambda: source.path_of(None, None), "the run has neither a partition key nor a data interval"),
        (lambda: hourly.path_of("eu", None), "the partition key 'eu', which is no time"),
        (lambda: source.path_of("../secret", day), "cannot stand in"),
        (lambda: source.path_of("*", day), "cannot stand in"),
    ):
        with pytest.raises(SpecError, match=told):
            use()
