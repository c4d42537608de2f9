"""The operators as Airflow sees them: declared at parse, the same after a round trip, failing at once or not."""

from __future__ import annotations

import inspect
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
from airflow.sdk import DAG, ExceptionRetryPolicy, RetryAction
from airflow.serialization.serialized_objects import DagSerialization
from uuid6 import uuid7

import airflow_ai_provider as face
from airflow_ai_provider import errors
from airflow_ai_provider.operators.source import source_value, window_of
from airflow_ai_provider.retry import RETRY_POLICY
from airflow_ai_provider.run import Run, run_of

OPERATORS = [getattr(face, name) for name in face.__all__ if name.endswith("Operator")]


@pytest.fixture
def dag() -> Any:
    """The DAG of the README, written by hand."""
    with DAG("tumour_triage", schedule="@hourly") as made:
        pin = face.PinModelOperator(task_id="pin", model="triage@champion")
        source = face.KafkaSource("biopsies", key="biopsy_id")
        batch = face.ValidatedIngestOperator(task_id="ingest", source=source, expectations="biopsies.json")
        scored = face.BatchInferenceOperator(task_id="infer", batch=batch.output, model=pin.output)
        mapped = face.BatchInferenceOperator.partial(task_id="shard", batch=batch.output, model=pin.output)
        face.GatherPredictionsOperator(
            task_id="gather", batch=batch.output, model=pin.output, shards=mapped.expand(shard=face.shards(3)).output
        )
        planned = face.PlanIngestOperator(task_id="ingest_plan", source=source, shards=3)
        pieces = face.IngestShardOperator.partial(task_id="ingest_shard").expand(shard=planned.output)
        face.LandBatchOperator(task_id="land", parts=pieces.output)
        policy = face.Policy(act=0.95, review=0.60, otherwise="hold")
        routes = face.ConfidenceBranchOperator(task_id="decide", predictions=scored.output, policy=policy)
        review = face.ReviewOperator(
            task_id="review", rows=routes.output["review"], response_timeout=timedelta(hours=4), on_timeout="hold"
        )
        ticket = face.ApiActionOperator(
            task_id="ticket", rows=[routes.output["act"], review.output], endpoint="/tickets", json="ticket.json.j2"
        )
        page = face.ApiActionOperator(task_id="page", rows=[routes.output["act"]], endpoint="/pages")
        undo = face.CompensateOperator(task_id="undo", actions=[ticket.output, page.output])
        ticket >> page >> undo
        face.ReplayQuarantineOperator(task_id="replay", batch=batch.output, corrections="fixed.json")
        smaller = face.QuantizeModelOperator(task_id="quantize", model=pin.output, batch=batch.output)
        face.PromoteModelOperator(
            task_id="promote",
            champion=pin.output,
            challenger=smaller.output,
            batch=batch.output,
            gate={"agreement": 0.9},
        )
        face.FindBatchesOperator(task_id="find", pipeline="tumour_triage")
    return made


def unmapped(dag: Any) -> list[Any]:
    return [task for task in dag.tasks if not task.is_mapped]


def test_every_operator_is_in_the_dag(dag: Any) -> None:
    assert {getattr(t, "operator_class", type(t)) for t in dag.tasks} == set(OPERATORS)


def test_serialise_round_trip_keeps_every_template_field(dag: Any) -> None:
    again = DagSerialization.from_dict(DagSerialization.to_dict(dag))
    assert again.get_task("shard").is_mapped
    for task in unmapped(dag):
        twin = again.get_task(task.task_id)
        assert twin.trigger_rule == task.trigger_rule
        assert twin.is_teardown == task.is_teardown
        assert set(twin.downstream_task_ids) == set(task.downstream_task_ids)
        for name in task.template_fields:
            assert hasattr(twin, name), f"{task.task_id}.{name} is lost"


def test_init_only_assigns_what_the_author_gave(dag: Any) -> None:
    for task in unmapped(dag):
        for name, parameter in inspect.signature(type(task).__init__).parameters.items():
            if name not in ("self", "kwargs") and parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                assert hasattr(task, name), f"{type(task).__name__} does not keep {name}"


@pytest.mark.parametrize("operator", OPERATORS)
def test_operators_are_thin(operator: Any) -> None:
    own = [p for p in inspect.signature(operator.__init__).parameters.values() if p.kind is p.KEYWORD_ONLY]
    assert len(own) <= 8
    body = inspect.getsource(operator.execute).partition('"""')[2].partition('"""')[2]
    assert len([line for line in body.splitlines() if line.strip()]) <= 25


@pytest.mark.parametrize("operator", OPERATORS)
def test_public_docstring_names_every_parameter(operator: Any) -> None:
    text = operator.__doc__
    assert len(text.splitlines()) <= 25
    for p in inspect.signature(operator.__init__).parameters.values():
        if p.kind is p.KEYWORD_ONLY:
            assert f":param {p.name}:" in text


