"""Warnings: each unsafe or useless thing is named once, and a good file has none."""

from __future__ import annotations

import pytest

from airflow_ai_provider.core.pipeline.lint import find_warnings
from airflow_ai_provider.core.pipeline.spec import parse_spec

INGEST = "ingest: {kafka: t, key: id, expectations: t.json, max_rejected: 20%}\n"
INFER = "infer: {model: m@a}\n"
DECIDE = "decide: {act: 0.9, review: 0.5, fallback: {rule: x > 1, then: a, else: b}}\n"
REVIEW = "review: {timeout: 4h}\n"
ACT = 'act:\n  - t: {post: /t, undo: {delete: "/t/{id}"}}\n  - p: {post: /p}\n'
GOOD = {"ingest": INGEST, "infer": INFER, "decide": DECIDE, "review": REVIEW, "act": ACT}


def paths(**changes: str) -> list[str]:
    text = "".join((GOOD | changes).values())
    return [path for path, _ in find_warnings(parse_spec(text, "p"))]


def test_a_good_file_has_none() -> None:
    assert paths() == []


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"ingest": "ingest: {kafka: t, key: id, max_rejected: 5}\n"}, "ingest.expectations"),
        ({"ingest": "ingest: {kafka: t, key: id, expectations: t.json}\n"}, "ingest.max_rejected"),
        ({"ingest": "ingest: {kafka: t, expectations: t.json, max_rejected: 5}\n"}, "ingest.key"),
        ({"decide": DECIDE.replace("0.9", "0.5")}, "decide.review"),
        ({"decide": DECIDE.replace("0.5", "0")}, "decide.fallback"),
        ({"decide": DECIDE.replace(", then: a, else: b", "")}, "decide.fallback"),
        ({"decide": "decide: {act: 0.0, review: 0.0}\n"}, "decide.act"),
        ({"review": ""}, "review"),
        ({"act": "act:\n  - t: {post: /t}\n  - p: {post: /p}\n"}, "act[0].t.undo"),
        ({"act": "act:\n  - t: {post: /t, max_refused: 100%}\n"}, "act[0].t.max_refused"),
        ({"act": "act:\n  - t: {post: /t, rows: [review, fallback]}\n"}, "act"),
        ({"act": "act:\n  - t: {post: /t, rows: [act, fallback]}\n"}, "act"),
        ({"act": "act:\n  - t: {post: /t, rows: [act, review]}\n"}, "act"),
    ],
)
def test_each_thing_is_named(changes: dict[str, str], path: str) -> None:
    assert path in paths(**changes)


def test_images_need_no_suite() -> None:
    assert paths(ingest="ingest: {files: '*.png', format: image, key: path, max_rejected: 5%}\n") == []
