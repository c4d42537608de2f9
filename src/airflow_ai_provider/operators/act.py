"""Act as operators: one effect per row through an API, and undo what a failed run has left half done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseOperator

from airflow_ai_provider.errors import SagaFailedError
from airflow_ai_provider.retry import retried
from airflow_ai_provider.run import find_file, run_of

if TYPE_CHECKING:
    from airflow_ai_provider.core.act.value import HttpAction, Undo


class ApiActionOperator(BaseOperator):
    """Do one effect per row through an HTTP API, at most once per idempotency key.

    The ledger is written before each call and after it; a retry, clear or later run with the same subject finds the
    recorded outcome and sends nothing. An answer that never came is resolved by sending again under the same key, never
    by guessing. Backfills and dry runs send nothing.

    :param rows: one or several references of rows (``routes.output["act"]``, the review's output); None among them is
        left out. Templated.
    :param endpoint: path at the connection's host, such as ``/tickets``. Templated.
    :param json: template file of the body (``ticket.json.j2``), looked for beside the DAG file and in
        ``include/templates``; None sends the row itself.
    :param method: HTTP method.
    :param undo: how one effect is undone: ``Undo("DELETE", "/tickets/{id}")`` or ``{"delete": "/tickets/{id}"}``,
        with the fields of the answer in braces. None: it cannot be undone.
    :param max_refused: share or count of rows that the receiver may refuse; more fail the task. Templated.
    :param api_conn_id: connection of the API.
    :param ledger_conn_id: connection of the ledger; the store's is ``ai_store_default``.
    :return: reference of the outcomes (XCom), also when the task fails.
    :raises ActionUnavailableError: the API is down; a retry sends what is still open.
    :raises SagaFailedError: more rows refused than allowed; a retry does not help.
    :raises UnknownOutcomeError: calls left and no answer came; a retry asks again under the same keys.
    """

    template_fields: Sequence[str] = ("rows", "endpoint", "max_refused")
    ui_color = "#d5f2d8"

    def __init__(
        self,
        *,
        rows: Any,
        endpoint: str,
        json: str | None = None,
        method: str = "POST",
        undo: Undo | Mapping[str, str] | None = None,
        max_refused: float | str | None = 0,
        api_conn_id: str = "ai_api_default",
        ledger_conn_id: str = "ai_ledger_default",
        **kwargs: Any,
    ) -> None:
        # Runs after a branch: a route without rows is skipped, the others still act.
        super().__init__(**{"trigger_rule": "none_failed_min_one_success", **retried(kwargs)})
        self.rows = rows
        self.endpoint = endpoint
        self.json = json
        self.method = method
        self.undo = undo
        self.max_refused = max_refused
        self.api_conn_id = api_conn_id
        self.ledger_conn_id = ledger_conn_id

    def execute(self, context: Any) -> dict[str, Any]:
        """Send what is still to be sent, record every outcome."""
        from airflow_ai_provider.core.act.effect import ActRun
        from airflow_ai_provider.core.act.flow import act
        from airflow_ai_provider.core.batch import BatchRef
        from airflow_ai_provider.hooks.api import ApiHook
        from airflow_ai_provider.hooks.ledger import LedgerHook
        from airflow_ai_provider.hooks.store import StoreHook

        run = run_of(context)
        rows = self.rows if isinstance(self.rows, list | tuple) else [self.rows]
        return act(
            [BatchRef.from_dict(reference) for reference in rows if reference],
            self._action(),
            StoreHook().get_store(),
            LedgerHook(self.ledger_conn_id).get_ledger(),
            ApiHook(self.api_conn_id).get_sender(),
            ActRun(run.pipeline, run.run_id, step=len(self._steps_before()), muted=run.is_muted),
            # Pushed before any error is raised: the undo task needs it most when this task fails.
            landed=lambda ref: context["ti"].xcom_push(key="return_value", value=ref.to_dict()),
        ).to_dict()

    def _action(self) -> HttpAction:
        from airflow_ai_provider.core.act.value import HttpAction, Undo
        from airflow_ai_provider.core.batch import share_or_count

        template = None
        if self.json:
            with open(find_file(self.dag, self.json, "templates"), encoding="utf-8") as file:
                template = file.read()
        undo = Undo.of(self.undo)
        limit = share_or_count(self.max_refused)
        return HttpAction(self.task_id, self.endpoint, self.method, template, undo, max_refused=limit)

    def _steps_before(self) -> list[str]:
        return [t.task_id for t in self.get_flat_relatives(upstream=True) if isinstance(t, ApiActionOperator)]


class CompensateOperator(BaseOperator):
    """Undo, in reverse, what the run's actions did for subjects whose steps did not all succeed.

    Runs at the end of every run, whatever happened before (a teardown), and does nothing when all steps are done. Each
    undo is keyed like an action, so running it again undoes nothing twice; an undo that fails is parked in the ledger
    for a person. As the run's last task it passes a failed step on: it then fails too, when all is undone.

    :param actions: the outcomes of the actions to watch over (their outputs). Templated.
    :param scope: ``row`` undoes subjects of which a step was refused, is unknown or is missing because its task failed;
        ``run`` undoes all subjects of the run as soon as one step failed.
    :param api_conn_id: connection of the API.
    :param ledger_conn_id: connection of the ledger.
    :return: counts of ``compensated``, ``kept``, ``parked`` (XCom), also when the task fails for another's failure.
    :raises CompensationError: some undo failed; a retry tries it again.
    :raises SagaFailedError: a step failed, and what it left half done is undone; a retry does not help.
    """

    template_fields: Sequence[str] = ("actions", "scope")
    ui_color = "#ffd9d6"

    def __init__(
        self,
        *,
        actions: Any,
        scope: str = "row",
        api_conn_id: str = "ai_api_default",
        ledger_conn_id: str = "ai_ledger_default",
        **kwargs: Any,
    ) -> None:
        super().__init__(**retried(kwargs))
        self.as_teardown(on_failure_fail_dagrun=True)
        self.actions = actions
        self.scope = scope
        self.api_conn_id = api_conn_id
        self.ledger_conn_id = ledger_conn_id

    def execute(self, context: Any) -> dict[str, int]:
        """Undo what is half done."""
        from airflow_ai_provider.core.act.saga import compensate
        from airflow_ai_provider.hooks.api import ApiHook
        from airflow_ai_provider.hooks.ledger import LedgerHook

        run, ti = run_of(context), context["ti"]
        upstream = self.get_flat_relatives(upstream=True)
        states = ti.get_task_states(dag_id=ti.dag_id, task_ids=[t.task_id for t in upstream], run_ids=[run.run_id])
        failed, behind = (_in_state(states.get(run.run_id, {}), state) for state in ("failed", "upstream_failed"))
        counts = compensate(
            LedgerHook(self.ledger_conn_id).get_ledger(),
            ApiHook(self.api_conn_id).get_sender(),
            pipeline=run.pipeline,
            run_id=run.run_id,
            steps=[t.task_id for t in upstream if isinstance(t, ApiActionOperator)],
            failed=[*failed, *behind],
            scope=self.scope,
        )
        if failed or behind:
            # The only leaf that Airflow judges the run by: without this, a failed step would end in a green run.
            ti.xcom_push(key="return_value", value=counts)
            raise SagaFailedError(_told(failed, behind, counts), failed=[*failed, *behind], counts=counts)
        return counts


def _in_state(states: Mapping[str, str], state: str) -> list[str]:
    return sorted({task.partition(".")[0] for task, found in states.items() if found == state})


def _told(failed: Sequence[str], behind: Sequence[str], counts: Mapping[str, int]) -> str:
    rest = f" ({', '.join(behind)} did not run)" if behind else ""
    return (
        f"{', '.join(failed)} failed{rest}, so the run fails. The undo is complete: {counts['compensated']} effects "
        f"undone, {counts['kept']} kept. Mend what failed (see its log); clearing does not redo what was undone."
    )
