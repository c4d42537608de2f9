"""Land the shards of a batch: judge it as a whole, move what that rejects, refuse it, or write its manifest.

Invariants: every rejected row is counted under the code of its first reason; nothing exists until the manifest is
written; a try that is killed before that leaves all that the shards have made as it was, so the next one does the same
again.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from airflow_ai_provider.core.batch import QUARANTINE, ROW_ID, BatchRef, Manifest, Part, canonical_json
from airflow_ai_provider.core.ingest.contract import REASONS, Validator, merge_texts
from airflow_ai_provider.core.ingest.decode import quarantine
from airflow_ai_provider.core.ingest.evidence import judge
from airflow_ai_provider.core.ingest.shelf import KIND, Block, Done, Shelf
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.errors import BatchRejectedError


@dataclass(frozen=True)
class Shelved:
    """A shard that is done, and where its files lie."""

    shelf: Shelf
    done: Done


@dataclass
class Landing:
    """A batch on its way into the store.

    :param store: where it goes.
    :param pipeline: whose batch it is.
    :param batch_id: its name, made of what it contains.
    :param shards: all its shards, in row order.
    """

    store: Store
    pipeline: str
    batch_id: str
    shards: Sequence[Shelved]
    counts: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    warnings: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._writer = self.store.open_batch(self.pipeline, KIND, self.batch_id)
        self._folder = f"{self.store.root}/{self._writer.folder}"
        self._blocks = [list(shard.done.blocks) for shard in self.shards]
        for shard in self.shards:
            self.counts.update(shard.done.counts)
            self.reasons.update(shard.done.reasons)
            self.warnings.update(shard.done.warnings)
            self.failures = merge_texts(self.failures, shard.done.failures)

    def judge(self, validator: Validator) -> None:
        """Ask the whole-batch rules, once, and move the rows that they reject to quarantine."""
        if not validator.batch_rules:
            return
        found = judge(validator, lambda: (table for *_, table in self._evidence()))
        self.failures = merge_texts(self.failures, found.failures)
        self.warnings.update(found.warnings)
        ids = pa.array(list(found.reasons), pa.string())
        for at, number, table in self._evidence() if found.reasons else ():
            if pc.any(pc.is_in(table[ROW_ID], ids)).as_py():
                self._blocks[at][number] = self._move(self.shards[at], number, found.reasons)

    def refuse(self, max_rejected: float | int | None, facts: Mapping[str, Any]) -> None:
        """Refuse the batch when too many rows failed, or a whole-batch rule did.

        :param max_rejected: share of the rows (float) or number of rows (int) that may be rejected; None: any.
        :param facts: as for :meth:`land`. The error carries ``ref`` and ``manifest`` as they would have been: there is
            no such batch, but its rejected rows lie where the manifest says.
        :raises BatchRejectedError: naming the top reasons and where the rejected rows lie; a retry does not help.
        """
        read, rejected = self.counts["read"], self.counts["quarantined"]
        allowed = _allowed(read, max_rejected)
        if not self.failures and (allowed is None or rejected <= allowed):
            return
        if self.failures:
            what = "whole-batch rules failed: " + "; ".join(self.failures)
        else:
            limit = f"{max_rejected:.4g} of them" if isinstance(max_rejected, float) else f"{max_rejected} rows"
            what = f"max_rejected allows {limit}"
        refused = Manifest(
            KIND,
            self.batch_id,
            self._parts(),
            self._counts(),
            {**self._told(facts), "refused": what, "failures": list(self.failures)},
        )
        top = ", ".join(f"{code} {count}" for code, count in self.reasons.most_common(5)) or "none"
        tasks = "this task" if len(self.shards) == 1 else "the shards' tasks and this one"
        raise BatchRejectedError(
            f"batch {self.batch_id}: {rejected} of {read} rows were rejected; {what}. "
            f"Top reasons: {top}. The rejected rows lie in {self._folder}/{QUARANTINE}; nothing was landed. "
            f"Mend the source or the expectations, then clear {tasks}: the same rows are taken again.",
            batch_id=self.batch_id,
            uri=f"{self._folder}/{QUARANTINE}",
            counts=dict(self.counts),
            reasons=dict(self.reasons),
            failures=list(self.failures),
            ref=BatchRef(KIND, self.batch_id, self._folder, "", self._counts()),
            manifest=refused,
        )

    def land(self, facts: Mapping[str, Any]) -> BatchRef:
        """Write the manifest.

        :param facts: what the rows came from; columns, reasons, warnings and what the source told are added.
        :raises RowMismatchError: when the parts do not hold the rows that were read; nothing is landed; a retry does
            not help.
        """
        for part in self._parts():
            self._writer.keep(part)
        return self._writer.land(self._counts(), {"columns": _columns(self.shards), **self._told(facts)})

    def _parts(self) -> tuple[Part, ...]:
        blocks = (block for blocks in self._blocks for block in blocks)
        return tuple(part for block in blocks for part in (block.accepted, block.quarantine) if part is not None)

    def _counts(self) -> dict[str, int]:
        return {name: self.counts[name] for name in ("read", "accepted", "quarantined")}

    def _told(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        warned = {"warnings": dict(sorted(self.warnings.items()))} if self.warnings else {}
        from_source = _merged([shard.done.facts for shard in self.shards])
        return {**facts, **from_source, **warned, "reasons": dict(sorted(self.reasons.items()))}

    def _evidence(self) -> Iterator[tuple[int, int, pa.Table]]:
        """Which shard, which block of it, and what whole-batch rules read of its rows."""
        for at, shard in enumerate(self.shards):
            for number, table in shard.shelf.evidence(shard.done):
                yield at, number, table

    def _move(self, shard: Shelved, number: int, reasons: Mapping[str, Sequence[str]]) -> Block:
        accepted, rejected = shard.shelf.load(number, shard.done.blocks[number])
        accepted, rejected, moved = reject_more(accepted, rejected, reasons)
        self.reasons.update(_codes(moved))
        self.counts.update({"accepted": -len(moved), "quarantined": len(moved)})
        return shard.shelf.rewrite(number, accepted, rejected)


def count_reasons(rejected: pa.Table) -> Counter[str]:
    """Count quarantine rows by the code of their first reason."""
    return _codes(rejected[REASONS].to_pylist())


def reject_more(
    accepted: pa.Table | None, rejected: pa.Table | None, reasons: Mapping[str, Sequence[str]]
) -> tuple[pa.Table, pa.Table, list[Sequence[str]]]:
    """Move the rows of a block that a whole-batch rule rejects; one that was rejected already gets the further reasons.

    :return: accepted rows, quarantine rows, and the reasons of those that moved.
    """
    parts = []
    if rejected is not None:
        known = zip(rejected[ROW_ID].to_pylist(), rejected[REASONS].to_pylist(), strict=True)
        longer = [[*found, *reasons.get(row_id, ())] for row_id, found in known]
        at = rejected.column_names.index(REASONS)
        parts.append(rejected.set_column(at, REASONS, pa.array(longer, pa.list_(pa.string()))))
    why: list[Sequence[str]] = []
    if accepted is not None:
        hit = pc.is_in(accepted[ROW_ID], pa.array(list(reasons), accepted.schema.field(ROW_ID).type))
        moved = accepted.filter(hit)
        why = [reasons[row_id] for row_id in moved[ROW_ID].to_pylist()]
        parts.append(quarantine(moved, "validate", why))
        accepted = accepted.filter(pc.invert(hit))
    filled = [part for part in parts if part.num_rows] or parts[:1]
    empty = pa.table({ROW_ID: pa.array([], pa.string())})
    return accepted if accepted is not None else empty, _by_origin(pa.concat_tables(filled)), why


def _by_origin(rows: pa.Table) -> pa.Table:
    """Return rows in the order of their origin, which is the order in which a source reads them."""
    origin = [name for name in ("_file", "_row", "_partition", "_offset") if name in rows.column_names]
    return rows.sort_by([(name, "ascending") for name in origin]) if origin else rows


def _codes(reasons: Iterable[Sequence[str]]) -> Counter[str]:
    return Counter(found[0].partition(":")[0] for found in reasons)


def _columns(shards: Sequence[Shelved]) -> dict[str, str]:
    """The columns of the batch, which all shards have from its first rows; where none of those fits, each for itself.

    :raises BatchRejectedError: when two shards differ; a retry does not help.
    """
    columns: dict[str, str] = {}
    for shard in shards:
        for name, kind in shard.done.columns.items():
            if columns.setdefault(name, kind) != kind:
                raise BatchRejectedError(
                    f"column {name} is {columns[name]} in one shard and {kind} in another, for none of the batch's "
                    "first rows could be read. Declare its type with expect_column_values_to_be_of_type and clear the "
                    "shards' tasks and this one.",
                    column=name,
                )
    return columns


def _merged(facts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the source told of each shard, said once: lists become one list, all else is the same for all."""
    merged: dict[str, Any] = {}
    for told in facts:
        for name, value in told.items():
            merged[name] = _union(merged.get(name, []), value) if isinstance(value, list) else value
    return merged


def _union(one: list[Any], other: list[Any]) -> list[Any]:
    return [json.loads(text) for text in dict.fromkeys(map(canonical_json, (*one, *other)))]


def _allowed(read: int, max_rejected: float | int | None) -> float | None:
    if max_rejected is None:
        return None
    return max_rejected * read if isinstance(max_rejected, float) else max_rejected
