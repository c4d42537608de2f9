"""What a rule of a suite found among rows: Great Expectations' answer, read.

Invariants: an exception is not a verdict; a rule that names rows names all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from airflow_ai_provider.core.ingest.suite import Rule
from airflow_ai_provider.errors import BatchRejectedError


@dataclass(frozen=True)
class Bound:
    """One rule, with what Great Expectations made of it; ``kernel``: its arguments, if a kernel may judge it."""

    rule: Rule
    number: int
    expectation: Any
    names_rows: bool
    by_row: bool
    kernel: Mapping[str, Any] | None = None

    @property
    def policy(self) -> str:
        """What a failure means: ``quarantine``, ``fail`` or ``warn``."""
        return self.rule.on_failure or ("quarantine" if self.names_rows else "fail")


@dataclass(frozen=True)
class Finding:
    """What one rule found: whether it holds, and the positions of the rows that break it."""

    holds: bool
    positions: Sequence[int] = ()
    observed: Any = None


def read_answer(bound: Bound, answer: Any, table: pa.Table) -> Finding:
    """Read Great Expectations' answer about one rule over some rows.

    :raises BatchRejectedError: it raised, or names no rows where it must; a retry does not help.
    """
    raised = _exception(answer.exception_info)
    if raised:
        missing = [c for c in bound.rule.columns if c not in table.column_names]
        raise unjudged(bound.rule, f"column {missing} is not there" if missing else raised)
    found = answer.result or {}
    if answer.success:
        return Finding(True)
    if not bound.names_rows:
        return Finding(False, (), found.get("observed_value"))
    positions = found.get("unexpected_index_list")
    if positions is None:
        raise unjudged(bound.rule, "it failed and named no rows")
    return Finding(False, sorted(int(p) for p in positions))


def _exception(info: Mapping[str, Any]) -> str:
    """Read both shapes of exception_info: one record, or one record per metric."""
    records = [info] if "raised_exception" in info else list(info.values())
    told = (r for r in records if isinstance(r, Mapping) and r.get("raised_exception"))
    return "; ".join(dict.fromkeys(str(r.get("exception_message")).partition("\n")[0] for r in told))


def unjudged(rule: Rule, why: str) -> BatchRejectedError:
    """Make the error of a rule that has no verdict."""
    return BatchRejectedError(
        f"{rule.place}: {rule} could not be judged: {why}. That is no verdict, so nothing was landed. Declare the "
        "column's type with expect_column_values_to_be_of_type, or correct the expectation, then clear this task.",
        expectation=str(rule),
        why=why,
    )


def holds_mostly(bound: Bound, broken: int, rows: int) -> bool:
    """True when a rule with ``mostly`` allows so many broken rows."""
    mostly = bound.rule.kwargs.get("mostly", 1)
    return broken == 0 or (isinstance(mostly, int | float) and mostly < 1 and 1 - broken / rows >= mostly)
