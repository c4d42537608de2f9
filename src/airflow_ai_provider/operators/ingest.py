"""Ingest as operators: land a validated batch, and replay what was quarantined."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from airflow.sdk import BaseOperator, BaseOperatorLink
from airflow.sdk.configuration import conf
from airflow.sdk.execution_time.xcom import XCom

from airflow_ai_provider.core.ingest.sink import KafkaSink
from airflow_ai_provider.errors import BatchRejectedError, SpecError
from airflow_ai_provider.retry import retried
from airflow_ai_provider.run import find_file, homes_of, run_of

if TYPE_CHECKING:
    from airflow_ai_provider.core.batch import BatchRef, Manifest
    from airflow_ai_provider.core.ingest.contract import Source, Validator
    from airflow_ai_provider.core.ingest.flow import IngestRun
    from airflow_ai_provider.core.ingest.limit import Limits
    from airflow_ai_provider.core.ingest.replay import Fix
    from airflow_ai_provider.core.ingest.source import FileSource, KafkaSource
    from airflow_ai_provider.core.ledger import Claim, Ledger
    from airflow_ai_provider.core.store import Store
    from airflow_ai_provider.run import Run

log = logging.getLogger(__name__)


class DataDocsLink(BaseOperatorLink):
    """Open Great Expectations' Data Docs of the batch that a task landed; the API server reads them from the store."""

    name = "Data Docs"
    xcom_key = "data_docs"

    def get_link(self, operator: Any, *, ti_key: Any) -> str:
        """Return what the task has noted; empty when its batch has no page."""
        # what this returns replaces the XCom once the task is done, so it is read back and not left out
        return XCom.get_value(ti_key=ti_key, key=self.xcom_key) or ""


class SourceOperator(BaseOperator):
    """Render the texts of a source given as a value: it is frozen, so Airflow cannot render them in place."""

    def render_template(self, content: Any, *args: Any, **kwargs: Any) -> Any:
        """Render one template field."""
        from airflow_ai_provider.core.ingest.source import FileSource, KafkaSource

        if isinstance(content, FileSource | KafkaSource):
            return type(content).from_dict(super().render_template(content.to_dict(), *args, **kwargs))
        return super().render_template(content, *args, **kwargs)


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

        run, validator = run_of(context), _open_validator(self.expectations, self.dag)
        store = StoreHook(self.store_conn_id).get_store()
        ledger = LedgerHook(self.ledger_conn_id).get_ledger()
        with _documented(self, self.expectations, context, store):
            if run.replay:
                ref = land_replay(store, ledger, validator, run.replay, pipeline=run.pipeline, run_id=run.run_id)
            else:
                ref = self._ingest(run, validator, store, ledger)
        _write_docs(self, self.expectations, context, store, ref)
        _after_landing(run, ref, store, ledger, self.dead_letters)
        return ref.to_dict()

    def _ingest(self, run: Run, validator: Validator, store: Store, ledger: Ledger) -> BatchRef:
        from airflow_ai_provider.core.ingest.flow import ingest

        source = _source_value(self.source, self.dag)
        asked = _asked(run, source, self.limits, self.max_rejected)
        with closing(_open_reader(source, tuple(validator.schema), run)) as reader:
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
            _open_validator(self.expectations, self.dag),
            BatchRef.from_dict(self.batch),
            self.fix,
            corrections=read_corrections(find_file(self.dag, given, "corrections"))
            if isinstance(given, str)
            else given,
            pipeline=run.pipeline,
            run_id=run.run_id,
        ).to_dict()


def _after_landing(
    run: Run, ref: BatchRef, store: Store, ledger: Ledger, dead_letters: KafkaSink | Mapping[str, Any] | str | None
) -> None:
    """Send the batch's dead letters, then say what waits in quarantine: in the log, and to who collects metrics."""
    from airflow.sdk.observability import stats
    from airflow.sdk.timezone import utcnow

    from airflow_ai_provider.core.ingest.quarantine import find_quarantines, summarise

    quarantines = find_quarantines(ledger, run.pipeline)
    landed = next((q.claim for q in quarantines if q.ref.digest == ref.digest), None)
    if dead_letters and landed is not None:
        _send_letters(run, landed, store, ledger, KafkaSink.of(dead_letters))
    waiting = summarise(quarantines, store, utcnow())
    log.info("%s", waiting)
    age = waiting.oldest.total_seconds() if waiting.oldest else 0.0
    stats.gauge("ai_provider.quarantine.rows", waiting.rows, tags={"pipeline": run.pipeline})
    stats.gauge("ai_provider.quarantine.oldest_s", age, tags={"pipeline": run.pipeline})


def _send_letters(run: Run, landed: Claim, store: Store, ledger: Ledger, sink: KafkaSink) -> None:
    if run.is_muted:
        log.info("muted run: nothing is sent to topic %s", sink.topic)
        return
    if landed.span.source == f"kafka:{sink.topic}":
        raise SpecError(
            f"dead_letters={sink.topic!r} is the topic that is read: each rejected row would come back for ever. "
            "Name another topic; the batch is landed.",
            faults=[("dead_letters", "is the source")],
        )
    from airflow_ai_provider.core.ingest.dead_letter import send_letters
    from airflow_ai_provider.hooks.kafka import KafkaConfigHook

    send_letters(store, ledger, landed, sink.topic, KafkaConfigHook(sink.kafka_conn_id).get_config())


