"""Values that travel: the same content has the same name, counts add up, what is read is what was written."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_ai_provider.core.batch import (
    BatchRef,
    Manifest,
    Part,
    Pin,
    Slice,
    Span,
    canonical_json,
    digest_of,
    exceeds,
    share_or_count,
)
from airflow_ai_provider.errors import CorruptBatchError, RowMismatchError, SpecError

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text('aé\0"\\'),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abé", max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(plain)
def test_canonical_json_is_one_text_for_one_value(value: Any) -> None:
    text = canonical_json(value)
    assert canonical_json(json.loads(text)) == text
    assert digest_of(value) == digest_of(json.loads(text))


def test_canonical_json_forgets_the_order_of_keys_and_refuses_what_is_no_json() -> None:
    assert canonical_json({"b": 1, "a": "é"}) == '{"a":"é","b":1}'.encode()
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError):
            canonical_json({"x": bad})


slices = st.builds(
    Slice, st.sampled_from("012"), st.integers(0, 9), st.integers(0, 9), st.sampled_from(["", "sha256:1"])
)
spans = st.builds(
    Span,
    st.sampled_from(["kafka:orders", "files:in/box", "kafka:a.b"]),
    st.sampled_from(["", "T1"]),
    st.lists(slices, max_size=3).map(tuple),
    st.dictionaries(st.sampled_from("ab"), st.integers(), max_size=2),
)


@given(spans, spans)
def test_a_batch_is_named_after_its_content(one: Span, other: Span) -> None:
    assert Span.from_dict(json.loads(json.dumps(one.to_dict()))) == one
    assert Span.from_dict(one.to_dict()).facts == one.facts
    assert (one.batch_id == other.batch_id) == (one == other), "facts do not count, everything else does"
    assert all(c.isalnum() or c in "-_" for c in one.batch_id)


def test_an_empty_span_says_so() -> None:
    assert Span("kafka:t", "", ()).is_empty
    assert Span("kafka:t", "", (Slice("0", 5, 5), Slice("1", 9, 3))).is_empty
    assert not Span("kafka:t", "", (Slice("0", 5, 5), Slice("1", 3, 4))).is_empty


def manifest(kind: str, counts: dict[str, int], **tables: int) -> Manifest:
    parts = tuple(Part(f"{t}/00000.parquet", t, n, 100, "sha256:1") for t, n in tables.items())
    return Manifest(kind, "b-1", parts, counts, {"span": {}})


@pytest.mark.parametrize(
    ("kind", "total", "shares"),
    [
        ("batch", "read", ["accepted", "quarantined"]),
        ("predictions", "accepted", ["predicted", "failed"]),
        ("routes", "predicted", ["act", "review", "fallback", "hold"]),
        ("review", "review", ["answered", "hold"]),
        ("outcomes", "rows", ["done", "refused", "unknown", "muted"]),
    ],
)
@given(data=st.data())
def test_counts_add_up_or_nothing_lands(kind: str, total: str, shares: list[str], data: st.DataObject) -> None:
    counts = {s: data.draw(st.integers(0, 50)) for s in shares}
    off = data.draw(st.integers(-3, 3))
    whole = manifest(kind, {**counts, total: sum(counts.values()) + off})
    if off == 0:
        assert whole.check() is whole
    else:
        with pytest.raises(RowMismatchError, match=f"batch b-1: {total}=") as caught:
            whole.check()
        assert pickle.loads(pickle.dumps(caught.value)).counts == whole.counts


@pytest.mark.parametrize(
    ("table", "counted", "kind"),
    [("accepted", "accepted", "batch"), ("quarantine", "quarantined", "batch"), ("outcomes", "rows", "outcomes")],
)
def test_a_table_holds_as_many_rows_as_its_count_says(table: str, counted: str, kind: str) -> None:
    sums = {"batch": {"read": 4, "accepted": 4, "quarantined": 0}, "outcomes": {"rows": 4, "done": 4}}[kind]
    if counted == "quarantined":
        sums = {"read": 4, "accepted": 0, "quarantined": 4}
    manifest(kind, sums, **{table: 4}).check()
    with pytest.raises(RowMismatchError, match=f"table {table} holds 3 rows, its count says 4"):
        manifest(kind, sums, **{table: 3}).check()


def test_what_is_read_is_what_was_written() -> None:
    written = manifest("batch", {"read": 2, "accepted": 2}, accepted=2)
    ref = BatchRef("batch", "b", "s3://x/b", "sha256:1", {"read": 2}, ("accepted",))
    pin = Pin("triage", "3", "champion", "sha256:1", {"m.onnx": "sha256:2"}, "onnx", {"inputs": []}, {"classes": ["b"]})
    for value in (written, ref, pin):
        assert type(value).from_dict(json.loads(json.dumps(value.to_dict()))) == value
        assert pickle.loads(pickle.dumps(value)) == value
    assert ref.only().tables == ()
    assert written.table("accepted") == written.parts


@pytest.mark.parametrize("kind", [Manifest, BatchRef, Pin])
@pytest.mark.parametrize("data", [{}, {"schema_version": 2}, {"schema_version": "1"}, None, [], "text", 7])
def test_another_version_is_refused_with_a_next_move(kind: Any, data: Any) -> None:
    with pytest.raises(CorruptBatchError, match="schema_version .* clear the upstream task"):
        kind.from_dict(data)


@pytest.mark.parametrize("kind", [Manifest, BatchRef, Pin])
@pytest.mark.parametrize("data", [{}, {"kind": "batch", "parts": [{}]}, {"name": "x", "colour": 1}, {"parts": 7}])
def test_what_is_malformed_is_refused_as_corrupt(kind: Any, data: dict[str, Any]) -> None:
    with pytest.raises(CorruptBatchError, match="this is no "):
        kind.from_dict({"schema_version": 1, **data})


@pytest.mark.parametrize(
    ("written", "means"),
    [
        (None, None),
        ("", None),
        ("None", None),
        (0, 0.0),
        (0.2, 0.2),
        ("0.2", 0.2),
        ("20%", 0.2),
        (50, 50),
        ("50", 50),
        ("100%", None),
    ],
)
def test_limits_as_people_write_them(written: Any, means: float | int | None) -> None:
    read = share_or_count(written)
    assert read == means
    assert isinstance(read, int) == isinstance(means, int)


@pytest.mark.parametrize("written", ["many", -1, "-5%", 2.5, "200%", "nan", "inf"])
def test_limits_that_mean_nothing_are_refused(written: Any) -> None:
    with pytest.raises(SpecError, match="neither a share nor a count"):
        share_or_count(written)


def test_exceeding() -> None:
    assert [exceeds(n, 10, 0.2) for n in (1, 2, 3)] == [False, False, True]
    assert [exceeds(n, 10, 2) for n in (2, 3)] == [False, True]
    assert [exceeds(n, 10, 0) for n in (0, 1)] == [False, True]
    assert not exceeds(10, 10, None)