@pytest.mark.parametrize(
    ("error", "action"),
    [
        (errors.ModelPinError("x"), RetryAction.FAIL),
        (errors.SpecError("x"), RetryAction.FAIL),
        (errors.MissingExtraError("x"), RetryAction.FAIL),
        (errors.SourceUnavailableError("x"), RetryAction.RETRY),
        (errors.UnknownOutcomeError("x"), RetryAction.RETRY),
        (ValueError("x"), RetryAction.DEFAULT),
    ],
)
def test_the_error_says_whether_to_retry(error: Exception, action: RetryAction) -> None:
    assert RETRY_POLICY.evaluate(error, 1, 3).action is action


def test_every_operator_carries_the_policy_and_the_author_can_replace_it(dag: Any) -> None:
    assert all(t.retry_policy is RETRY_POLICY for t in unmapped(dag))
    own = ExceptionRetryPolicy(rules=[])
    assert face.PinModelOperator(task_id="p", model="m/1", retry_policy=own).retry_policy is own


def test_a_mapped_task_carries_it_too(dag: Any) -> None:
    """Airflow makes the operator of one mapped task with every argument that the author left out as None."""
    task = dag.get_task("shard").unmap({"shard": "2/3"})
    assert (task.shard, task.retry_policy) == ("2/3", RETRY_POLICY)


def test_a_task_is_followed_when_one_of_its_routes_has_rows(dag: Any) -> None:
    decide = dag.get_task("decide")

    def followed(**row_counts: int) -> set[str]:
        return set(decide._tasks_with_rows({"act": 0, "review": 0, "fallback": 0, "hold": 0} | row_counts))

    assert followed(act=3) == {"ticket", "page"}
    assert followed(review=1) == {"review"}
    assert followed(act=1, review=1) == {"ticket", "page", "review"}
    assert followed(hold=5) == set()


def test_the_undo_of_a_failed_run_names_what_failed_and_what_only_did_not_run(
    dag: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = {"conn_type": "ai_ledger", "extra": {"url": f"sqlite:///{tmp_path}/ledger.db"}}
    monkeypatch.setenv("AIRFLOW_CONN_AI_LEDGER_DEFAULT", json.dumps(ledger))
    monkeypatch.setenv("AIRFLOW_CONN_AI_API_DEFAULT", json.dumps({"conn_type": "ai_api", "host": "http://127.0.0.1:9"}))
    states = {"pin": "success", "ingest": "failed", "infer": "upstream_failed", "ticket": "upstream_failed"}
    ti = SimpleNamespace(
        dag_id="p",
        task_id="undo",
        map_index=-1,
        get_task_states=lambda **_: {"r": states},
        xcom_push=lambda **_: None,
    )
    with pytest.raises(errors.SagaFailedError, match=r"^ingest failed \(infer, ticket did not run\), so") as told:
        dag.get_task("undo").execute(
            {"ti": ti, "dag_run": SimpleNamespace(run_id="r", run_type="manual"), "params": {}}
        )
    assert told.value.failed == ["ingest", "infer", "ticket"]


def test_a_run_without_a_data_interval_is_never_quietly_taken_for_what_comes_next() -> None:
    kafka, window = (
        face.KafkaSource("t", by="window"),
        (datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 1, 2, tzinfo=UTC)),
    )
    for source, run_type in ((kafka, "manual"), (face.KafkaSource("t"), "backfill")):
        with pytest.raises(errors.SpecError, match="takes t by its data interval, and has none"):
            window_of(source, Run("p", "r", "r/ingest/-1", run_type))
        assert window_of(source, Run("p", "r", "r/ingest/-1", run_type, window)) == window
    assert window_of(face.KafkaSource("t"), Run("p", "r", "r/ingest/-1", "scheduled", window)) is None
    assert window_of(face.FileSource("x/*.csv"), Run("p", "r", "r/ingest/-1", "backfill")) is None


def test_a_sources_texts_are_rendered_and_its_schema_file_read(tmp_path: Path) -> None:
    (tmp_path / "schemas").mkdir()
    (tmp_path / "schemas" / "x.avsc").write_text('"string"')
    with DAG("d", template_searchpath=[str(tmp_path)]) as dag:
        source = face.KafkaSource("{{ topic }}", format="avro", reader_schema="x.avsc")
        task = face.ValidatedIngestOperator(task_id="ingest", source=source)
    assert task.render_template(source, {"topic": "biopsies"}).topic == "biopsies"
    assert source.topic == "{{ topic }}"
    assert source_value(source, dag).reader_schema == '"string"'  # type: ignore[union-attr]
    with pytest.raises(errors.SpecError, match="'y.avsc' not found"):
        source_value(face.KafkaSource("t", format="avro", reader_schema="y.avsc"), dag)


def test_a_later_try_has_a_name_that_sorts_behind() -> None:
    def attempt(name: Any) -> str:
        ti = SimpleNamespace(dag_id="p", task_id="t", map_index=-1, **({} if name is None else {"id": name}))
        return run_of({"ti": ti, "dag_run": SimpleNamespace(run_id="r", run_type="manual")}).attempt

    names = [attempt(uuid7()) for _ in range(100)]
    assert names == sorted(set(names))
    assert (attempt(uuid4()), attempt(None)) == ("", ""), "names without an order tell nothing"
