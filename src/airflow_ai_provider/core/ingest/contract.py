"""What ingest asks of a source and of a validator, and the values they exchange.

Invariants of every table that travels here: ``_row_id`` names each row, once and for ever; columns that begin with an
underscore are the provider's own, all others are the author's; rows keep their order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol, runtime_checkable

import pyarrow as pa

from airflow_ai_provider.core.batch import Span
from airflow_ai_provider.core.ledger import SeenFile

PAYLOAD, EXTRA, FAULT, STAGE, REASONS = "_payload", "_extra", "_fault", "_stage", "_reasons"
ORIGIN = ("_key", "_topic", "_partition", "_offset", "_timestamp", "_schema_id", "_file", "_row")
"""Where a row came from: the first six for Kafka (the schema's id where there is one), the last two for files."""


class Source(Protocol):
    """Rows in a fixed order that can be read again, span by span.

    ``name`` is kind and name (``kafka:biopsies``), ``key`` the author's key column, ``format`` how rows are written:
    ``json`` (``_payload`` holds one object), ``csv`` (columns of text) or ``columns`` (typed columns). Tables may carry
    ``_fault``: why a row could not be read, with its bytes in ``_payload``.
    """

    @property
    def name(self) -> str: ...

    @property
    def key(self) -> str | None: ...

    @property
    def format(self) -> str: ...

    def identity(self) -> str:
        """Tell this source from a later one of the same name; may be empty. May contact the source."""

    def plan(
        self,
        position: Mapping[str, int],
        taken: Mapping[str, str],
        window: tuple[datetime, datetime] | None,
        row_limit: int | None,
    ) -> Span:
        """Fix what to take: after ``position`` (or within ``window``), without files already ``taken``."""

    def read(self, span: Span) -> Iterator[pa.Table]:
        """Yield exactly the rows of a span, in the same order every time, to the proven end.

        :raises SourceUnavailableError: when it does not answer; a retry may help.
        :raises SourceError: when some rows are not there any more; a retry does not help.
        """

    def commit(self, span: Span) -> None:
        """Tell outside tools how far we are; never raises, nothing depends on it."""

    def close(self) -> None:
        """Free clients; safe to call twice."""


@runtime_checkable
class Remembers(Protocol):
    """A source of files that does not read again what it has seen.

    ``seen``, by path, is set before :meth:`Source.plan` to what earlier plans saw; then it holds what this one saw.
    """

    seen: dict[str, SeenFile]


@dataclass(frozen=True)
class Verdict:
    """What the rules say about the rows of one block.

    :param accepted: rows that break no rule, in order.
    :param rejected: rows to quarantine: the same columns and ``_reasons``.
    :param failures: rules broken for which the author wants the whole batch refused.
    :param warnings: rule → number of rows that broke it and stay accepted.
    """

    accepted: pa.Table
    rejected: pa.Table
    failures: Sequence[str] = ()
    warnings: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class BatchRules:
    """What some rules about the whole batch need.

    :param columns: the author's columns that they read; None: all.
    :param rejects_rows: whether they can send single rows to quarantine (uniqueness can, a mean cannot).
    :param repeats: whether a row can only break them when another one has the same values in these columns (a single
        column's null equals no other): then such rows are all that need be judged.
    """

    columns: tuple[str, ...] | None
    rejects_rows: bool
    repeats: bool = False


@dataclass(frozen=True)
class Judgement:
    """What the rules about a whole batch say.

    :param reasons: row id → why that row is rejected.
    :param failures: rules broken for which the whole batch is refused.
    :param warnings: rule → number of rows (0 for a fact of the batch) that broke it and stay accepted.
    """

    reasons: Mapping[str, Sequence[str]] = field(default_factory=dict)
    failures: Sequence[str] = ()
    warnings: Mapping[str, int] = field(default_factory=dict)


class Validator(Protocol):
    """Rules over rows: each row by itself (:meth:`split`), and the batch as a whole (:meth:`judge`)."""

    @property
    def digest(self) -> str:
        """Names the rules: the same rules have the same digest."""

    @property
    def schema(self) -> Mapping[str, str]:
        """Column → declared type; an empty type: the column must exist, its type is inferred."""

    @property
    def batch_rules(self) -> tuple[BatchRules, ...]:
        """What the whole-batch rules need, group by group; when there is none, :meth:`judge` is not asked."""

    def split(self, table: pa.Table) -> Verdict:
        """Apply the rules that each row answers alone."""

    def judge(self, table: pa.Table, rules: BatchRules | None = None) -> Judgement:
        """Apply the rules that only the whole batch answers.

        :param table: ``_row_id`` and the columns that the rules read, of every decoded row of the batch, in order (of
            every row that may break them, where ``rules.repeats``).
        :param rules: one of :attr:`batch_rules`; None: all of them.
        """


class AcceptAll:
    """No rules: every row that can be decoded is accepted."""

    digest = "none"
    schema: Mapping[str, str] = {}
    batch_rules: tuple[BatchRules, ...] = ()

    def split(self, table: pa.Table) -> Verdict:
        return Verdict(table, no_reasons(table.slice(0, 0)))

    def judge(self, table: pa.Table, rules: BatchRules | None = None) -> Judgement:
        return Judgement()


def no_reasons(table: pa.Table) -> pa.Table:
    """Return the table with an empty ``_reasons`` per row; used for tables without rows."""
    return with_reasons(table, [[] for _ in range(table.num_rows)])


def with_reasons(table: pa.Table, reasons: Sequence[Sequence[str]]) -> pa.Table:
    """Return the table with each row's reasons beside it."""
    column = pa.array([list(r) for r in reasons], pa.list_(pa.string()))
    return table.append_column(REASONS, column)


def merge_texts(*texts: Iterable[str]) -> list[str]:
    """Return all texts once, in order of appearance."""
    return list(dict.fromkeys(text for group in texts for text in group))
