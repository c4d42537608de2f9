"""Files and batches on a real S3 API: every format, one digest each time, and what each failure says."""

from __future__ import annotations

import io
import itertools
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from airflow_ai_provider.core.batch import ACCEPTED
from airflow_ai_provider.core.ingest.contract import AcceptAll
from airflow_ai_provider.core.ingest.files import FileReader
from airflow_ai_provider.core.ingest.flow import IngestRun, ingest
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.errors import ConnectionConfigError, SourceError, SourceUnavailableError
from airflow_ai_provider.testing import MemoryLedger

if TYPE_CHECKING:
    from tests.servers.proxy import TcpProxy
    from tests.servers.s3 import S3Server

pytestmark = pytest.mark.integration
_numbers = itertools.count(1)
RUN = IngestRun("p", "r", "k")


@pytest.fixture
def bucket(s3_server: S3Server) -> tuple[str, Any]:
    """A bucket of this test's own, and a file system that sees it."""
    name = f"test-{next(_numbers)}"
    return name, s3_server.bucket(name)


def parquet(rows: int) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"a": range(rows)}), sink)
    return sink.getvalue()


def png() -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (4, 4)).save(sink, "png")
    return sink.getvalue()


FILES: dict[str, Callable[[], bytes]] = {
    "jsonl": lambda: b'{"a":0}\n{"a":1}\n',
    "csv": lambda: b"a\n0\n1\n",
    "parquet": lambda: parquet(2),
    "png": png,
}


@pytest.mark.parametrize("suffix", FILES)
def test_files_and_batches_on_s3(s3_server: S3Server, bucket: tuple[str, Any], suffix: str) -> None:
    name, files = bucket
    files.pipe_file(f"{name}/in/1.{suffix}", FILES[suffix]())
    files.pipe_file(f"{name}/in/deep/2.{suffix}", FILES[suffix]())
    store, ledger = Store(f"s3://{name}/store", s3_server.options), MemoryLedger()
    reader = FileReader(f"s3://{name}/in", storage_options=s3_server.options)
    ref = ingest(reader, AcceptAll(), store, ledger, RUN)
    assert ref.counts == {"read": 2 if suffix == "png" else 4, "accepted": ref.counts["read"], "quarantined": 0}
    rows = pa.concat_tables(store.read(ref, ACCEPTED))
    assert set(rows["_file"].to_pylist()) == {f"1.{suffix}", f"deep/2.{suffix}"}
    written = files.find(f"{name}/store")
    assert not [path for path in written if path.endswith(".aside")], "an object is whole or not there: none lies aside"
    files.rm(f"{name}/store", recursive=True)
    assert ingest(reader, AcceptAll(), store, MemoryLedger(), RUN) == ref, "the same files give the same bytes"
    assert files.find(f"{name}/store") == written


def test_a_file_that_came_since_is_seen_at_once(s3_server: S3Server, bucket: tuple[str, Any]) -> None:
    name, files = bucket
    reader = FileReader(f"s3://{name}/in/*.jsonl", storage_options=s3_server.options)
    assert reader.plan({}, {}, None, None).is_empty, "no folder in an object store is no error: nothing came yet"
    for number in range(3):
        files.pipe_file(f"{name}/in/{number}.jsonl", b"{}\n")
        again = FileReader(f"s3://{name}/in/*.jsonl", storage_options=s3_server.options)
        assert len(again.plan({}, {}, None, None).slices) == number + 1


def test_an_object_that_did_not_change_is_not_downloaded_again(
    s3_server: S3Server, bucket: tuple[str, Any], tcp_proxy: Callable[[str, int], TcpProxy]
) -> None:

    name, files = bucket
    files.pipe({f"{name}/in/{n:04d}.jsonl": b'{"a":%d}\n' % n for n in range(40)})
    store, ledger = Store(f"s3://{name}/store", s3_server.options), MemoryLedger()

    proxy = tcp_proxy("127.0.0.1", s3_server.port)
    options = {**s3_server.options, "endpoint_url": f"http://{proxy.address}"}

    def downloads(run: str) -> tuple[int, int]:
        proxy.heard.clear()
        reader = FileReader(f"s3://{name}/in/*.jsonl", storage_options=options)
        ref = ingest(reader, AcceptAll(), store, ledger, IngestRun("p", run, run))
        return ref.counts["read"], sum(piece.startswith(f"GET /{name}/in/".encode()) for piece in proxy.heard)

    assert downloads("1") == (40, 80)
    assert downloads("2") == (0, 0)
    files.pipe_file(f"{name}/in/new.jsonl", b"{}\n")
    assert downloads("3") == (1, 2), "once for its digest, once for its rows"
    files.pipe_file(f"{name}/in/new.jsonl", b"{}\n")
    assert downloads("4")[0] == 0, "the same bytes, put there again"
    files.pipe_file(f"{name}/in/new.jsonl", b"[]\n")
    with pytest.raises(SourceError, match=r"new\.jsonl .* was taken before with other bytes"):
        downloads("5")


