"""The same pipeline as ``pipelines/tumour_triage.yaml``, written as a plain Python DAG."""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG

from airflow_ai_provider import (
    ApiActionOperator,
    BatchInferenceOperator,
    CompensateOperator,
    ConfidenceBranchOperator,
    Fallback,
    KafkaSource,
    PinModelOperator,
    Policy,
    ReviewOperator,
    Undo,
    ValidatedIngestOperator,
)

RULE = Fallback("worst_radius > 16.8", then="malignant", otherwise="benign")

with DAG("tumour_triage_by_hand", schedule="@hourly", max_active_runs=1, tags=["example", "tumour"]) as dag:
    pin = PinModelOperator(task_id="pin", model="triage@champion")
    batch = ValidatedIngestOperator(
        task_id="ingest",
        source=KafkaSource("biopsies", key="biopsy_id"),
        expectations="biopsies.json",
        max_rejected="20%",
    )
    scored = BatchInferenceOperator(task_id="infer", batch=batch.output, model=pin.output)
    routes = ConfidenceBranchOperator(
        task_id="decide",
        predictions=scored.output,
        policy=Policy(act=0.95, review=0.70, otherwise="fallback", fallback=RULE),
    )
    review = ReviewOperator(
        task_id="review", rows=routes.output["review"], response_timeout=timedelta(hours=4), on_timeout="hold"
    )
    ticket = ApiActionOperator(
        task_id="ticket",
        rows=[routes.output["act"], review.output, routes.output["fallback"]],
        endpoint="/tickets",
        json="ticket.json.j2",
        undo=Undo("DELETE", "/tickets/{id}"),
    )
    page = ApiActionOperator(
        task_id="page",
        rows=[review.output, routes.output["fallback"]],
        endpoint="/pages",
        json="page.json.j2",
        max_refused="50%",
    )
    ticket >> page >> CompensateOperator(task_id="undo", actions=[ticket.output, page.output])
