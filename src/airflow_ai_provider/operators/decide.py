"""Decide as operators: route predictions by confidence, and ask a person about the ambiguous ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from airflow.providers.standard.operators.hitl import HITLOperator
from airflow.sdk import BaseOperator, BranchMixIn, Param, XComArg
from airflow.sdk.definitions.param import ParamsDict
from airflow.sdk.timezone import utcnow

from airflow_ai_provider.retry import retried
from airflow_ai_provider.run import run_of

if TYPE_CHECKING:
    from airflow_ai_provider.core.decide.policy import Policy
    from airflow_ai_provider.core.decide.review import Questions

APPLY, HOLD_ALL = "Apply these answers", "Hold all"


class ConfidenceBranchOperator(BaseOperator, BranchMixIn):
    """Send each prediction down exactly one route, and skip the tasks whose routes are empty.

    Rows at or above ``act`` are acted on, those at or above ``review`` go to a person, the rest falls back or is held,
    as the policy says; a row without confidence goes to a person. One XCom a route: ``task.output["act"]``,
    ``["review"]``, ``["fallback"]``, ``["hold"]``; a task that takes several routes runs when one of them has rows.

    :param predictions: reference of the predictions (the infer task's output). Templated.
    :param policy: a ``Policy``, or the same as a mapping. Templated.
    :param store_conn_id: connection of the store.
    :param ledger_conn_id: connection of the ledger.
    :return: route → reference of its rows (XCom).
    :raises SpecError: the fallback rule names a column that the rows have not; a retry does not help.
    """

    template_fields: Sequence[str] = ("predictions", "policy")
    ui_color = "#fff1cc"

    def __init__(
        self,
        *,
        predictions: Any,
        policy: Policy | Mapping[str, Any],
        store_conn_id: str = "ai_store_default",
        ledger_conn_id: str = "ai_ledger_default",
        **kwargs: Any,
    ) -> None:
        super().__init__(**retried(kwargs))
        self.predictions = predictions
        self.policy = policy
        self.store_conn_id = store_conn_id
        self.ledger_conn_id = ledger_conn_id

    def execute(self, context: Any) -> None:
        """Route the rows, record the decision, follow the routes that have rows."""
        from airflow_ai_provider.core.batch import BatchRef
        from airflow_ai_provider.core.decide.flow import decide
        from airflow_ai_provider.core.decide.policy import Policy
        from airflow_ai_provider.hooks.ledger import LedgerHook
        from airflow_ai_provider.hooks.store import StoreHook

        run, ti = run_of(context), context["ti"]
        store = StoreHook(self.store_conn_id).get_store()
        policy = self.policy if isinstance(self.policy, Policy) else Policy.from_dict(self.policy)
        routes, facts = decide(BatchRef.from_dict(self.predictions), policy, store, pipeline=run.pipeline)
        LedgerHook(self.ledger_conn_id).get_ledger().decided(run.pipeline, run.run_id, facts)
        self.log.info("Routed %s", ", ".join(f"{route} {ref.row_count}" for route, ref in routes.items()))
        references = {route: ref.to_dict() for route, ref in routes.items()}
        # Branching ends the task by raising: whatever shall be in XCom must be there before.
        for route, reference in references.items():
            ti.xcom_push(key=route, value=reference)
        ti.xcom_push(key="return_value", value=references)
        self.do_branch(context, self._tasks_with_rows({r: ref.row_count for r, ref in routes.items()}))

    def _tasks_with_rows(self, row_counts: Mapping[str, int]) -> list[str]:
        """Name the downstream tasks that take a route with rows, or take no single route at all."""
        followed = []
        for task in self.downstream_list:
            routes = {
                key
                for name in task.template_fields
                for operator, key in XComArg.iter_xcom_references(getattr(task, name, None))
                if operator.task_id == self.task_id
            }
            if not routes & set(row_counts) or any(row_counts.get(route, 0) for route in routes):
                followed.append(task.task_id)
        return followed


class ReviewOperator(HITLOperator):
    """Ask a person about all ambiguous rows of a run at once; the answers come back as rows.

    Waits in ``awaiting_input`` (no worker, no triggerer) on Airflow's *Required actions* page, with one field a row,
    filled in with the model's prediction. Asks nobody when there is nothing to ask, in a dry run, or in a backfill
    (there all rows are held, unless the run's ``act_in_backfill`` is set). Who answered what goes to the ledger.

    :param rows: reference of the rows (``routes.output["review"]``). Templated.
    :param choices: the answers allowed besides ``hold``; None takes the model's classes.
    :param columns: columns shown beside each row; None shows the key and what the policy says.
    :param max_rows: rows shown at the most, least confident first; the others are held with that reason.
    :param on_timeout: ``hold`` holds all rows when nobody answers within ``response_timeout``; ``fail`` fails the task.
    :param store_conn_id: connection of the store.
    :param ledger_conn_id: connection of the ledger.
    :return: reference of the answered rows (XCom), ready for an action; None when there were none.
    """

    template_fields: Sequence[str] = ("subject", "body", "rows")
    ui_color = "#ffe0b8"

    def __init__(
        self,
        *,
        rows: Any,
        choices: Sequence[str] | None = None,
        columns: Sequence[str] | None = None,
        max_rows: int = 100,
        on_timeout: str = "hold",
        store_conn_id: str = "ai_store_default",
        ledger_conn_id: str = "ai_ledger_default",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            **{
                "subject": "Review of {{ dag.dag_id }}, run {{ run_id }}",
                "options": [APPLY, HOLD_ALL],
                "defaults": [HOLD_ALL] if on_timeout == "hold" else None,
                "trigger_rule": "none_failed",
                **retried(kwargs),
            }
        )
        self.rows = rows
        self.choices = choices
        self.columns = columns
        self.max_rows = max_rows
        self.on_timeout = on_timeout
        self.store_conn_id = store_conn_id
        self.ledger_conn_id = ledger_conn_id

    def execute(self, context: Any) -> dict[str, Any] | None:
        """Ask, unless nobody needs to be asked."""
        questions = self._questions()
        if questions is None or not questions.rows:
            self.log.info("Nothing is ambiguous: nobody is asked")
            return None
        if run_of(context).is_muted:
            self.log.info("Backfill or dry run: nobody is asked, %d rows are held", len(questions.rows))
            return self._apply(context, questions, dict.fromkeys(questions.rows, "hold"), "nobody (muted run)")
        self.body, self.params = questions.body, _form(questions)
        return super().execute(context)  # type: ignore[no-any-return]  # raises: the task now waits

    def execute_complete(self, context: Any, event: dict[str, Any]) -> dict[str, Any] | None:
        """Turn the answers into rows; ask again when an answer is not one of the choices."""
        questions = self._questions()
        if questions is None:
            return None
        self.body, self.params = questions.body, _form(questions)
        if "error" in event:
            self.process_trigger_event_error(event)
        answers = dict(event.get("params_input") or {})
        if HOLD_ALL in event["chosen_options"]:
            answers = dict.fromkeys(questions.rows, "hold")
        if faults := questions.faults(answers):
            # Airflow stores whatever the answer holds; a value that is no choice must never be acted on.
            self.log.error("%s. Asking again.", "; ".join(faults))
            return super().execute(context)  # type: ignore[no-any-return]  # raises: the task waits again
        user = event.get("responded_by_user") or {}
        return self._apply(context, questions, answers, str(user.get("name") or user.get("id") or "nobody (timeout)"))

    def _questions(self) -> Questions | None:
        from airflow_ai_provider.core.batch import BatchRef
        from airflow_ai_provider.core.decide.review import read_questions
        from airflow_ai_provider.hooks.store import StoreHook

        if not self.rows:
            return None
        store, ref = StoreHook(self.store_conn_id).get_store(), BatchRef.from_dict(self.rows)
        return read_questions(store, ref, choices=self.choices, columns=self.columns, max_rows=self.max_rows)

    def _apply(
        self, context: Any, questions: Questions, answers: Mapping[str, Any], responder: str
    ) -> dict[str, Any] | None:
        from airflow_ai_provider.core.batch import BatchRef
        from airflow_ai_provider.core.decide.review import apply_answers
        from airflow_ai_provider.hooks.ledger import LedgerHook
        from airflow_ai_provider.hooks.store import StoreHook

        run, store = run_of(context), StoreHook(self.store_conn_id).get_store()
        ref, rows = apply_answers(store, BatchRef.from_dict(self.rows), questions, answers, pipeline=run.pipeline)
        answered_at = utcnow().isoformat()
        ledger = LedgerHook(self.ledger_conn_id).get_ledger()
        ledger.reviewed(run.pipeline, run.run_id, [{**row, "responder": responder, "at": answered_at} for row in rows])
        self.log.info("%s answered: %s", responder, dict(ref.counts))
        return ref.only("reviewed").to_dict()


def _form(questions: Questions) -> ParamsDict:
    return ParamsDict(
        {
            name: Param(
                field["default"],
                type="string",
                enum=field["enum"],
                title=field["title"],
                description=field["description"],
            )
            for name, field in questions.fields.items()
        }
    )