def test_wrong_keys_are_told_at_once_and_never_written(s3_server: S3Server, bucket: tuple[str, Any]) -> None:
    name, files = bucket
    files.pipe_file(f"{name}/in/1.jsonl", b"{}\n")
    told = []
    for wrong in ({"key": "AKIANOBODY"}, {"secret": "not-the-secret"}):
        options = {**s3_server.options, **wrong}
        store = Store(f"s3://{name}/store", options)
        for use in (
            partial(FileReader(f"s3://{name}/in", storage_options=options).plan, {}, {}, None, None),
            partial(store.write_bytes, "x", b"x"),
            partial(store.read_bytes, "x"),
        ):
            with pytest.raises(ConnectionConfigError, match="access is refused .* Check the access key") as caught:
                use()
            told.append(str(caught.value))
    secrets = ("AKIANOBODY", "not-the-secret", s3_server.key, s3_server.secret)
    assert not [text for text in told if any(secret in text for secret in secrets)]


def test_a_bucket_that_is_not_there_is_named_and_never_made(s3_server: S3Server, bucket: tuple[str, Any]) -> None:
    _, files = bucket
    for path in ("s3://no-such-bucket/in/*.jsonl", "s3://no-such-bucket/in"):
        with pytest.raises(SourceError, match="no-such-bucket"):
            FileReader(path, storage_options=s3_server.options).plan({}, {}, None, None)
    store = Store("s3://no-such-bucket/ai", s3_server.options)
    with pytest.raises(ConnectionConfigError, match="Make the bucket, or correct the uri"):
        store.write_bytes("x", b"x")
    assert "no-such-bucket" not in files.ls("")


def test_a_store_that_is_down_or_hangs_is_given_up_in_time(s3_server: S3Server, bucket: tuple[str, Any]) -> None:
    name, files = bucket
    files.pipe_file(f"{name}/in/1.jsonl", b"{}\n")
    patient = FileReader(f"s3://{name}/in", storage_options=s3_server.options)
    assert len(patient.plan({}, {}, None, None).slices) == 1
    options = {**s3_server.options, "timeout_s": 0.4}
    reader, store = FileReader(f"s3://{name}/in", storage_options=options), Store(f"s3://{name}/ai", options)
    s3_server.pause()
    began = time.monotonic()
    with pytest.raises(SourceUnavailableError, match="could not be looked up"):
        reader.plan({}, {}, None, None)
    with pytest.raises(SourceUnavailableError, match="did not take x"):
        store.write_bytes("x", b"x")
    assert time.monotonic() - began < 45
    s3_server.resume()
    assert len(patient.plan({}, {}, None, None).slices) == 1
    gone = {**options, "endpoint_url": "http://127.0.0.1:9"}
    with pytest.raises(SourceUnavailableError, match="could not be looked up"):
        FileReader(f"s3://{name}/in", storage_options=gone).plan({}, {}, None, None)


def test_a_download_that_breaks_off_is_read_again_or_lands_nothing(
    s3_server: S3Server, bucket: tuple[str, Any], tcp_proxy: Callable[[str, int], TcpProxy]
) -> None:
    name, files = bucket
    lines = b"".join(b'{"a":%d}\n' % n for n in range(60_000))
    files.pipe_file(f"{name}/in/1.jsonl", lines)
    proxy = tcp_proxy("127.0.0.1", s3_server.port)
    options = {**s3_server.options, "endpoint_url": f"http://{proxy.address}"}
    reader = FileReader(f"s3://{name}/in", storage_options=options)
    hasty = FileReader(f"s3://{name}/in", storage_options={**options, "timeout_s": 3})
    span = reader.plan({}, {}, None, None)
    assert hasty.plan({}, {}, None, None) == span
    proxy.cut_after(200_000)
    assert sum(table.num_rows for table in reader.read(span)) == 60_000, "one cut is mended on the way"
    tables = reader.read(span)
    next(tables)
    again = hasty.read(span)
    proxy.swallow()
    with pytest.raises(SourceUnavailableError, match="1.jsonl could not be read"):
        list(again)
    proxy.heal()
    store, ledger = Store(f"s3://{name}/store", s3_server.options), MemoryLedger()
    assert ingest(reader, AcceptAll(), store, ledger, RUN).counts["read"] == 60_000
