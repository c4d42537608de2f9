"""The decide flow over a real store: rows conserved, the same bytes again, and no landing on doubt."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from airflow_ai_provider.core.batch import ROUTES, BatchRef, Pin
from airflow_ai_provider.core.decide.flow import decide
from airflow_ai_provider.core.decide.policy import Fallback, Policy
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.errors import RowMismatchError, SpecError

POLICY = Policy(0.9, 0.5, fallback=Fallback("radius > 16.8", "malignant", "benign"))
SCORES = [0.99, 0.7, 0.1, 0.2, None, 0.95]


def pin(**metadata: Any) -> dict[str, Any]:
    return Pin("triage", "3", "champion", "sha256:" + "0" * 64, {}, "onnx", {}, metadata).to_dict()


def land(
    store: Store,
    parts: int = 2,
    *,
    failed: int = 1,
    swap: bool = False,
    short: bool = False,
    wrong_count: int = 0,
    extra: str = "",
    metadata: dict[str, Any] | None = None,
) -> BatchRef:
    """Land a batch and its predictions, ``parts`` parts of six predicted rows and ``failed`` failed ones."""
    batch = store.open_batch("p", "batch", "b")
    scored = store.open_batch("p", "predictions", "b-1")
    per_part = len(SCORES) + failed
    for part in range(parts):
        ids = [f"t/0/{part * per_part + i}" for i in range(per_part)]
        rows = {"_row_id": ids, "id": [f"s{i}" for i in ids], "radius": [20.0, 1.0] * 3 + [5.0] * failed}
        rows |= {"image": [b"x"] * per_part} | ({extra: ids} if extra else {})
        batch.write("accepted", pa.table(rows))
        answered = pa.table(
            {
                "_row_id": ids[::-1] if swap else ids,
                "prediction": pa.array(["benign"] * 6 + [None] * failed, pa.string()),
                "score": pa.array(SCORES + [None] * failed, pa.float64()),
                "probabilities": pa.nulls(per_part, pa.list_(pa.float32())),
                "error": pa.array([None] * 6 + ["radius is NaN"] * failed, pa.string()),
            }
        )
        scored.write("predictions", answered.slice(0, per_part - 1) if short else answered)
    total = parts * per_part
    source = batch.land({"read": total, "accepted": total, "quarantined": 0}, {"key": "id"})
    stored = total - parts if short else total
    counts = {"accepted": stored, "predicted": parts * 6 + wrong_count, "failed": stored - parts * 6 - wrong_count}
    return scored.land(counts, {"input": source.to_dict(), "pin": pin(**(metadata or {}))})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path))


def rows_of(store: Store, ref: BatchRef) -> list[dict[str, Any]]:
    return [row for table in store.read(ref) for row in table.to_pylist()]


def bytes_under(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_every_predicted_row_lands_in_one_route_and_failed_ones_stay_behind(store: Store) -> None:
    routes, facts = decide(land(store), POLICY, store, pipeline="p")
    counts = {"predicted": 12, "act": 4, "review": 4, "fallback": 4, "hold": 0}
    assert dict(routes["act"].counts) == counts
    assert {name: routes[name].row_count for name in ROUTES} == {name: counts[name] for name in ROUTES}
    ids = [row["_row_id"] for ref in routes.values() for row in rows_of(store, ref)]
    assert len(ids) == len(set(ids)) == 12
    fallback = rows_of(store, routes["fallback"])
    assert [(row["decision"], row["decided_by"]) for row in fallback[:2]] == [("malignant", "rule"), ("benign", "rule")]
    assert "image" not in fallback[0]
    assert fallback[0]["id"].startswith("s")
    manifest = store.manifest(routes["act"])
    assert manifest.facts["failed"] == 2
    assert manifest.facts["key"] == "id"
    assert manifest.facts["policy"] == POLICY.to_dict()
    assert facts["batch_id"] == routes["act"].batch_id
    assert facts["pin"] == {"name": "triage", "version": "3", "alias": "champion", "digest": "sha256:" + "0" * 64}
    assert facts["counts"] == counts


def test_again_gives_the_same_bytes_and_another_policy_another_batch(store: Store, tmp_path: Path) -> None:
    predictions = land(store)
    first, _ = decide(predictions, POLICY, store, pipeline="p")
    before = bytes_under(tmp_path)
    again, _ = decide(predictions, POLICY, store, pipeline="p")
    assert again == first
    assert bytes_under(tmp_path) == before
    other, _ = decide(predictions, Policy(0.9, 0.5), store, pipeline="p")
    assert other["act"].batch_id != first["act"].batch_id


def test_an_empty_batch_is_decided_too(store: Store) -> None:
    routes, _ = decide(land(store, parts=0), POLICY, store, pipeline="p")
    assert [routes[name].row_count for name in ROUTES] == [0, 0, 0, 0]


def test_a_batch_in_which_all_rows_failed_has_no_rows_to_decide(store: Store) -> None:
    batch = store.open_batch("p", "batch", "b")
    scored = store.open_batch("p", "predictions", "b-1")
    batch.write("accepted", pa.table({"_row_id": ["1"], "radius": [1.0]}))
    failed = {"_row_id": ["1"], "prediction": pa.nulls(1), "score": pa.nulls(1, pa.float64()), "error": ["NaN"]}
    scored.write("predictions", pa.table(failed))
    source = batch.land({"read": 1, "accepted": 1, "quarantined": 0}, {})
    ref = scored.land({"accepted": 1, "predicted": 0, "failed": 1}, {"input": source.to_dict(), "pin": pin()})
    routes, facts = decide(ref, POLICY, store, pipeline="p")
    assert sum(ref.row_count for ref in routes.values()) == 0
    assert facts["failed"] == 1


def test_the_calibration_comes_with_the_model(store: Store) -> None:
    halved = {"method": "isotonic", "params": {"x": [0.0, 1.0], "y": [0.0, 0.5]}}
    routes, _ = decide(land(store, metadata={"calibration": halved}), POLICY, store, pipeline="p")
    assert routes["act"].row_count == 0
    assert store.manifest(routes["act"]).facts["calibration"] == halved


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"swap": True}, "other row ids, or another order"),
        ({"short": True}, "parts of"),
        ({"wrong_count": 1}, "counts 13 predicted and 1 failed"),
    ],
)
def test_rows_that_are_not_the_same_rows_are_never_decided(store: Store, how: dict[str, Any], words: str) -> None:
    predictions = land(store, **how)
    with pytest.raises(RowMismatchError, match=words):
        decide(predictions, POLICY, store, pipeline="p")
    assert not list(Path(store.root, "p", "routes").rglob("manifest.json"))


def test_what_does_not_fit_is_said_before_anything_lands(store: Store) -> None:
    predictions = land(store, extra="score")
    with pytest.raises(SpecError, match="a column named 'score'"):
        decide(predictions, POLICY, store, pipeline="p")
    with pytest.raises(SpecError, match="holds batch, not predictions"):
        decide(BatchRef.from_dict(store.manifest(predictions).facts["input"]), POLICY, store, pipeline="p")
