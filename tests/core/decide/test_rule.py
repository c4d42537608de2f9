"""The rule: what it answers, that a missing value has no answer, and that nothing else can be written."""

from __future__ import annotations

import pyarrow as pa
import pytest

from airflow_ai_provider.core.decide.rule import answer, columns_of, find_faults
from airflow_ai_provider.errors import SpecError

NAN = float("nan")
ROWS = pa.table(
    {
        "x": [1.0, NAN, None, 20.0],
        "n": [1, 2, None, 2**60],
        "s": ["a", None, "b", "a"],
        "b": [True, False, None, True],
        "worst radius": [1, 2, 3, 4],
        "d": pa.array(["a", "b", None, "a"]).dictionary_encode(),
        "empty": pa.nulls(4),
        "big": pa.array([1, 2, 3, 2**63], pa.uint64()),
        "when": pa.array([0, 1, 2, 3], pa.timestamp("s")),
    }
)
T, F, N = True, False, None


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("x > 16.8", [F, N, N, T]),
        ("n > 1.5", [F, T, N, T]),
        ("n == 1152921504606846976", [F, F, N, T]),
        ("n != 1152921504606846977", [T, T, N, T]),
        ("big == 2", [F, T, F, F]),
        ("s in ['a', 'c']", [T, N, F, T]),
        ("s not in ('a',)", [F, N, T, F]),
        ("n in [1, 2]", [T, T, N, F]),
        ("d == 'a'", [T, F, N, T]),
        ("b", [T, F, N, T]),
        ("not b", [F, T, N, F]),
        ("not b and x < 5", [F, N, N, F]),
        ("b or x < 5", [T, N, N, T]),
        ("0 < n < 3", [T, T, N, F]),
        ("col('worst radius') / (n - 1) > 1", [N, T, N, F]),
        ("x / (x - x) > 0", [N, N, N, N]),
        ("-x < 0 - 10", [F, N, N, T]),
        ("x * 2 + 1 == 3", [T, N, N, F]),
        ("empty > 1", [N, N, N, N]),
        ("b == True", [T, F, N, T]),
        ("True", [T, T, T, T]),
    ],
)
def test_answers(rule: str, expected: list[bool | None]) -> None:
    assert find_faults(rule) == []
    assert answer(rule, ROWS).to_pylist() == expected


def test_no_rows_no_answers() -> None:
    assert answer("x > 1 and s in ['a']", ROWS.slice(0, 0)).to_pylist() == []


def test_chunked_columns_are_answered_in_order() -> None:
    rows = pa.concat_tables([ROWS.slice(2), ROWS.slice(0, 2)])
    assert answer("n > 1 or s == 'a'", rows).to_pylist() == [None, True, True, True]


@pytest.mark.parametrize(
    ("rule", "column", "words"),
    [
        ("x >", 0, "invalid syntax"),
        ("import os", 1, "invalid syntax"),
        ("__import__('os').system('x')", 1, "not allowed"),
        ("x.y > 1", 1, "'x.y' is not allowed"),
        ("x > 1 and foo(1)", 11, "'foo(1)' is not allowed"),
        ("é == 1 and x[0] > 1", 12, "'x[0]' is not allowed"),
        ("'a' < 5", 7, "never alike"),
        ("1e999 < x", 1, "64 bits"),
        ("x == 9223372036854775808", 6, "64 bits"),
        ("x == b'raw'", 6, "64 bits"),
        ("x is None", 6, "'is' is not allowed"),
        ("s in x", 6, "a list of texts"),
        ("s in ['a', 1]", 6, "a list of texts"),
        ("s in []", 6, "a list of texts"),
        ("not 5", 5, "yes or no is needed"),
        ("x + 'a' > 1", 5, "a number is needed"),
        ("x > 1 if b else b", 1, "not allowed"),
        ("[i for i in x]", 1, "not allowed"),
        ("lambda: 1", 1, "not allowed"),
        ("(y := 1) > 0", 2, "not allowed"),
        ("x ** 2 > 1", 1, "not allowed"),
        ("col(x) > 1", 1, "not allowed"),
        ("f'{x}' == 'a'", 1, "not allowed"),
    ],
)
def test_each_fault_says_where(rule: str, column: int, words: str) -> None:
    (fault,) = find_faults(rule)
    assert words in fault
    assert fault.startswith(f"column {column}:") or column == 0


@pytest.mark.parametrize(
    "rule", ["", "  ", None, 5, "x + 1", "'text'", "x > 1" + " or x > 1" * 300, "(" * 400, "x\0 > 1"]
)
def test_what_is_no_question_is_refused(rule: str) -> None:
    assert len(find_faults(rule)) == 1


def test_several_faults_at_once() -> None:
    assert len(find_faults("x >> 3 or foo(1) or y[0] > 1")) == 3


def test_columns_in_the_order_of_writing() -> None:
    assert columns_of("b > a + col('c d') and a < 1") == ["b", "a", "c d"]


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("radius > 1", "there is no column 'radius'; the rows have x, n, s, b, worst radius"),
        ("s > 5", "text is compared with a number"),
        ("x", "it gives a number, not yes or no"),
        ("s and b", "'s' is text"),
        ("when > 5", "column 'when' is timestamp"),
    ],
)
def test_what_does_not_fit_the_rows_names_them(rule: str, words: str) -> None:
    with pytest.raises(SpecError) as caught:
        answer(rule, ROWS)
    assert words in str(caught.value)
    assert caught.value.faults[0][0] == "fallback.rule"
