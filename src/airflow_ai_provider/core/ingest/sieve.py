"""Decode and validate block by block, then judge the batch as a whole.

Invariants: every row in is in exactly one of accepted and rejected on the way out, and the row's reasons stand in the
order decode, row rules, batch rules; batch rules see every decoded row, also those that a row rule rejected.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import pyarrow as pa
import pyarrow.compute as pc

from airflow_ai_provider.core.batch import ROW_ID
from airflow_ai_provider.core.ingest.block import paused_gc
from airflow_ai_provider.core.ingest.contract import PAYLOAD, REASONS, Judgement, Validator
from airflow_ai_provider.core.ingest.decode import Decoded, RowDecoder, quarantine
from airflow_ai_provider.core.ingest.landing import merge_texts


class Sieve:
    """Part the rows of one batch into accepted and rejected.

    :param validator: the rules.
    :param format: what the source's tables hold.
    :param schema: column types of an earlier batch, under those that the validator declares.
    """

    def __init__(self, validator: Validator, format: str, schema: Mapping[str, str] | None = None) -> None:
        self._validator, self._rules = validator, validator.batch_rules
        self._decoder = RowDecoder(
            {**(schema or {}), **{n: t for n, t in validator.schema.items() if t}} if schema else validator.schema,
            format,
        )
        self._facts: list[pa.Table] = []
        self.failures: list[str] = []
        self.warnings: Counter[str] = Counter()

    @property
    def columns(self) -> dict[str, str]:
        """The batch's columns and their types, as far as rows have shown them."""
        return self._decoder.columns

    def sift(self, block: pa.Table) -> tuple[pa.Table, pa.Table]:
        """Decode and validate one block.

        :return: accepted rows and quarantine rows.
        """
        return self.validate(block, self.decode(block))

    def decode(self, block: pa.Table) -> Decoded:
        """Decode one block; blocks are decoded in their order."""
        with paused_gc():
            # a batch rule may still send accepted rows to quarantine, with their bytes
            decoded = self._decoder.decode(block, with_payload=self._rules is not None and self._rules.rejects_rows)
        if self._rules is not None and decoded.accepted.num_rows:
            names = self._rules.columns
            found = [n for n in decoded.accepted.column_names if n in names] if names is not None else self.columns
            self._facts.append(decoded.accepted.select([ROW_ID, *found]))
        return decoded

    def validate(self, block: pa.Table, decoded: Decoded) -> tuple[pa.Table, pa.Table]:
        """Validate a decoded block; may run on another thread than :meth:`decode`, while that is at the next block.

        :return: accepted rows and quarantine rows.
        """
        verdict = self._validator.split(decoded.accepted)
        self.failures = merge_texts(self.failures, verdict.failures)
        self.warnings.update(verdict.warnings)
        reasons = verdict.rejected[REASONS].to_pylist()
        invalid = quarantine(_with_payload(verdict.rejected.drop_columns([REASONS]), block), "validate", reasons)
        rejected = [t for t in (decoded.rejected, invalid) if t.num_rows]
        return verdict.accepted, _in_order(pa.concat_tables(rejected), block) if rejected else decoded.rejected

    def judge(self) -> Mapping[str, Sequence[str]]:
        """Ask the whole-batch rules, once, after the last block.

        :return: row id → reasons, of the rows that they reject.
        """
        if self._rules is None:
            return {}
        table = pa.concat_tables(self._facts) if self._facts else pa.table({ROW_ID: pa.array([], pa.string())})
        judgement: Judgement = self._validator.judge(table)
        self.failures = merge_texts(self.failures, judgement.failures)
        self.warnings.update(judgement.warnings)
        return judgement.reasons


def _in_order(rows: pa.Table, block: pa.Table) -> pa.Table:
    """Return rows in the order in which the block has them."""
    return rows.take(_look_up(rows, block).drop_null())


def _with_payload(rows: pa.Table, block: pa.Table) -> pa.Table:
    """Return rows, in the block's order, with the payloads that decoding left behind."""
    if PAYLOAD in rows.column_names or PAYLOAD not in block.column_names:
        return rows
    return rows.append_column(PAYLOAD, block[PAYLOAD].filter(pc.is_valid(_look_up(rows, block))))


def _look_up(rows: pa.Table, block: pa.Table) -> pa.ChunkedArray:
    """For each row of the block, where it is among the few rows."""
    return pc.index_in(block[ROW_ID], rows[ROW_ID].combine_chunks())


def _by_origin(rows: pa.Table) -> pa.Table:
    """Return rows in the order of their origin, which is the order in which a source reads them."""
    origin = [name for name in ("_file", "_row", "_partition", "_offset") if name in rows.column_names]
    return rows.sort_by([(name, "ascending") for name in origin]) if origin else rows


def reject_more(
    accepted: pa.Table, rejected: pa.Table, reasons: Mapping[str, Sequence[str]]
) -> tuple[pa.Table, pa.Table]:
    """Move the rows that a whole-batch rule rejects; a row that was rejected already gets the further reasons."""
    if not reasons:
        return accepted, rejected
    hit = pc.is_in(accepted[ROW_ID], pa.array(list(reasons), accepted.schema.field(ROW_ID).type))
    moved = accepted.filter(hit)
    more = quarantine(moved, "validate", [reasons[row_id] for row_id in moved[ROW_ID].to_pylist()])
    if rejected.num_rows:
        known = zip(rejected[ROW_ID].to_pylist(), rejected[REASONS].to_pylist(), strict=True)
        longer = [[*found, *reasons.get(row_id, ())] for row_id, found in known]
        at = rejected.column_names.index(REASONS)
        rejected = rejected.set_column(at, REASONS, pa.array(longer, pa.list_(pa.string())))
    parts = [t for t in (rejected, more) if t.num_rows]
    return accepted.filter(pc.invert(hit)), _by_origin(pa.concat_tables(parts)) if parts else rejected


class Shelf:
    """Keep sifted blocks on the local disk until the batch has been judged; emptied on leaving."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ingest-")
        self._count = 0

    def __enter__(self) -> Shelf:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._folder.cleanup()

    def put(self, accepted: pa.Table, rejected: pa.Table) -> None:
        """Keep one block."""
        for name, table in (("accepted", accepted), ("rejected", rejected)):
            with pa.ipc.new_file(self._path(self._count, name), table.schema) as sink:
                sink.write_table(table)
        self._count += 1

    def take(self) -> Iterator[tuple[pa.Table, pa.Table]]:
        """Yield the blocks in the order they were put, one in memory at a time."""
        for number in range(self._count):
            accepted, rejected = (self._read(number, name) for name in ("accepted", "rejected"))
            yield accepted, rejected

    def _read(self, number: int, name: str) -> pa.Table:
        with pa.OSFile(self._path(number, name)) as file:
            return pa.ipc.open_file(file).read_all()

    def _path(self, number: int, name: str) -> str:
        return str(Path(self._folder.name) / f"{number:05d}.{name}")
