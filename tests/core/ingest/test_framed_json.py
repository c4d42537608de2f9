"""JSON in Confluent's wire format: frames off, ids kept, everything else as plain JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from airflow_ai_provider.core.batch import ACCEPTED, QUARANTINE
from airflow_ai_provider.core.ingest.contain import MARKER
from airflow_ai_provider.core.ingest.contract import AcceptAll
from airflow_ai_provider.core.ingest.encoded.framed_json import FramedJsonSource
from airflow_ai_provider.core.ingest.flow import IngestRun, ingest
from airflow_ai_provider.core.ingest.replay import replay_quarantine
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.errors import RegistryUnavailableError
from airflow_ai_provider.testing import MemoryLedger, MemorySource, RuleValidator
from airflow_ai_provider.testing.registry import MemorySchemas

RUN = IngestRun("p", "r", "k")
RULES = RuleValidator(lambda row: None if row["n"] >= 0 else f"out_of_range: n={row['n']}", {"n": "int64"})


def framed(number: int, value: Any) -> bytes:
    return (
        b"\0"
        + number.to_bytes(4, "big", signed=True)
        + (value if isinstance(value, bytes) else json.dumps(value).encode())
    )


def rows_of(store: Store, ref: Any, table: str) -> list[dict[str, Any]]:
    return [row for part in store.read(ref, table) for row in part.to_pylist()]


@pytest.mark.parametrize("died", [False, True])
def test_every_row_is_read_or_rejected_with_what_came(tmp_path: Path, died: bool) -> None:
    schemas = MemorySchemas()
    first = schemas.add("t-value", {"type": "object"}, "JSON")
    avro = schemas.add("other", {"type": "string"})
    second = schemas.add("t-value", {"type": "object", "title": "2"}, "JSON")
    bare: list[bytes | None] = [
        b'{"n":1}',
        b"\0\0",
        b"",
        framed(99, {"n": 1}),
        framed(-1, {"n": 1}),
        framed(avro, {"n": 1}),
    ]
    rows = [
        framed(first, {"n": 1}),
        *bare,
        None,
        framed(second, b"{nope"),
        framed(second, {"n": -3}),
        framed(first, {"n": 2}),
    ]
    store, ledger = Store(str(tmp_path)), MemoryLedger()
    source = FramedJsonSource(MemorySource({0: rows}), schemas)
    if died:
        store.write_bytes(f"p/batch/{source.plan({}, {}, None, None).batch_id}/{MARKER}", b"")
    ref = ingest(source, RULES, store, ledger, RUN)
    assert [(r["n"], r["_schema_id"]) for r in rows_of(store, ref, ACCEPTED)] == [(1, first), (2, first)]
    rejected = rows_of(store, ref, QUARANTINE)
    assert [r["_payload"] for r in rejected] == [*bare, None, b"{nope", b'{"n": -3}']
    assert [r["_schema_id"] for r in rejected] == [None, None, None, 99, -1, avro, None, second, second]
    codes = [r["_reasons"][0].partition(":")[0] for r in rejected]
    assert codes == ["broken_json"] * 3 + ["unknown_schema"] * 3 + ["tombstone", "broken_json", "out_of_range"]
    told = [(s["id"], s["type"], s["version"]) for s in store.manifest(ref).facts["schemas"]]
    assert told == [(first, "JSON", 1), (second, "JSON", 2)]
    mended = replay_quarantine(
        store, ledger, RULES, ref, lambda row: {**row, "n": 3} if row.get("n") == -3 else None, pipeline="p"
    )
    assert [(r["n"], r["_schema_id"]) for r in rows_of(store, mended, ACCEPTED)] == [(3, second)]


def test_payloads_shorter_than_a_frame_are_no_error_of_arrow(tmp_path: Path) -> None:
    source = FramedJsonSource(MemorySource({0: [b"", b"{}", b"x", None, b"\0"]}), MemorySchemas())
    ref = ingest(source, AcceptAll(), Store(str(tmp_path)), MemoryLedger(), RUN)
    assert ref.counts == {"read": 5, "accepted": 0, "quarantined": 5}


def test_a_registry_that_does_not_answer_is_asked_again_by_the_retry(tmp_path: Path) -> None:
    schemas = MemorySchemas()
    number = schemas.add("t-value", "{}", "JSON")
    source = FramedJsonSource(MemorySource({0: [framed(number, {"n": 1})] * 5}), schemas)
    store, ledger = Store(str(tmp_path)), MemoryLedger()
    schemas.is_down = True
    with pytest.raises(RegistryUnavailableError):
        ingest(source, AcceptAll(), store, ledger, RUN)
    schemas.is_down = False
    schemas.asked.clear()
    assert ingest(source, AcceptAll(), store, ledger, RUN).counts["accepted"] == 5
    assert schemas.asked == [number]
