"""What the ingest operators do when a batch has landed: dead letters, what waits in quarantine, Data Docs.

Invariant: the batch is whole without any of it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from airflow.sdk import BaseOperatorLink
from airflow.sdk.configuration import conf
from airflow.sdk.execution_time.xcom import XCom

from airflow_ai_provider.core.ingest.sink import KafkaSink
from airflow_ai_provider.errors import BatchRejectedError, SpecError
from airflow_ai_provider.run import find_file

if TYPE_CHECKING:
    from airflow_ai_provider.core.batch import BatchRef, Manifest
    from airflow_ai_provider.core.ledger import Claim, Ledger
    from airflow_ai_provider.core.store import Store
    from airflow_ai_provider.run import Run

log = logging.getLogger(__name__)


class DataDocsLink(BaseOperatorLink):
    """Open Great Expectations' Data Docs of the batch that a task landed; the API server reads them from the store."""

    name = "Data Docs"
    xcom_key = "data_docs"

    def get_link(self, operator: Any, *, ti_key: Any) -> str:
        """Return what the task has noted; empty when its batch has no page."""
        # what this returns replaces the XCom once the task is done, so it is read back and not left out
        return XCom.get_value(ti_key=ti_key, key=self.xcom_key) or ""


def after_landing(
    run: Run, ref: BatchRef, store: Store, ledger: Ledger, dead_letters: KafkaSink | Mapping[str, Any] | str | None
) -> None:
    """Send the batch's dead letters, then say what waits in quarantine: in the log, and to who collects metrics."""
    from airflow.sdk.observability import stats
    from airflow.sdk.timezone import utcnow

    from airflow_ai_provider.core.ingest.quarantine import find_quarantines, summarise

    quarantines = find_quarantines(ledger, run.pipeline)
    landed = next((q.claim for q in quarantines if q.ref.digest == ref.digest), None)
    if dead_letters and landed is not None:
        send_dead_letters(run, landed, store, ledger, KafkaSink.of(dead_letters))
    waiting = summarise(quarantines, store, utcnow())
    log.info("%s", waiting)
    age = waiting.oldest.total_seconds() if waiting.oldest else 0.0
    stats.gauge("ai_provider.quarantine.rows", waiting.rows, tags={"pipeline": run.pipeline})
    stats.gauge("ai_provider.quarantine.oldest_s", age, tags={"pipeline": run.pipeline})


def send_dead_letters(run: Run, landed: Claim, store: Store, ledger: Ledger, sink: KafkaSink) -> None:
    """Send the quarantined rows of a landed batch, unless the run is muted."""
    if run.is_muted:
        log.info("muted run: nothing is sent to topic %s", sink.topic)
        return
    if landed.span.source == f"kafka:{sink.topic}":
        raise SpecError(
            f"dead_letters={sink.topic!r} is the topic that is read: each rejected row would come back for ever. "
            "Name another topic; the batch is landed.",
            faults=[("dead_letters", "is the source")],
        )
    from airflow_ai_provider.core.ingest.dead_letter import send_letters
    from airflow_ai_provider.hooks.kafka import KafkaConfigHook

    send_letters(store, ledger, landed, sink.topic, KafkaConfigHook(sink.kafka_conn_id).get_config())


@contextmanager
def documented(task: Any, expectations: str | None, context: Any, store: Store) -> Iterator[None]:
    """Write the Data Docs of a batch that is refused, too: that is when they are looked for."""
    try:
        yield
    except BatchRejectedError as error:
        if "manifest" in vars(error):  # it is not, where no verdict came about
            write_docs(task, expectations, context, store, error.ref, refused=error.manifest)
        raise


def write_docs(
    task: Any, expectations: str | None, context: Any, store: Store, ref: BatchRef, *, refused: Manifest | None = None
) -> None:
    """Write the batch's Data Docs and note where the UI finds them; they are for people, so no task fails for them."""
    from airflow_ai_provider.core.ingest.suite import load_suite

    suite = load_suite(find_file(task.dag, expectations, "expectations")) if expectations else None
    if suite is None or not suite.data_docs:
        return
    from airflow_ai_provider.core.ingest.data_docs import write_data_docs

    try:
        log.info("Data Docs: %s", write_data_docs(store, ref, suite, refused))
    except Exception:
        log.warning("no Data Docs were written; nothing else depends on them", exc_info=True)
        return
    prefix = urlsplit(conf.get("api", "base_url", fallback="") or "").path.rstrip("/")
    place = f"{prefix}/ai-provider/data-docs/{ref.uri[len(store.root) + 1 :]}?store={task.store_conn_id}"
    context["ti"].xcom_push(key=DataDocsLink.xcom_key, value=place)
