"""Data Docs of a batch: counts against the batch itself, the same bytes each time, nothing from a row unescaped."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest

from airflow_ai_provider.core.batch import BatchRef
from airflow_ai_provider.core.ingest.data_docs import PAGE, write_data_docs
from airflow_ai_provider.core.ingest.flow import IngestRun, ingest
from airflow_ai_provider.core.ingest.suite import load_suite
from airflow_ai_provider.core.ingest.validate import GxValidator
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.errors import BatchRejectedError, SpecError
from airflow_ai_provider.testing import MemoryLedger, MemorySource


def rule(name: str, policy: str | None = None, **kwargs: Any) -> dict[str, Any]:
    return {"type": name, "kwargs": kwargs, **({"meta": {"on_failure": policy}} if policy else {})}


SUITE: dict[str, Any] = {
    "name": "samples",
    "expectations": [
        rule("expect_column_values_to_be_of_type", column="size", type_="float"),
        rule("expect_column_values_to_be_of_type", column="name", type_="string"),
        rule("expect_column_values_to_not_be_null", column="size"),
        rule("expect_column_values_to_be_between", column="size", min_value=0, max_value=40),
        rule("expect_column_values_to_be_between", "warn", column="size", min_value=0, max_value=30),
        rule("expect_column_values_to_be_in_set", column="name", value_set=["a", "b"]),
        rule("expect_column_mean_to_be_between", "warn", column="size", min_value=900),
        rule("expect_table_row_count_to_be_between", min_value=1),
    ],
}
EVIL = "<script>alert(1)</script>"
ROWS: list[Any] = [
    *({"size": size, "name": "a"} for size in (1, 2, 35, 36, 41, 42, 43)),
    {"size": 1, "name": EVIL},
    {"name": "b"},
    {"size": "x", "name": "a"},
]


def landed(folder: Path) -> tuple[Store, BatchRef]:
    store = Store(str(folder))
    source = MemorySource({0: [json.dumps(row).encode() for row in ROWS] + [b"{no json"]})
    return store, ingest(source, GxValidator(SUITE), store, MemoryLedger(), IngestRun("p", "r", "k"))


def shown(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page.partition("<body")[2]))


def test_the_page_says_what_the_batch_holds(tmp_path: Path) -> None:
    store, ref = landed(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    uri = write_data_docs(store, ref, load_suite(SUITE))
    assert uri == f"{ref.uri}/{PAGE}"
    page = Path(uri).read_text()
    text = shown(page)
    assert "Evaluated Expectations 8" in text
    assert "Successful Expectations 2" in text, "the names are texts, and there is a row"
    for found in (
        "values must be of type float64 . 1 unexpected values found. ≈9.091% of 11 total rows",
        "values must never be null. 1 unexpected values found. ≈11.11% of 9 total rows",
        "values must be greater than or equal to 0 and less than or equal to 40 . 3 unexpected values found",
        "values must be greater than or equal to 0 and less than or equal to 30 . 5 unexpected values found",
        "values must belong to this set: a b . 1 unexpected values found",
        "accepted 4",
        "broken_json 1",
        "quarantined 7",
    ):
        assert found in text, f"{found!r} is not in {text}"
    assert "41.0" in text
    assert EVIL not in page
    assert "&lt;script&gt;alert(1)" in page
    assert {path: path.read_bytes() for path in before} == before, "no byte of the batch has changed"
    assert store.find("p", ref.kind, ref.batch_id) == ref


def test_the_same_batch_has_the_same_page(tmp_path: Path) -> None:
    pages = []
    for name in ("one", "two"):
        store, ref = landed(tmp_path / name)
        for _ in range(2):
            pages.append(Path(write_data_docs(store, ref, load_suite(SUITE))).read_bytes())
    assert len(set(pages)) == 1


@pytest.mark.parametrize("why", ["max_rejected", "whole batch"])
def test_a_refused_batch_has_its_page_too(tmp_path: Path, why: str) -> None:
    store, ledger, suite, limit = Store(str(tmp_path)), MemoryLedger(), SUITE, 3
    if why == "whole batch":
        mean = rule("expect_column_mean_to_be_between", column="size", min_value=900)
        suite, limit = {**SUITE, "expectations": [*SUITE["expectations"][:-2], mean, SUITE["expectations"][-1]]}, 99
    source = MemorySource({0: [json.dumps(row).encode() for row in ROWS] + [b"{no json"]})
    with pytest.raises(BatchRejectedError) as caught:
        ingest(source, GxValidator(suite), store, ledger, IngestRun("p", "r", "k", max_rejected=limit))
    error = pickle.loads(pickle.dumps(caught.value))
    uri = write_data_docs(store, error.ref, load_suite(suite), error.manifest)
    text = shown(Path(uri).read_text())
    assert "less than or equal to 40 . 3 unexpected values found" in text
    assert "41.0" in text
    assert "quarantined 7" in text
    if why == "whole batch":
        assert "refused whole-batch rules failed: " in text
        assert "Successful Expectations 2" in text
        assert "mean must be greater than or equal to 900 . 25.125" in text
    else:
        assert "refused max_rejected allows 3 rows" in text
    assert store.find("p", "batch", error.ref.batch_id) is None, "a page is no batch"
    landed = ingest(source, GxValidator(suite if limit == 3 else SUITE), store, ledger, IngestRun("p", "r", "k"))
    assert landed.batch_id == error.ref.batch_id
    write_data_docs(store, landed, load_suite(SUITE))
    assert "refused" not in Path(uri).read_text()


def test_the_suite_says_whether_there_are_any() -> None:
    assert load_suite(SUITE).data_docs
    off = load_suite({**SUITE, "meta": {"data_docs": False}})
    assert not off.data_docs
    assert off.digest == load_suite(SUITE).digest, "the same rules give the same batches"
    with pytest.raises(SpecError, match="'no' is not true or false"):
        load_suite({**SUITE, "meta": {"data_docs": "no"}})
