"""The policy's values: what may be written, what each fault says, and what travels."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest

from airflow_ai_provider.core.decide.policy import Fallback, Policy
from airflow_ai_provider.errors import SpecError

FALLBACK = Fallback("worst_radius > 16.8", then="malignant", otherwise="benign")


def test_without_a_rule_the_rest_is_held_and_with_one_it_falls_back() -> None:
    assert Policy(0.95, 0.60).otherwise == "hold"
    assert Policy(0.95, 0.60, fallback=FALLBACK).otherwise == "fallback"


def test_it_travels_as_json_and_compares_by_value() -> None:
    policy = Policy(0.95, 0.60, "fallback", FALLBACK)
    assert Policy.from_dict(policy.to_dict()) == policy
    assert pickle.loads(pickle.dumps(policy)) == policy
    assert policy.digest == Policy.from_dict(policy.to_dict()).digest
    assert policy.digest != Policy(0.96, 0.60, "fallback", FALLBACK).digest
    assert Policy(1, 0).digest == Policy(1.0, 0.0).digest


def test_templates_render_bars_as_text() -> None:
    assert Policy.from_dict({"act": "0.95", "review": " 0.6 "}) == Policy(0.95, 0.6)


@pytest.mark.parametrize(
    ("arguments", "path", "words"),
    [
        ({"act": 0.5, "review": 0.6}, "review", "0.6 is above act 0.5"),
        ({"act": 1.1, "review": 0.6}, "act", "1.1 is not a confidence"),
        ({"act": 0.9, "review": -0.1}, "review", "-0.1 is not a confidence"),
        ({"act": float("nan"), "review": 0.1}, "act", "nan is not a confidence"),
        ({"act": True, "review": 0.1}, "act", "True is not a confidence"),
        ({"act": "high", "review": 0.1}, "act", "'high' is not a confidence"),
        ({"act": 0.9, "review": 0.6, "otherwise": "drop"}, "otherwise", "'drop' is not one of fallback, review, hold"),
        ({"act": 0.9, "review": 0.6, "otherwise": "fallback"}, "fallback", "is missing"),
        ({"act": 0.9, "review": 0.6, "otherwise": "hold", "fallback": FALLBACK}, "fallback", "is never used"),
        ({"act": 0.9, "review": None}, "review", "is missing"),
        ({"act": 0.9, "review": 0.5, "revieww": 0.5}, "revieww", "is not a key of a policy"),
    ],
)
def test_what_cannot_be_run_is_refused_where_it_is_written(arguments: dict, path: str, words: str) -> None:
    with pytest.raises(SpecError) as caught:
        Policy.from_dict(arguments)
    assert [(p, words in text) for p, text in caught.value.faults] == [(path, True)]


def test_all_faults_at_once() -> None:
    with pytest.raises(SpecError) as caught:
        Policy(2, -1, "drop")
    assert [path for path, _ in caught.value.faults] == ["act", "review", "otherwise"]


def test_a_fallback_decides_values_of_one_type() -> None:
    with pytest.raises(SpecError, match="two types"):
        Fallback("x > 1", then="malignant")
    with pytest.raises(SpecError, match="is not a text, a number"):
        Fallback("x > 1", then=None, otherwise=None)  # type: ignore[arg-type]


def test_importing_the_policy_loads_no_table_library() -> None:
    code = (
        "import sys; import airflow_ai_provider.core.decide.policy as p;"
        "p.Policy(0.9, 0.5, fallback=p.Fallback('x > 1'));"
        "print([m for m in ('pyarrow', 'numpy', 'airflow', 'pydantic', 'yaml') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