def _asked(
    run: Run, source: KafkaSource | FileSource, limits: Limits | Mapping[str, Any] | None, max_rejected: Any
) -> IngestRun:
    from airflow_ai_provider.core.batch import share_or_count
    from airflow_ai_provider.core.ingest.flow import IngestRun
    from airflow_ai_provider.core.ingest.limit import Limits

    return IngestRun(
        pipeline=run.pipeline,
        run_id=run.run_id,
        run_key=run.task_key,
        window=_window(source, run),
        limit=Limits.of(limits).read(datetime.now(UTC)),
        max_rejected=share_or_count(max_rejected),
    )


@contextmanager
def _documented(task: Any, expectations: str | None, context: Any, store: Store) -> Iterator[None]:
    """Write the Data Docs of a batch that is refused, too: that is when they are looked for."""
    try:
        yield
    except BatchRejectedError as error:
        if "manifest" in vars(error):  # it is not, where no verdict came about
            _write_docs(task, expectations, context, store, error.ref, refused=error.manifest)
        raise


def _write_docs(
    task: Any, expectations: str | None, context: Any, store: Store, ref: BatchRef, *, refused: Manifest | None = None
) -> None:
    """Write the batch's Data Docs and note where the UI finds them; they are for people, so no task fails for them."""
    from airflow_ai_provider.core.ingest.suite import load_suite

    suite = load_suite(find_file(task.dag, expectations, "expectations")) if expectations else None
    if suite is None or not suite.data_docs:
        return
    from airflow_ai_provider.core.ingest.data_docs import write_data_docs

    try:
        log.info("Data Docs: %s", write_data_docs(store, ref, suite, refused))
    except Exception:
        log.warning("no Data Docs were written; nothing else depends on them", exc_info=True)
        return
    prefix = urlsplit(conf.get("api", "base_url", fallback="") or "").path.rstrip("/")
    place = f"{prefix}/ai-provider/data-docs/{ref.uri[len(store.root) + 1 :]}?store={task.store_conn_id}"
    context["ti"].xcom_push(key=DataDocsLink.xcom_key, value=place)


def _source_value(source: KafkaSource | FileSource | Mapping[str, Any], dag: Any) -> KafkaSource | FileSource:
    from airflow_ai_provider.core.ingest.source import FileSource, source_from_dict

    value = source_from_dict(source) if isinstance(source, Mapping) else source
    if isinstance(value, FileSource):
        # an absolute path stays as it is
        return value if "://" in value.path else replace(value, path=str(homes_of(dag)[0] / value.path))
    if value.schema_file:
        return replace(value, reader_schema=Path(find_file(dag, value.schema_file, "schemas")).read_text("utf-8"))
    return value


def _window(source: KafkaSource | FileSource, run: Run) -> tuple[datetime, datetime] | None:
    """The time span to take; None takes what comes next. Files are taken by content, never by time."""
    from airflow_ai_provider.core.ingest.source import KafkaSource

    if not isinstance(source, KafkaSource) or not (run.is_backfill or source.by == "window"):
        return None
    if run.window is None:
        raise SpecError(
            f"run {run.run_id} ({run.run_type}) takes {source.topic} by its data interval, and has none: the schedule "
            'gives runs no interval. Use schedule=CronDataIntervalTimetable("@hourly", timezone="UTC"), or a pipeline '
            "file, whose cron schedules do so.",
            faults=[("schedule", "gives runs no data interval")],
        )
    return run.window


def _open_reader(value: KafkaSource | FileSource, columns: Sequence[str], run: Run) -> Source:
    from airflow_ai_provider.core.ingest.source import KafkaSource, open_source

    if not isinstance(value, KafkaSource):
        return _open_files(value, run)
    from airflow_ai_provider.hooks.kafka import KafkaConfigHook

    config = KafkaConfigHook(value.kafka_conn_id).get_config()
    if not value.has_schemas:
        return open_source(value, kafka_config=config)
    from airflow_ai_provider.hooks.registry import SchemaRegistryHook

    schemas = SchemaRegistryHook(value.schema_registry_conn_id).get_registry(subject=f"{value.topic}-value")
    return open_source(value, kafka_config=config, schemas=schemas, columns=columns)


def _open_files(value: FileSource, run: Run) -> Source:
    from airflow_ai_provider.core.ingest.source import open_source
    from airflow_ai_provider.hooks.store import StoreHook

    options = StoreHook(value.fs_conn_id).get_options() if value.fs_conn_id else {}
    if not value.is_partitioned:
        return open_source(value, storage_options=options)
    taken = replace(value, path=value.path_of(run.partition, run.partition_time))
    return open_source(taken, storage_options=options, folder=value.folder)


def _open_validator(expectations: str | None, dag: Any) -> Validator:
    from airflow_ai_provider.core.ingest.suite import open_validator

    return open_validator(find_file(dag, expectations, "expectations") if expectations else None)
