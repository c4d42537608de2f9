"""The error tree: drawn as it is, carried between processes, without losing a fact."""

from __future__ import annotations

import copy
import inspect
import pickle
import re

import pytest

from airflow_ai_provider import errors
from airflow_ai_provider.core.batch import BatchRef
from airflow_ai_provider.errors import AiProviderError, CompensationError, TerminalError, TransientError

ALL = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, AiProviderError)]
REF = BatchRef("outcomes", "o", "file:///o", "sha256:1", {"rows": 2})


def make(kind: type[AiProviderError]) -> AiProviderError:
    facts = {"ref": REF, "keys": ["k1"], "nested": {"a": [1, None]}}
    if kind is CompensationError:
        return CompensationError("one failed", [errors.ActionRejectedError("no", status=422)], **facts)
    return kind("what, value, rule, next move", **facts)


@pytest.mark.parametrize("kind", ALL, ids=lambda c: c.__name__)
def test_it_pickles_with_all_its_facts(kind: type[AiProviderError]) -> None:
    error = make(kind)
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        again = pickle.loads(pickle.dumps(error, protocol))
        assert type(again) is kind
        assert str(again) == str(error)
        assert (again.ref, again.keys, again.nested) == (REF, ["k1"], {"a": [1, None]})
    assert copy.copy(error).keys == ["k1"]


@pytest.mark.parametrize("kind", ALL, ids=lambda c: c.__name__)
def test_a_missing_fact_is_said_with_those_that_are_there(kind: type[AiProviderError]) -> None:
    with pytest.raises(AttributeError, match=f"{kind.__name__} has no fact 'colour'.*'keys'"):
        _ = make(kind).colour
    assert not hasattr(make(kind), "colour")


def test_the_tree_is_drawn_as_it_is() -> None:
    drawn = set(re.findall(r"(\w+Error)\b", errors.__doc__ or "")) - {"ValueError", "ImportError"}
    assert drawn == {c.__name__ for c in ALL}


def test_each_is_transient_or_terminal_or_one_of_the_two_that_are_neither() -> None:
    leaves = [c for c in ALL if c not in (AiProviderError, TransientError, TerminalError)]
    neither = {c.__name__ for c in leaves if not issubclass(c, TransientError | TerminalError)}
    assert neither == {"UnknownOutcomeError", "CompensationError"}
    assert not [c for c in leaves if issubclass(c, TransientError) and issubclass(c, TerminalError)]
    assert all((c.__doc__ or "").strip() for c in ALL)


def test_those_that_python_knows_too_are_caught_as_such() -> None:
    with pytest.raises(ValueError, match="next"):
        raise make(errors.SpecError)
    with pytest.raises(ImportError):
        raise make(errors.MissingExtraError)


def test_a_group_keeps_the_errors_in_it() -> None:
    group = pickle.loads(pickle.dumps(make(CompensationError)))
    assert [(type(e), e.status) for e in group.exceptions] == [(errors.ActionRejectedError, 422)]
    with pytest.raises(ExceptionGroup):
        raise group
    matched, rest = group.split(errors.ActionRejectedError)
    assert matched and not rest
