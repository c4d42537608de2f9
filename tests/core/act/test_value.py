"""Actions as values: checked on creation, filled without changing the path."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_ai_provider.core.act.value import HttpAction, Undo, fill
from airflow_ai_provider.errors import SpecError


def test_an_action_is_what_it_says() -> None:
    action = HttpAction("ticket", "/tickets", undo=Undo("DELETE", "/orders/{order}/lines/{id}"), max_refused=0.2)
    assert action == HttpAction(
        "ticket", "/tickets", undo=Undo("DELETE", "/orders/{order}/lines/{id}"), max_refused=0.2
    )
    assert action.digest == HttpAction(**{**vars(action)}).digest
    assert action.digest != HttpAction("ticket", "/tickets", max_refused=0.2).digest
    assert action.answer_fields == ("order", "id")
    assert HttpAction("t", "/t").answer_fields == ()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"name": ""}, "name: is empty"),
        ({"endpoint": "tickets"}, "'tickets' is not a path"),
        ({"endpoint": "http://evil/tickets"}, "is not a path"),
        ({"endpoint": "//evil/tickets"}, "is not a path"),
        ({"endpoint": "/a b"}, "is not a path"),
        ({"method": "post"}, "method 'post'"),
        ({"method": "GET"}, "method 'GET'"),
    ],
)
def test_what_cannot_be_is_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(SpecError, match=says) as caught:
        HttpAction(**{"name": "t", "endpoint": "/t", **fields})
    assert caught.value.faults


@pytest.mark.parametrize(
    "written",
    [{"delete": "/t/{id}"}, {"method": "delete", "endpoint": "/t/{id}"}, Undo("DELETE", "/t/{id}")],
)
def test_an_undo_as_authors_write_it(written: Any) -> None:
    assert Undo.of(written) == Undo("DELETE", "/t/{id}")


def test_an_undo_that_is_none_or_nonsense() -> None:
    assert Undo.of(None) is None
    for nonsense in ({}, {"delete": "/a", "post": "/b"}, {"fetch": "/a"}, {"delete": "x"}, "/t/{id}", 7):
        with pytest.raises(SpecError):
            Undo.of(nonsense)  # type: ignore[arg-type]


@given(st.text(min_size=1).filter(lambda t: t.strip() not in ("", ".", "..")))
def test_a_value_stays_one_segment_of_the_path(value: str) -> None:
    try:
        path = fill("/tickets/{id}/notes", {"id": value})
    except UnicodeEncodeError:
        assert any("\ud800" <= c <= "\udfff" for c in value)
        return
    segment = path.removeprefix("/tickets/").removesuffix("/notes")
    assert not set(segment) & set("/?#&\\ \r\n")
    assert segment


@pytest.mark.parametrize("value", [None, "", " ", ".", "..", {"a": 1}, [1], True])
def test_a_value_that_would_change_the_path_is_refused(value: Any) -> None:
    with pytest.raises(SpecError, match="needs 'id'"):
        fill("/tickets/{id}", {"id": value})
    with pytest.raises(SpecError, match="needs 'id'"):
        fill("/tickets/{id}", {})


def test_numbers_fill_and_plain_paths_stay() -> None:
    assert fill("/tickets/{id}", {"id": 7}) == "/tickets/7"
    assert fill("/tickets/{id}", {"id": "a/b?c"}) == "/tickets/a%2Fb%3Fc"
    assert fill("/tickets", {}) == "/tickets"


def test_values_are_cheap_to_import() -> None:
    heavy = "('pyarrow', 'jinja2', 'aiohttp', 'airflow')"
    code = f"import sys, airflow_ai_provider.core.act.value; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
