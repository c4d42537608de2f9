"""A DAG of one task: each day's folder of a bucket, with keys from a connection; run by ``test_files_by_day.py``."""

from __future__ import annotations

from airflow.sdk import DAG, CronDataIntervalTimetable

from airflow_ai_provider import FileSource, ValidatedIngestOperator

with DAG(
    "files_by_day",
    schedule=CronDataIntervalTimetable("@daily", timezone="UTC"),
    params={"bucket": "by-day", "max_rejected": ""},
) as files_by_day:
    ValidatedIngestOperator(
        task_id="ingest",
        source=FileSource("s3://{{ params.bucket }}/in/day={partition}/*.jsonl", key="id", fs_conn_id="lake"),
        expectations="readings.json",
        max_rejected="{{ params.max_rejected }}",
        store_conn_id="lake_store",
    )
