"""Ingest as operators: land a validated batch, and replay what was quarantined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseOperator

from airflow_ai_provider.core.ingest.sink import KafkaSink
from airflow_ai_provider.operators.landed import DataDocsLink, after_landing, documented, write_docs
from airflow_ai_provider.operators.source import SourceOperator, asked_of, open_reader, open_validator_of, source_value
from airflow_ai_provider.retry import retried
from airflow_ai_provider.run import find_file, run_of

if TYPE_CHECKING:
    from airflow_ai_provider.core.batch import BatchRef
    from airflow_ai_provider.core.ingest.contract import Validator
    from airflow_ai_provider.core.ingest.limit import Limits
    from airflow_ai_provider.core.ingest.replay import Fix
    from airflow_ai_provider.core.ingest.source import FileSource, KafkaSource
    from airflow_ai_provider.core.ledger import Ledger
    from airflow_ai_provider.core.store import Store
    from airflow_ai_provider.run import Run


class ValidatedIngestOperator(SourceOperator):
    """Land one validated batch from a source, each row in it or in quarantine with its reasons.

    Takes what came since the last batch (in a backfill run: what arrived in the run's data interval), checks it with
    a Great Expectations suite and stores accepted and quarantined rows. A retry or clear reads the same rows again
    and returns the same batch; two runs never take the same rows. A run with the conf ``{"replay": "<id>"}`` lands the
    mended rows of that replay instead (``airflow ai quarantine replay`` makes such runs).

    :param source: where rows come from: ``KafkaSource`` or ``FileSource``.
    :param expectations: the suite's JSON file, looked for beside the DAG file and in ``include/expectations``; None
        checks nothing but that rows can be decoded. Templated.
    :param max_rejected: a share below 1 (``0.2``, ``"20%"``) or a count (``50``); more rejected rows fail the task,
        and nothing is landed. None sets no limit. Templated.
    :param limits: :class:`Limits` on rows, bytes and time of arrival; None takes all there is. Templated.
    :param dead_letters: a Kafka topic (or ``KafkaSink``) that quarantined rows are sent to as well, once the batch has
        landed; none are sent in a muted run. Templated.
    :param store_conn_id: connection of the store.
    :param ledger_conn_id: connection of the ledger.
    :return: reference of the batch (XCom).
    :raises SourceUnavailableError: broker or file system down; a retry may help.
    :raises BatchRejectedError: too many rows rejected; a retry does not help.
    """

    template_fields: Sequence[str] = ("source", "expectations", "max_rejected", "limits", "dead_letters")
    operator_extra_links = (DataDocsLink(),)
    ui_color = "#d7ecff"

    def __init__(
        self,
        *,
        source: KafkaSource | FileSource | Mapping[str, Any],
        expectations: str | None = None,
        max_rejected: float | str | None = None,
        limits: Limits | Mapping[str, Any] | None = None,
        dead_letters: KafkaSink | Mapping[str, Any] | str | None = None,
        store_conn_id: str = "ai_store_default",
        ledger_conn_id: str = "ai_ledger_default",
        **kwargs: Any,
    ) -> None:
        super().__init__(**retried(kwargs))
        self.source = source
        self.expectations = expectations
        self.max_rejected = max_rejected
        self.limits = limits
        self.dead_letters = dead_letters
        self.store_conn_id = store_conn_id
        self.ledger_conn_id = ledger_conn_id

    def execute(self, context: Any) -> dict[str, Any]:
        """Land the batch."""
        from airflow_ai_provider.core.ingest.replay import land_replay
        from airflow_ai_provider.hooks.ledger import LedgerHook
        from airflow_ai_provider.hooks.store import StoreHook

        run, validator = run_of(context), open_validator_of(self.expectations, self.dag)
        store = StoreHook(self.store_conn_id).get_store()
        ledger = LedgerHook(self.ledger_conn_id).get_ledger()
        with documented(self, self.expectations, context, store):
            if run.replay:
                ref = land_replay(store, ledger, validator, run.replay, pipeline=run.pipeline, run_id=run.run_id)
            else:
                ref = self._ingest(run, validator, store, ledger)
        write_docs(self, self.expectations, context, store, ref)
        after_landing(run, ref, store, ledger, self.dead_letters)
        return ref.to_dict()

    def _ingest(self, run: Run, validator: Validator, store: Store, ledger: Ledger) -> BatchRef:
        from airflow_ai_provider.core.ingest.flow import ingest

        source = source_value(self.source, self.dag)
        asked = asked_of(run, source, self.limits, self.max_rejected)
        with closing(open_reader(source, tuple(validator.schema), run)) as reader:
            return ingest(reader, validator, store, ledger, asked)


class ReplayQuarantineOperator(BaseOperator):
    """Land corrected quarantined rows as a batch of their own, under the same row ids.

    Reads a batch's quarantine, applies corrections and fix, checks the rows again with the suite and lands those that
    pass; the rest stays in quarantine. Running it again with the same corrections returns the same batch.

    :param batch: reference of the batch (the ingest task's output). Templated.
    :param corrections: a file, as ``airflow ai quarantine export`` writes it and a person edits it, or a JSON object
        (or a mapping) of row id to changed fields; looked for beside the DAG file and in ``include/corrections``.
        Templated.
    :param fix: a function that takes a row's fields (none when its payload is no object) and returns them mended, or
        None to leave the row in quarantine; it must give the same for the same row.
    :param expectations: the suite, as for :class:`ValidatedIngestOperator`. Templated.
    :param store_conn_id: connection of the store.
    :param ledger_conn_id: connection of the ledger.
    :return: reference of the replayed batch (XCom), with the same downstream use as the first.
    :raises SpecError: corrections name rows that are not in quarantine; a retry does not help.
    """

    template_fields: Sequence[str] = ("batch", "corrections", "expectations")
    ui_color = "#d7ecff"

    def __init__(
        self,
        *,
        batch: Any,
        corrections: str | Mapping[str, Any] | None = None,
        fix: Fix | None = None,
        expectations: str | None = None,
        store_conn_id: str = "ai_store_default",
        ledger_conn_id: str = "ai_ledger_default",
        **kwargs: Any,
    ) -> None:
        super().__init__(**retried(kwargs))
        self.batch = batch
        self.corrections = corrections
        self.fix = fix
        self.expectations = expectations
        self.store_conn_id = store_conn_id
        self.ledger_conn_id = ledger_conn_id

    def execute(self, context: Any) -> dict[str, Any]:
        """Land the corrected rows."""
        from airflow_ai_provider.core.batch import BatchRef
        from airflow_ai_provider.core.ingest.correction import read_corrections
        from airflow_ai_provider.core.ingest.replay import replay_quarantine
        from airflow_ai_provider.hooks.ledger import LedgerHook
        from airflow_ai_provider.hooks.store import StoreHook

        run, given = run_of(context), self.corrections
        return replay_quarantine(
            StoreHook(self.store_conn_id).get_store(),
            LedgerHook(self.ledger_conn_id).get_ledger(),
            open_validator_of(self.expectations, self.dag),
            BatchRef.from_dict(self.batch),
            self.fix,
            corrections=read_corrections(find_file(self.dag, given, "corrections"))
            if isinstance(given, str)
            else given,
            pipeline=run.pipeline,
            run_id=run.run_id,
        ).to_dict()
