"""What the ingest operators share: a source as the author wrote it becomes rows and rules that can be asked for.

Invariant: nothing is opened, and no file is looked for, until a task runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseOperator

from airflow_ai_provider.errors import SpecError
from airflow_ai_provider.run import find_file, homes_of

if TYPE_CHECKING:
    from airflow_ai_provider.core.ingest.contract import Source, Validator
    from airflow_ai_provider.core.ingest.flow import IngestRun
    from airflow_ai_provider.core.ingest.limit import Limits
    from airflow_ai_provider.core.ingest.source import FileSource, KafkaSource
    from airflow_ai_provider.run import Run


class SourceOperator(BaseOperator):
    """Render the texts of a source given as a value: it is frozen, so Airflow cannot render them in place."""

    def render_template(self, content: Any, *args: Any, **kwargs: Any) -> Any:
        """Render one template field."""
        from airflow_ai_provider.core.ingest.source import FileSource, KafkaSource

        if isinstance(content, FileSource | KafkaSource):
            return type(content).from_dict(super().render_template(content.to_dict(), *args, **kwargs))
        return super().render_template(content, *args, **kwargs)


def asked_of(
    run: Run, source: KafkaSource | FileSource, limits: Limits | Mapping[str, Any] | None, max_rejected: Any
) -> IngestRun:
    """Say what a run asks for: its window, its limits, how much may be rejected."""
    from airflow_ai_provider.core.batch import share_or_count
    from airflow_ai_provider.core.ingest.flow import IngestRun
    from airflow_ai_provider.core.ingest.limit import Limits

    return IngestRun(
        pipeline=run.pipeline,
        run_id=run.run_id,
        run_key=run.task_key,
        attempt=run.attempt,
        window=window_of(source, run),
        limit=Limits.of(limits).read(datetime.now(UTC)),
        max_rejected=share_or_count(max_rejected),
    )


def source_value(source: KafkaSource | FileSource | Mapping[str, Any], dag: Any) -> KafkaSource | FileSource:
    """Return the source as this worker sees it: relative paths made absolute, a schema's file read."""
    from airflow_ai_provider.core.ingest.source import FileSource, source_from_dict

    value = source_from_dict(source) if isinstance(source, Mapping) else source
    if isinstance(value, FileSource):
        # an absolute path stays as it is
        return value if "://" in value.path else replace(value, path=str(homes_of(dag)[0] / value.path))
    if value.schema_file:
        return replace(value, reader_schema=Path(find_file(dag, value.schema_file, "schemas")).read_text("utf-8"))
    return value


def window_of(source: KafkaSource | FileSource, run: Run) -> tuple[datetime, datetime] | None:
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


def open_reader(value: KafkaSource | FileSource, columns: Sequence[str], run: Run) -> Source:
    """Open the source's reader; whoever opens it closes it."""
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


def open_validator_of(expectations: str | None, dag: Any) -> Validator:
    """Open the suite of this file; None checks nothing but that rows can be decoded."""
    from airflow_ai_provider.core.ingest.suite import open_validator

    return open_validator(find_file(dag, expectations, "expectations") if expectations else None)
