"""A batch predicted by a cluster (Ray, Spark): its processes predict parts, this one lands them.

1. cut the batch into shards: one per part, where nothing else is said
2. on the cluster, each shard: prove the model's files on that machine, open it, read → predict → write aside → mark
3. here: prove every part, write the manifest (:mod:`airflow_ai_provider.core.infer.gather`)

Invariants: rows never pass through the cluster's own storage, only what to do and a report; each machine proves the pin
for itself; predictions are those of one process, byte for byte; a process that dies costs the parts in flight, and
nothing is landed before all parts are there. A part is predicted twice at the worst, and stored with the same bytes.
"""

from __future__ import annotations

import logging
import platform
import re
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from airflow_ai_provider import errors
from airflow_ai_provider.core.batch import ACCEPTED, BatchRef, Pin
from airflow_ai_provider.core.infer.batch_size import SizeMemory
from airflow_ai_provider.core.infer.engine import Engine
from airflow_ai_provider.core.infer.gather import ShardReport, gather, predict_shard
from airflow_ai_provider.core.infer.runner import Runner
from airflow_ai_provider.core.infer.shard import MOST, Shard, shards
from airflow_ai_provider.core.infer.worker import WarmEngines, Worker
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.errors import AiProviderError, EngineUnavailableError, TerminalError

log = logging.getLogger(__name__)
Report = dict[str, Any]
_SHARDS_PER_WORKER = 4  # few enough to load the model rarely, enough to even out slow machines
_PORTS = {"ray": 10001, "spark": 7077, "sc": 15002}
_warm = WarmEngines()  # of this process: clusters give one process many shards


@dataclass(frozen=True)
class Job:
    """What a process of a cluster needs to know to predict; it is sent there, and may hold secrets of the store.

    :param batch: the rows.
    :param pin: the model.
    :param store: where rows lie and predictions go; every machine must reach it.
    :param pipeline: whose predictions these are.
    :param device: as :func:`~airflow_ai_provider.core.infer.engine.open_engine` takes it.
    :param runner: how it is predicted.
    :param worker: what a machine keeps where.
    :param registry: tracking URI, for machines that have not the model's files yet.
    """

    batch: BatchRef
    pin: Pin
    store: Store
    pipeline: str
    device: str
    runner: Runner
    worker: Worker
    registry: str = ""

    def predict(self, shard: str) -> Report:
        """Predict one shard in this process.

        :return: the shard's report, or the error that a retry of the shard would meet again or that Airflow retries.
        """
        try:
            report = predict_shard(
                self.batch,
                self.pin,
                self.store,
                self._lent,
                Shard.parse(shard),
                pipeline=self.pipeline,
                batch_size=self.runner.batch_size,
                memory=SizeMemory(self.worker.cache_dir),
            )
        except AiProviderError as error:
            return {"shard": shard, "error": type(error).__name__, "said": str(error), "on": platform.node()}
        return {"shard": shard, "report": report.to_dict(), "on": platform.node()}

    def _lent(self) -> AbstractContextManager[Engine]:
        tuning = self.runner.tuning
        return _warm.lent(self.worker, self.pin, self.device, self.registry, tuning=tuning, owner=self.pipeline)


def infer_on_cluster(
    job: Job, *, max_failed: float | int | None = None, progress: Callable[[str], None] = log.info
) -> BatchRef:
    """Predict every accepted row of a batch on the cluster that the job's runner names.

    :param max_failed: share (float below 1) or count (int) of rows that may fail; None sets no limit.
    :param progress: takes a line for each shard that is done.
    :return: reference of the predictions, the same as that of one process.
    :raises EngineUnavailableError: the cluster does not answer, or its processes died; a retry may help, and goes on
        after the parts that are done. The other errors are those of a local run, with the shard's parts and machine.
    """
    part_count = len(job.store.manifest(job.batch).table(ACCEPTED))
    workers = job.runner.workers
    most = min(MOST, _SHARDS_PER_WORKER * workers) if workers else MOST
    names = shards(max(1, min(part_count, most)))
    reports = []
    for number, answer in enumerate(_door(job.runner.engine)(job, names), 1):
        reports.append(_read(answer, part_count))
        progress(f"shard {answer['shard']} done on {answer['on']}, {number} of {len(names)}")
    return gather(job.batch, job.pin, job.store, reports, pipeline=job.pipeline, max_failed=max_failed)


def demand_answer(address: str | None) -> None:
    """Notice in seconds what the clusters' clients notice in minutes: nobody listens at a cluster's address.

    :param address: ``ray://host:port``, ``host:port``, ``spark://host:port,host:port``, ``sc://host``; any other form
        (none, ``auto``, ``local[2]``, ``yarn``) is left to the client.
    :raises EngineUnavailableError: none of the places answers; a retry may help.
    """
    found = re.fullmatch(r"(?:(ray|spark|sc)://)?([^/;]+)(?:[/;].*)?", address or "")
    if found is None or not (found[1] or re.fullmatch(r".+:\d+", found[2])):
        return
    failures = []
    for place in found[2].split(","):
        host, _, port = place.partition(":")
        try:
            socket.create_connection((host, int(port or _PORTS.get(found[1], 0))), timeout=8).close()
            return
        except (OSError, ValueError) as error:
            failures.append(f"{place}: {error}")
    raise EngineUnavailableError(
        f"nobody answers at {address}: {'; '.join(failures)}. Check the address under 'cluster' and that the cluster "
        "runs; the retry asks again.",
        cluster=address,
    )


def parts_of(shard: str, part_count: int) -> str:
    """Name a shard's parts for a message."""
    parts = [str(number) for number in range(part_count) if Shard.parse(shard).takes(number)]
    return f"part{'s' if len(parts) > 1 else ''} {', '.join(parts[:10])}{' …' if len(parts) > 10 else ''}"


def _door(engine: str) -> Callable[[Job, Sequence[str]], Iterator[Report]]:
    if engine == "ray":
        from airflow_ai_provider.core.infer.ray import predict_on_ray

        return predict_on_ray
    from airflow_ai_provider.core.infer.spark import predict_on_spark

    return predict_on_spark


def _read(answer: Mapping[str, Any], part_count: int) -> ShardReport:
    """Return a shard's report, or raise the error that it met."""
    if "report" in answer:
        return ShardReport.from_dict(answer["report"])
    kind = getattr(errors, answer["error"], TerminalError)
    raise kind(
        f"{parts_of(answer['shard'], part_count)} (shard {answer['shard']}) on {answer['on']}: {answer['said']}",
        shard=answer["shard"],
    )
