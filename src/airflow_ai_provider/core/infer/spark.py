"""The door to Spark: shards of a batch as Spark tasks.

Invariants: Spark carries what to do and reports, never rows; a process that dies is replaced as Spark is configured to
(``spark.task.maxFailures``), then the error says which parts; a session that was there before is left running.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import pyarrow as pa

from airflow_ai_provider.core.batch import ACCEPTED
from airflow_ai_provider.core.infer.cluster import Job, Report, demand_answer, parts_of
from airflow_ai_provider.errors import EngineUnavailableError, MissingExtraError

try:
    from pyspark.sql import SparkSession
except ImportError as error:
    raise MissingExtraError(
        f"engine 'spark' needs PySpark, which is not installed ({error}). "
        "Run: pip install 'airflow-ai-provider[spark]' (and install Java 17 or later)",
        extra="spark",
    ) from error


def predict_on_spark(job: Job, shards: Sequence[str]) -> Iterator[Report]:
    """Yield each shard's answer, all of them at the end.

    :raises EngineUnavailableError: no cluster answers, or a shard's process died again and again; a retry may help.
    """
    with _session(job.runner.cluster) as spark:
        tasks = min(len(shards), job.runner.workers or len(shards))
        numbers = spark.range(0, len(shards), 1, tasks)
        try:
            answers = numbers.mapInArrow(partial(_predict, job, list(shards)), "answer string").collect()
        except Exception as error:  # Py4J's, for classic Spark, and PySpark's own have no root in common
            raise _died(error, job, shards, tasks) from error
    for answer in answers:
        yield json.loads(answer["answer"])


def _predict(job: Job, shards: Sequence[str], batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Predict, in a process of the cluster, the shards with the numbers that it got."""
    for batch in batches:
        for number in batch.column(0).to_pylist():
            yield pa.RecordBatch.from_pydict({"answer": [json.dumps(job.predict(shards[number]))]})


def _died(error: Exception, job: Job, shards: Sequence[str], tasks: int) -> EngineUnavailableError:
    """Say which parts a job ended on: Spark names the task that failed."""
    found = re.search(r"Task (\d+) in stage", str(error))
    part_count = len(job.store.manifest(job.batch).table(ACCEPTED))
    failed = int(found[1]) if found else -1
    first, end = failed * len(shards) // tasks, (failed + 1) * len(shards) // tasks
    parts = "; ".join(parts_of(shard, part_count) for shard in shards[first:end]) if found else "the batch"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = next((line for line in lines if "exited" in line or "crashed" in line or "Error" in line), lines[0])
    return EngineUnavailableError(
        f"Spark gave up on {parts}: {told[:300]}. Nothing was landed; the parts that are done are kept. Look at the "
        "cluster's memory and at these rows; the retry predicts what is missing.",
        shards=list(shards[first:end]) if found else [],
    )


@contextmanager
def _session(master: str | None) -> Iterator[SparkSession]:
    """Use the session that this process has, else join the cluster named, else start one on this machine."""
    running = SparkSession.getActiveSession()
    if running is not None:
        yield running
        return
    demand_answer(master)
    builder = SparkSession.builder.appName("airflow-ai-provider")
    if master and master.startswith("sc://"):
        builder = builder.remote(master)
    elif master:
        builder = builder.master(master)
    else:
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
        builder = (
            builder.master("local[*]").config("spark.driver.host", "127.0.0.1").config("spark.ui.enabled", "false")
        )
    try:
        spark = builder.getOrCreate()
    except Exception as error:  # Py4J's, for classic Spark, and PySpark's own have no root in common
        raise EngineUnavailableError(
            f"Spark at {master or 'this machine'} does not answer: {str(error).strip()[:300]}. Check the address under "
            "'cluster', and that Java 17 or later is there; the retry asks again.",
            cluster=master,
        ) from error
    try:
        yield spark
    finally:
        spark.stop()
