"""Where a task runs: GPUs, pool and queue, for whichever executor there is.

Invariant: what is given is asked of every configured executor that knows it; nothing is dropped without a word.
"""

from __future__ import annotations

from typing import Any

from airflow_ai_provider.errors import SpecError


def placement(gpu: int = 0, *, pool: str | None = None, queue: str | None = None) -> dict[str, Any]:
    """Return the keyword arguments of a task that needs GPUs, a pool or a queue.

    Example: ``BatchInferenceOperator(…, device="require_cuda", **placement(gpu=1, pool="ai_gpu", queue="gpu"))``.

    :param gpu: GPUs of one task. Where a Kubernetes executor is configured, its pod requests so many
        ``nvidia.com/gpu``; of a pool it takes so many slots, so a pool with a slot per GPU is never overbooked.
    :param pool: Airflow pool, which must be defined (``default_pool`` always is); None takes the task's default.
    :param queue: queue of the Celery workers that have what the task needs; None takes the default queue.
    :return: ``executor_config``, ``pool``, ``pool_slots``, ``queue``: those that are needed.
    :raises SpecError: ``gpu`` is no number of GPUs; a retry does not help.
    :raises MissingExtraError: a Kubernetes executor without its client; a retry does not help.
    """
    if isinstance(gpu, bool) or not isinstance(gpu, int) or gpu < 0:
        raise SpecError(
            f"gpu={gpu!r} is not a number of GPUs: give 0 or more.", faults=[("gpu", "not a number of GPUs")]
        )
    arguments: dict[str, Any] = {name: value for name, value in (("pool", pool), ("queue", queue)) if value}
    if gpu > 1 and pool:
        arguments["pool_slots"] = gpu
    if gpu and _runs_in_pods():
        # here: the client takes a second to load, which only files with GPUs on Kubernetes shall pay
        from airflow_ai_provider.pod import gpu_pod

        arguments["executor_config"] = {"pod_override": gpu_pod(gpu)}
    return arguments


def _runs_in_pods() -> bool:
    from airflow.sdk.configuration import conf

    return "kubernetes" in str(conf.get("core", "executor", fallback="")).lower()
