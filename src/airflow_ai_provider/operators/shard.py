"""Ingest as several operators: claim a batch, ingest its shards side by side, land them as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseOperator

from airflow_ai_provider.operators.landed import DataDocsLink, after_landing, documented, write_docs
from airflow_ai_provider.operators.source import SourceOperator, asked_of, open_reader, open_validator_of, source_value
from airflow_ai_provider.retry import retried
from airflow_ai_provider.run import run_of

if TYPE_CHECKING:
    from airflow_ai_provider.core.ingest.flow import IngestRun
    from airflow_ai_provider.core.ingest.limit import Limits
    from airflow_ai_provider.core.ingest.shard import ShardRef
    from airflow_ai_provider.core.ingest.sink import KafkaSink
    from airflow_ai_provider.core.ingest.source import FileSource, KafkaSource
    from airflow_ai_provider.core.ledger import Ledger
    from airflow_ai_provider.core.store import Store
    from airflow_ai_provider.run import Run


class PlanIngestOperator(SourceOperator):
    """Claim the rows of one batch and say which shards it is cut into, so that several tasks ingest it side by side.

    ``IngestShardOperator.partial(…).expand(shard=plan.output)`` reads and validates the shards, and
    :class:`LandBatchOperator` lands them as one batch. A retry or clear finds the same claim. There is always one shard
    at least, so a run that finds nothing lands an empty batch and is not skipped.

    :param source: as for :class:`ValidatedIngestOperator`. Templated.
    :param shards: how many at the most, 1 to 256; a shard has 10,000 rows or 8 MiB of files at least. Templated.
    :param limits: :class:`Limits` on rows, bytes and time of arrival; None takes all there is. Templated.
    :param ledger_conn_id: connection of the ledger.
    :return: one small dict per shard (XCom).
    :raises SourceUnavailableError: broker or file system down; a retry may help.
    :raises SpanConflictError: another run holds some of the rows; a retry does not help.
    """

    template_fields: Sequence[str] = ("source", "shards", "limits")
    ui_color = "#d7ecff"

    def __init__(
        self,
        *,
        source: KafkaSource | FileSource | Mapping[str, Any],
        shards: int | str = 4,
        limits: Limits | Mapping[str, Any] | None = None,
        ledger_conn_id: str = "ai_ledger_default",
        **kwargs: Any,
    ) -> None:
        super().__init__(**retried(kwargs))
        self.source = source
        self.shards = shards
        self.limits = limits
        self.ledger_conn_id = ledger_conn_id

    def execute(self, context: Any) -> list[dict[str, Any]]:
        """Claim and cut."""
        from airflow_ai_provider.core.ingest.flow import plan_shards
        from airflow_ai_provider.core.ingest.source import source_from_dict
        from airflow_ai_provider.hooks.ledger import LedgerHook

        run = run_of(context)
        if run.replay:
            return [{"replay": run.replay}]
        written = source_from_dict(self.source) if isinstance(self.source, Mapping) else self.source
        source = source_value(written, self.dag)
        asked = asked_of(run, source, self.limits, None)
        ledger = LedgerHook(self.ledger_conn_id).get_ledger()
        with closing(open_reader(source, (), run)) as reader:
            refs = plan_shards(reader, ledger, asked, int(self.shards))
        self.log.info("batch %s: %s shard(s), about %s each", refs[0].batch_id, len(refs), f"{refs[0].size:,}")
        # as written: where a relative path leads is for each worker to say
        return [{**ref.to_dict(), "source": written.to_dict()} for ref in refs]


class IngestShardOperator(BaseOperator):
    """Read, validate and store one shard of a batch; nothing of it is seen before :class:`LandBatchOperator` lands it.

    Mapped over the shards: ``IngestShardOperator.partial(task_id="shard", expectations=…).expand(shard=plan.output)``.
    A retry or clear does this shard alone, and nothing when it is done already under the same expectations.

    :param shard: one item of the plan's output. Templated.
    :param expectations: the suite, as for :class:`ValidatedIngestOperator`. Templated.
    :param store_conn_id: connection of the store.
    :param ledger_conn_id: connection of the ledger.
    :return: the shard with its counts and the digest of what it wrote (XCom).
    :raises SourceUnavailableError: broker or file system down; a retry may help.
    """

    template_fields: Sequence[str] = ("shard", "expectations")
    ui_color = "#d7ecff"

    def __init__(
        self,
        *,
        shard: Any,
        expectations: str | None = None,
        store_conn_id: str = "ai_store_default",
        ledger_conn_id: str = "ai_ledger_default",
        **kwargs: Any,
    ) -> None:
        super().__init__(**retried(kwargs))
        self.shard = shard
        self.expectations = expectations
        self.store_conn_id = store_conn_id
        self.ledger_conn_id = ledger_conn_id

    def execute(self, context: Any) -> dict[str, Any]:
        """Ingest the shard; a replay is landed as a whole."""
        if "replay" in self.shard:
            return {**self.shard, "expectations": self.expectations}
        from airflow_ai_provider.core.ingest.flow import Ingest

        run, validator = run_of(context), open_validator_of(self.expectations, self.dag)
        source = source_value(self.shard["source"], self.dag)
        with closing(open_reader(source, tuple(validator.schema), run)) as reader:
            done = Ingest(reader, validator, *_places(self), _claimed(run)).shard(_shard_ref(self.shard))
        return {**done.to_dict(), "source": self.shard["source"], "expectations": self.expectations}


class LandBatchOperator(BaseOperator):
    """Land the shards of a batch as one batch: judge it as a whole, and write its manifest.

    Asks the whole-batch expectations once over all shards, moves the rows that they reject to quarantine, holds all
    rejected rows against ``max_rejected``, and returns what :class:`ValidatedIngestOperator` returns. A retry or clear
    does the same again, or returns the landed batch.

    :param parts: the output of the mapped :class:`IngestShardOperator`: all its shards. Templated.
    :param max_rejected: a share below 1 (``0.2``, ``"20%"``) or a count (``50``) over the whole batch; more rejected
        rows fail the task, and nothing is landed. None sets no limit. Templated.
    :param dead_letters: as for :class:`ValidatedIngestOperator`. Templated.
    :param store_conn_id: connection of the store.
    :param ledger_conn_id: connection of the ledger.
    :return: reference of the batch (XCom).
    :raises BatchRejectedError: too many rows rejected; a retry does not help.
    :raises CorruptBatchError: a shard is missing or was made under other expectations; clear the shards.
    """

    template_fields: Sequence[str] = ("parts", "max_rejected", "dead_letters")
    operator_extra_links = (DataDocsLink(),)
    ui_color = "#d7ecff"

    def __init__(
        self,
        *,
        parts: Any,
        max_rejected: float | str | None = None,
        dead_letters: KafkaSink | Mapping[str, Any] | str | None = None,
        store_conn_id: str = "ai_store_default",
        ledger_conn_id: str = "ai_ledger_default",
        **kwargs: Any,
    ) -> None:
        super().__init__(**retried(kwargs))
        self.parts = parts
        self.max_rejected = max_rejected
        self.dead_letters = dead_letters
        self.store_conn_id = store_conn_id
        self.ledger_conn_id = ledger_conn_id

    def execute(self, context: Any) -> dict[str, Any]:
        """Land the batch."""
        from airflow_ai_provider.core.ingest.flow import Ingest
        from airflow_ai_provider.core.ingest.replay import land_replay

        run, parts = run_of(context), list(self.parts)
        first: Mapping[str, Any] = parts[0] if parts else {}
        validator = open_validator_of(first.get("expectations"), self.dag)
        store, ledger = _places(self)
        with documented(self, first.get("expectations"), context, store):
            if "replay" in first:
                ref = land_replay(store, ledger, validator, first["replay"], pipeline=run.pipeline, run_id=run.run_id)
            else:
                source = source_value(first.get("source") or {}, self.dag)
                with closing(open_reader(source, tuple(validator.schema), run)) as reader:
                    work = Ingest(reader, validator, store, ledger, _claimed(run, self.max_rejected))
                    ref = work.land([_shard_ref(part) for part in parts])
        write_docs(self, first.get("expectations"), context, store, ref)
        after_landing(run, ref, store, ledger, self.dead_letters)
        return ref.to_dict()


def _places(task: IngestShardOperator | LandBatchOperator) -> tuple[Store, Ledger]:
    from airflow_ai_provider.hooks.ledger import LedgerHook
    from airflow_ai_provider.hooks.store import StoreHook

    return StoreHook(task.store_conn_id).get_store(), LedgerHook(task.ledger_conn_id).get_ledger()


def _claimed(run: Run, max_rejected: float | str | None = None) -> IngestRun:
    """A run whose rows the plan has claimed: nothing is asked of its data interval."""
    from airflow_ai_provider.core.batch import share_or_count
    from airflow_ai_provider.core.ingest.flow import IngestRun

    return IngestRun(run.pipeline, run.run_id, run.task_key, max_rejected=share_or_count(max_rejected))


def _shard_ref(data: Any) -> ShardRef:
    from airflow_ai_provider.core.ingest.shard import ShardRef

    return ShardRef.from_dict(data)
