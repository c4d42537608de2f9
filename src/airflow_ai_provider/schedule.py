"""Schedules that a source or a registry starts, with a sweep by the clock behind them.

Invariant: an event only wakes a run, which takes its rows from its own position. Airflow merges events that come while
runs are being made, so one can go without a run of its own; the sweep takes what such a burst has left.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

from airflow.sdk import Asset, AssetOrTimeSchedule, AssetWatcher, CronDataIntervalTimetable

if TYPE_CHECKING:
    from airflow.triggers.base import BaseEventTrigger

    from airflow_ai_provider.core.ingest.source import KafkaSource


def on_topic(
    source: KafkaSource | str,
    *,
    sweep: str | None = "@hourly",
    every: timedelta = timedelta(seconds=10),
    kafka_conn_id: str = "kafka_default",
) -> Any:
    """Make a schedule that starts a run when a topic has grown, and by the clock besides.

    A triggerer must run. Runs that the topic starts have no data interval: use it with ``by="cursor"``, the default.

    :param source: the topic that the DAG ingests; a ``KafkaSource`` brings its own connection.
    :param sweep: cron line or preset of the runs by the clock; None: none, and a burst's tail may wait for the next
        record.
    :param every: least time between two events.
    :param kafka_conn_id: connection of type ``kafka``, for a topic given by name.
    :return: for ``DAG(schedule=…)``.
    """
    from airflow_ai_provider.triggers.topic import TopicGrowthTrigger

    topic = source if isinstance(source, str) else source.topic
    conn_id = kafka_conn_id if isinstance(source, str) else source.kafka_conn_id
    trigger = TopicGrowthTrigger(topic, conn_id, every.total_seconds())
    return _woken_by(f"{conn_id}/{topic}", f"ai-topic://{conn_id}/{topic}", trigger, sweep)


def on_model(
    model: str,
    *,
    sweep: str | None = None,
    every: timedelta = timedelta(minutes=1),
    mlflow_conn_id: str = "mlflow_default",
) -> Any:
    """Make a schedule that starts a run when a model's alias has moved to another version.

    A triggerer must run. The run pins for itself; the first look only remembers where the alias points.

    :param model: ``name@alias``.
    :param sweep: cron line or preset of runs by the clock besides; None: none.
    :param every: least time between two looks.
    :param mlflow_conn_id: connection of the MLflow registry.
    :return: for ``DAG(schedule=…)``.
    """
    from airflow_ai_provider.triggers.registry import ModelAliasTrigger

    trigger = ModelAliasTrigger(model, mlflow_conn_id, interval_s=every.total_seconds())
    name = f"{mlflow_conn_id}/{model}"
    return _woken_by(name, f"ai-model://{mlflow_conn_id}/{model.replace('@', '/')}", trigger, sweep)


def _woken_by(name: str, uri: str, trigger: BaseEventTrigger, sweep: str | None) -> Any:
    asset = Asset(name=name, uri=uri, group="ai", watchers=[AssetWatcher(name=name, trigger=trigger)])
    if sweep is None:
        return [asset]
    return AssetOrTimeSchedule(timetable=CronDataIntervalTimetable(sweep, timezone="UTC"), assets=[asset])
