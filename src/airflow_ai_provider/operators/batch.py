"""Landed batches as operators: find them again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from airflow.sdk import BaseOperator

from airflow_ai_provider.errors import SpecError
from airflow_ai_provider.retry import RETRY_POLICY


class FindBatchesOperator(BaseOperator):
    """Find the batches that a pipeline landed last, to predict them again with another model.

    Reads the ledger, and no rows. Hand the result to mapped tasks:
    ``BatchInferenceOperator.partial(…).expand(batch=…)``.

    :param pipeline: DAG id of the pipeline that landed them. Templated.
    :param newest: how many at most, counted back from the last; 0 or None: all. Templated.
    :param ledger_conn_id: connection of the ledger.
    :return: references of the batches, oldest first (XCom); an empty list when the pipeline has landed none.
    :raises SpecError: ``newest`` is no number; a retry does not help.
    """

    template_fields: Sequence[str] = ("pipeline", "newest")
    ui_color = "#d7ecff"

    def __init__(
        self,
        *,
        pipeline: str,
        newest: int | str | None = 10,
        ledger_conn_id: str = "ai_ledger_default",
        **kwargs: Any,
    ) -> None:
        super().__init__(**{"retry_policy": RETRY_POLICY, **kwargs})
        self.pipeline = pipeline
        self.newest = newest
        self.ledger_conn_id = ledger_conn_id

    def execute(self, context: Any) -> list[dict[str, Any]]:
        """Ask the ledger."""
        from airflow_ai_provider.hooks.ledger import LedgerHook

        count = _count(self.newest)
        claims = LedgerHook(self.ledger_conn_id).get_ledger().claims(self.pipeline, state="landed")
        found = [claim.ref.to_dict() for claim in claims if claim.ref is not None]
        self.log.info(
            "%s has landed %d batches; the newest %d are taken", self.pipeline, len(found), count or len(found)
        )
        return found[-count:] if count else found


def _count(newest: int | str | None) -> int:
    try:
        count = int(newest or 0)
    except ValueError:
        count = -1
    if count < 0:
        raise SpecError(
            f"newest={newest!r} is no number of batches. Give 1 or more, or 0 for all.",
            faults=[("newest", "no number")],
        )
    return count
