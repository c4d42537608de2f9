"""Decode and validate block by block.

Invariants: every row in is in exactly one of accepted and rejected on the way out, and the row's reasons stand in the
order decode, row rules, batch rules; batch rules see every decoded row, also those that a row rule rejected; all shards
of a batch come to the same columns, those of the batch's first rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc

from airflow_ai_provider.core.batch import ROW_ID
from airflow_ai_provider.core.ingest.behind import Behind
from airflow_ai_provider.core.ingest.block import paused_gc
from airflow_ai_provider.core.ingest.contract import PAYLOAD, REASONS, Validator, merge_texts
from airflow_ai_provider.core.ingest.decode import Decoded, RowDecoder, quarantine
from airflow_ai_provider.core.ingest.landing import count_reasons
from airflow_ai_provider.core.ingest.progress import Progress
from airflow_ai_provider.core.ingest.shelf import Block, Done, Shelf


class Sieve:
    """Part the rows of one shard into accepted and rejected.

    :param validator: the rules.
    :param format: what the source's tables hold.
    :param schema: column types of an earlier batch, under those that the validator declares.
    """

    def __init__(self, validator: Validator, format: str, schema: Mapping[str, str] | None = None) -> None:
        self._validator, self._format = validator, format
        self._rejects = any(rules.rejects_rows for rules in validator.batch_rules)
        self._decoder = RowDecoder(
            {**(schema or {}), **{n: t for n, t in validator.schema.items() if t}} if schema else validator.schema,
            format,
        )
        self.failures: list[str] = []
        self.warnings: Counter[str] = Counter()

    @property
    def columns(self) -> dict[str, str]:
        """The batch's columns and their types, as far as rows have shown them."""
        return self._decoder.columns

    def learn(self, block: pa.Table) -> pa.Schema | None:
        """Fix the columns by the batch's first rows.

        :return: the columns, for the other shards' :meth:`recall`; None when no row fits.
        """
        self._decoder.decode(block, with_payload=False)
        return self._decoder.head

    def recall(self, head: pa.Schema) -> None:
        """Take over the columns that another shard has learned."""
        self._decoder.fix(head)

    def sift(self, blocks: Iterable[pa.Table], shelf: Shelf, report: Progress) -> Done:
        """Decode, validate and store the blocks of a shard.

        :return: what was made, for the shard's mark.
        """
        stored: list[Block] = []
        counts, reasons = Counter(read=0, accepted=0, quarantined=0), Counter[str]()

        def put(block: pa.Table, finish: Callable[[], Decoded]) -> None:
            decoded = finish()
            accepted, rejected = self.validate(block, decoded)
            stored.append(shelf.write(len(stored), accepted, rejected, self._evidence(decoded)))
            counts.update(accepted=accepted.num_rows, quarantined=rejected.num_rows)
            reasons.update(count_reasons(rejected))

        with Behind() as behind:
            for block in blocks:
                finish = self._begin(block)
                # what is left to do holds no interpreter lock to speak of: it keeps up while the next is read
                behind.do(partial(put, block, finish))
                counts["read"] += block.num_rows
                report.note(block.num_rows, counts["accepted"], counts["quarantined"])
            behind.wait()
        report.end(counts["accepted"], counts["quarantined"])
        return Done(
            tuple(stored),
            dict(counts),
            dict(sorted(reasons.items())),
            self.columns,
            tuple(self.failures),
            dict(sorted(self.warnings.items())),
        )

    def _begin(self, block: pa.Table) -> Callable[[], Decoded]:
        with paused_gc():
            # a batch rule may still send accepted rows to quarantine, with their bytes
            return self._decoder.begin(block, with_payload=self._rejects)

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

    def _evidence(self, decoded: Decoded) -> pa.Table | None:
        """The columns that whole-batch rules read; None when there are none, or no rows."""
        if not self._validator.batch_rules or not decoded.accepted.num_rows:
            return None
        asked = [rules.columns for rules in self._validator.batch_rules]
        found = self.columns
        if None not in asked:
            found = {n: t for n, t in found.items() if any(n in (names or ()) for names in asked)}
        return decoded.accepted.select([ROW_ID, *found])


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
