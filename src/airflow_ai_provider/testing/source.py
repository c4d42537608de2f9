"""A source in memory and a validator that is a rule: fakes of what ingest asks for.

Invariants: they meet the same contract suites as the real ones; a span is read the same every time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import pyarrow as pa

from airflow_ai_provider.core.batch import ROW_ID, Slice, Span, digest_of
from airflow_ai_provider.core.ingest.contract import (
    PAYLOAD,
    BatchRules,
    Judgement,
    Verdict,
    no_reasons,
    with_reasons,
)
from airflow_ai_provider.core.ingest.json_rows import is_column
from airflow_ai_provider.core.ingest.kafka_span import cap, demand_kept, demand_same
from airflow_ai_provider.errors import SourceUnavailableError


class MemorySource:
    """A topic in memory: payloads per topic partition, which a test may add to, delete, or make anew.

    :param payloads: topic partition → payloads, oldest first; None is a tombstone.
    :param name: of the topic.
    :param identity: what tells it from a later topic of the same name.
    :param key: the author's key column.
    :param chunk: rows per table read.
    """

    format = "json"

    def __init__(
        self,
        payloads: Mapping[int, Sequence[bytes | None]],
        name: str = "rows",
        identity: str = "memory-1",
        key: str | None = None,
        chunk: int = 1000,
    ) -> None:
        self.name, self.key, self._identity, self._chunk = f"memory:{name}", key, identity, chunk
        self._topic = name
        self._payloads = {p: list(rows) for p, rows in payloads.items()}
        self._low = dict.fromkeys(self._payloads, 0)
        self.is_down = False
        self.is_closed = False
        self.rows_read = 0
        self.committed: dict[str, int] = {}

    def add(self, partition: int, *payloads: bytes | None) -> None:
        """Append payloads; a new topic partition begins at 0."""
        self._payloads.setdefault(partition, []).extend(payloads)
        self._low.setdefault(partition, 0)

    def delete_before(self, partition: int, offset: int) -> None:
        """Forget the rows below an offset, as retention does."""
        self._low[partition] = offset

    def make_anew(self, identity: str, payloads: Mapping[int, Sequence[bytes | None]]) -> None:
        """Replace the topic by another one of the same name."""
        self._identity = identity
        self._payloads = {p: list(rows) for p, rows in payloads.items()}
        self._low = dict.fromkeys(self._payloads, 0)

    def identity(self) -> str:
        self._demand_up()
        return self._identity

    def plan(
        self,
        position: Mapping[str, int],
        taken: Mapping[str, str],
        window: tuple[datetime, datetime] | None,
        row_limit: int | None,
    ) -> Span:
        """Take what comes after the position; a window is not known here, for rows have no time."""
        self._demand_up()
        first = {p: position.get(str(p), self._low[p]) for p in self._payloads}
        bounds = {p: (first[p], len(rows)) for p, rows in self._payloads.items() if first[p] < len(rows)}
        demand_kept(self._topic, "memory", self._low, {p: at for p, (at, _) in bounds.items()})
        if row_limit is not None:
            bounds = cap(bounds, row_limit)
        slices = tuple(sorted(Slice(str(p), at, end) for p, (at, end) in bounds.items()))
        return Span(self.name, self._identity, slices, {"partitions": len(self._payloads)})

    def read(self, span: Span) -> Iterator[pa.Table]:
        self._demand_up()
        demand_same(self._topic, "memory", span.identity, self._identity)
        demand_kept(self._topic, "memory", self._low, {int(s.partition): s.first for s in span.slices})
        for part in sorted(span.slices, key=lambda s: int(s.partition)):
            for first in range(part.first, part.end, self._chunk):
                self._demand_up()
                yield self._table(int(part.partition), first, min(first + self._chunk, part.end))

    def commit(self, span: Span) -> None:
        for part in span.slices:
            self.committed[part.partition] = max(part.end, self.committed.get(part.partition, 0))

    def close(self) -> None:
        self.is_closed = True

    def _table(self, partition: int, first: int, end: int) -> pa.Table:
        offsets = range(first, end)
        self.rows_read += len(offsets)
        return pa.table(
            {
                ROW_ID: [f"{self._topic}~{self._identity[:8]}/{partition}/{offset}" for offset in offsets],
                PAYLOAD: pa.array(self._payloads[partition][first:end], pa.binary()),
                "_partition": pa.array([partition] * len(offsets), pa.int32()),
                "_offset": pa.array(offsets, pa.int64()),
            }
        )

    def _demand_up(self) -> None:
        if self.is_down:
            raise SourceUnavailableError(f"{self.name} is down. Set is_down to False; the retry asks again.")


class RuleValidator:
    """A validator made of plain functions.

    :param rule: takes a row's columns, returns why it is rejected, or None.
    :param schema: column → declared type.
    :param unique: column whose values may occur once only in a batch; all rows with a doubled value are rejected.
    :param whole: takes the batch's columns, returns why the whole batch is refused.
    """

    def __init__(
        self,
        rule: Callable[[dict[str, Any]], str | None] = lambda row: None,
        schema: Mapping[str, str] | None = None,
        unique: str | None = None,
        whole: Callable[[pa.Table], Sequence[str]] | None = None,
        name: str = "rule",
    ) -> None:
        self._rule, self.schema, self._unique, self._whole = rule, dict(schema or {}), unique, whole
        self.digest = digest_of({"name": name, "schema": self.schema, "unique": unique, "whole": whole is not None})
        repeats = [] if unique is None else [BatchRules((unique,), rejects_rows=True, repeats=True)]
        self.batch_rules = (*repeats, *([] if whole is None else [BatchRules(None, rejects_rows=False)]))

    def split(self, table: pa.Table) -> Verdict:
        rows = table.select([n for n in table.column_names if is_column(n)]).to_pylist() or [{}] * table.num_rows
        told = [self._rule(row) for row in rows]
        bad = [i for i, why in enumerate(told) if why]
        if not bad:
            return Verdict(table, no_reasons(table.slice(0, 0)))
        good = pa.array([i for i, why in enumerate(told) if not why], pa.int64())
        rejected = with_reasons(table.take(pa.array(bad, pa.int64())), [[why] for why in told if why])
        return Verdict(table.take(good), rejected)

    def judge(self, table: pa.Table, rules: BatchRules | None = None) -> Judgement:
        failures = list(self._whole(table)) if self._whole and not (rules and rules.repeats) else []
        asked = rules is None or rules.repeats
        if self._unique is None or self._unique not in table.column_names or not asked:
            return Judgement(failures=failures)
        places: dict[Any, list[str]] = {}
        for row_id, value in zip(table[ROW_ID].to_pylist(), table[self._unique].to_pylist(), strict=True):
            if value is not None:
                places.setdefault(value, []).append(row_id)
        why = f"not_unique: {self._unique} occurs more than once"
        return Judgement({r: [why] for ids in places.values() if len(ids) > 1 for r in ids}, failures)
