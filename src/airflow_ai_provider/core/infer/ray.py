"""The door to Ray: shards of a batch as Ray tasks.

Invariants: Ray carries what to do and reports, never rows; a process that dies is replaced twice, then the error names
the parts that it died on; a cluster that was running before is left running.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from airflow_ai_provider.core.batch import ACCEPTED
from airflow_ai_provider.core.infer.cluster import Job, Report, demand_answer, parts_of
from airflow_ai_provider.errors import EngineUnavailableError, MissingExtraError

try:
    import ray
    from ray.exceptions import RayError, RayTaskError
except ImportError as error:
    raise MissingExtraError(
        f"engine 'ray' needs Ray, which is not installed ({error}). Run: pip install 'airflow-ai-provider[ray]'",
        extra="ray",
    ) from error

_REPLACED = 2  # times a task's dead process is replaced


def predict_on_ray(job: Job, shards: Sequence[str]) -> Iterator[Report]:
    """Yield each shard's answer as it comes.

    :raises EngineUnavailableError: no cluster answers, or a shard's process died again and again; a retry may help.
    """
    with _session(job.runner.cluster):
        task = ray.remote(Job.predict).options(max_retries=_REPLACED, **_needs(job.device))
        sent = ray.put(job)
        waiting = list(reversed(shards))
        running: dict[Any, str] = {}
        try:
            while waiting or running:
                while waiting and len(running) < (job.runner.workers or len(shards)):
                    shard = waiting.pop()
                    running[task.remote(sent, shard)] = shard
                (ready, *_), _ = ray.wait(list(running), num_returns=1)
                yield _answer(job, ready, running.pop(ready))
        finally:
            for left in running:
                ray.cancel(left, force=False)


def _answer(job: Job, ready: Any, shard: str) -> Report:
    parts = parts_of(shard, len(job.store.manifest(job.batch).table(ACCEPTED)))
    try:
        answer: Report = ray.get(ready)
        return answer
    except RayTaskError as error:  # a fault that has no name among ours: it is shown as it is
        cause = error.cause if isinstance(error.cause, Exception) else error
        cause.add_note(f"met while predicting {parts} (shard {shard}) on Ray")
        raise cause from error
    except RayError as error:
        raise EngineUnavailableError(
            f"the process that predicted {parts} (shard {shard}) died {_REPLACED + 1} times: {_first_line(error)}. "
            "Nothing was landed; the parts that are done are kept. Look at the cluster's memory and at these rows; the "
            "retry predicts what is missing.",
            shard=shard,
        ) from error


@contextmanager
def _session(address: str | None) -> Iterator[None]:
    """Use the cluster that this process is in, else join the one named, else start one on this machine."""
    if ray.is_initialized():
        yield
        return
    demand_answer(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # its store of objects is small: rows do not go through it
    own: dict[str, Any] = {
        "include_dashboard": False,
        "_node_ip_address": "127.0.0.1",
        "object_store_memory": 100 << 20,
    }
    try:
        ray.init(address=address or "local", log_to_driver=False, **({} if address else own))
    except (OSError, RuntimeError, ValueError, RayError) as error:
        raise EngineUnavailableError(
            f"Ray at {address or 'this machine'} does not answer: {_first_line(error)}. Check the address under "
            "'cluster' and that the cluster runs this Ray version; the retry asks again.",
            cluster=address,
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _needs(device: str) -> dict[str, Any]:
    """Say what one task takes: a whole machine's cores, or its share of them and one GPU. An engine uses all cores that
    it may, so two on one machine would only be in each other's way."""
    state: Any = ray
    nodes = [node["Resources"] for node in state.nodes() if node["Alive"]]
    cores = min((int(node["CPU"]) for node in nodes if node.get("CPU")), default=1)
    gpus = [int(node["GPU"]) for node in nodes if node.get("GPU")]
    if device in ("cuda", "require_cuda") or (device == "auto" and gpus):
        return {"num_gpus": 1, "num_cpus": max(1, cores // max(gpus, default=1))}
    return {"num_gpus": 0, "num_cpus": max(1, cores)}


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
