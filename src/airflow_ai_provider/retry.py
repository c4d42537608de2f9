"""The one retry policy that all operators carry: the error says whether another try can pass.

Invariant: a :class:`~airflow_ai_provider.errors.TerminalError` fails the task at once, whatever ``retries`` says;
a transient error or an unknown outcome uses the task's own retries and delay.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from airflow.sdk import ExceptionRetryPolicy, RetryAction, RetryRule

_ERRORS = "airflow_ai_provider.errors"

# Paths, not classes: the policy is part of the serialised DAG.
RETRY_POLICY = ExceptionRetryPolicy(
    rules=[
        RetryRule(
            exception=f"{_ERRORS}.TerminalError",
            action=RetryAction.FAIL,
            reason="the same input fails again",
        ),
        RetryRule(
            exception=[f"{_ERRORS}.{name}" for name in ("TransientError", "UnknownOutcomeError", "CompensationError")],
            action=RetryAction.RETRY,
            reason="another try may pass",
        ),
    ]
)


def retried(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return an operator's keyword arguments with the shared policy where no other is given.

    A mapped task's operator is made with ``retry_policy=None`` when its author wrote nothing, so None is nothing too.
    """
    return {**arguments, "retry_policy": arguments.get("retry_policy") or RETRY_POLICY}
