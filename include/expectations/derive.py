"""Derive the suite ``biopsies.json`` from the biopsies that the model learned from; never from the unseen ones.

Invariants: the same data give the same bytes. The expected types are the row schema; ranges reach from zero to three
times the largest value ever learned from, so that what is rejected is a fault of the message, not a rare biopsy.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from include.data import biopsies, feature_names

SUITE = Path(__file__).with_name("biopsies.json")


def biopsy_suite() -> dict[str, Any]:
    """Return the suite as Great Expectations reads it."""
    learned, _ = biopsies()
    highest = {
        name: _round_up(3 * float(column.max())) for name, column in zip(feature_names(), learned.rows.T, strict=True)
    }
    rules: list[dict[str, Any]] = [
        _rule("of_type", "biopsy_id", type_="string"),
        _rule("not_be_null", "biopsy_id"),
        _rule("match_regex", "biopsy_id", regex=r"^B\d{4}$"),
    ]
    for name, bound in highest.items():
        rules += [
            _rule("of_type", name, type_="float"),
            _rule("not_be_null", name),
            _rule("between", name, min_value=0.0, max_value=bound),
        ]
    return {"name": "biopsies", "expectations": rules, "meta": {}}


def _round_up(value: float) -> float:
    """Keep two significant digits, upwards: the bound stays readable."""
    step = 10.0 ** (np.floor(np.log10(value)) - 1)
    return float(np.round(np.ceil(value / step) * step, 6))


def _rule(what: str, column: str, **settings: Any) -> dict[str, Any]:
    names = {
        "of_type": "expect_column_values_to_be_of_type",
        "not_be_null": "expect_column_values_to_not_be_null",
        "match_regex": "expect_column_values_to_match_regex",
        "between": "expect_column_values_to_be_between",
    }
    return {"type": names[what], "kwargs": {"column": column, **settings}, "meta": {"on_failure": "quarantine"}}


def main() -> None:
    """Write the suite beside this script."""
    SUITE.write_text(json.dumps(biopsy_suite(), indent=2) + "\n", encoding="utf-8")
    print(f"wrote {len(biopsy_suite()['expectations'])} expectations to {SUITE}")


if __name__ == "__main__":
    main()
