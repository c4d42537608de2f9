"""The example pipeline as a plain Python DAG: what P1 holds the YAML against."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from airflow.sdk import DAG, CronDataIntervalTimetable, Param

from airflow_ai_provider import (
    ApiActionOperator,
    BatchInferenceOperator,
    CompensateOperator,
    ConfidenceBranchOperator,
    PinModelOperator,
    ReviewOperator,
    ValidatedIngestOperator,
)

_FALLBACK = {"rule": "worst_radius > 16.8", "then": "malignant", "otherwise": "benign"}
_SOURCE = {"kind": "kafka", "topic": "biopsies", "key": "biopsy_id"}


def build(dag_id: str) -> DAG:
    """Build one DAG."""
    with DAG(
        dag_id,
        description="Decide which biopsies are malignant; ask a person about the ambiguous ones.",
        schedule=CronDataIntervalTimetable("@hourly", timezone="UTC"),
        start_date=datetime(2026, 1, 1, tzinfo=UTC),
        catchup=False,
        max_active_runs=1,
        tags={"ai", "example", "tumour"},
        default_args={
            "owner": "airflow",
            "retries": 4,
            "retry_delay": timedelta(seconds=30),
            "retry_exponential_backoff": 2.0,
        },
        params={
            "model": Param("triage@champion", type="string", description="Model", minLength=3),
            "act": Param(0.95, type="number", description="Act at or above", minimum=0, maximum=1),
            "review": Param(0.7, type="number", description="Review at or above", minimum=0, maximum=1),
            "row_limit": Param(0, type="integer", description="At most so many rows", minimum=0),
            "dry_run": Param(False, type="boolean", description="Send nothing"),
            "act_in_backfill": Param(False, type="boolean", description="Act in a backfill too"),
        },
        doc_md="Decide which biopsies are malignant; ask a person about the ambiguous ones.",
    ) as dag:
        pin = PinModelOperator(task_id="pin", model="{{ params.model }}")
        batch = ValidatedIngestOperator(
            task_id="ingest",
            source=_SOURCE,
            expectations="biopsies.json",
            max_rejected="20%",
            limits={"rows": "{{ params.row_limit }}"},
        )
        scored = BatchInferenceOperator(task_id="infer", batch=batch.output, model=pin.output, device="auto")
        policy = {"act": "{{ params.act }}", "review": "{{ params.review }}", "otherwise": "fallback"}
        policy["fallback"] = _FALLBACK
        routes = ConfidenceBranchOperator(task_id="decide", predictions=scored.output, policy=policy)
        review = ReviewOperator(task_id="review", rows=routes.output["review"], response_timeout=timedelta(hours=4))
        ticket = ApiActionOperator(
            task_id="ticket",
            rows=[routes.output["act"], review.output, routes.output["fallback"]],
            endpoint="/tickets",
            json="ticket.json.j2",
            undo={"delete": "/tickets/{id}"},
        )
        page = ApiActionOperator(
            task_id="page",
            rows=[review.output, routes.output["fallback"]],
            endpoint="/pages",
            json="page.json.j2",
            max_refused="50%",
        )
        ticket >> page >> CompensateOperator(task_id="undo", actions=[ticket.output, page.output])
    return dag
