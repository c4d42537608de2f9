"""An alias that moves wakes a DAG: the trigger against a real MLflow server and a real ledger."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from airflow.triggers.base import TriggerEvent
from mlflow import MlflowClient

from airflow_ai_provider.core.ledger_sql import open_ledger
from airflow_ai_provider.triggers.registry import ModelAliasTrigger
from tests.core.infer.dense import register_dense
from tests.servers.mlflow import MlflowServer

pytestmark = pytest.mark.integration


class AssetState:
    """What Airflow keeps of the watched asset, over restarts of the triggerer."""

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}

    async def aget(self, key: str) -> Any:
        return self.kept.get(key)

    async def aset(self, key: str, value: Any) -> None:
        self.kept[key] = value


class Alias:
    """One alias of a model of two versions, in the registry behind ``mlflow_default``."""

    def __init__(self, uri: str, ledger_url: str) -> None:
        self.name, self.uri, self.ledger_url = f"triage-{uuid4().hex[:8]}", uri, ledger_url
        self.client, self.state = MlflowClient(uri, uri), AssetState()
        for seed in (1, 2):
            register_dense(uri, self.name, ["x", "y"], seed=seed)
        self.point("1")

    def point(self, version: str | None) -> None:
        if version is None:
            self.client.delete_registered_model_alias(self.name, "champion")
        else:
            self.client.set_registered_model_alias(self.name, "champion", version)

    def watch(self, story: Callable[[AsyncIterator[TriggerEvent]], Any], **options: Any) -> None:
        """Run the watch as a triggerer would that starts now."""
        path, arguments = ModelAliasTrigger(f"{self.name}@champion", interval_s=0.05, **options).serialize()
        assert path == "airflow_ai_provider.triggers.registry.ModelAliasTrigger"

        async def main() -> None:
            trigger = ModelAliasTrigger(**arguments)
            trigger.asset_state_store = self.state  # type: ignore[assignment]
            events = trigger.run()
            try:
                await story(events)
            finally:
                await events.aclose()  # type: ignore[attr-defined]

        asyncio.run(main())

    def looks(self) -> list[Any]:
        """What the ledger holds of the watch's looks."""
        return open_ledger(self.ledger_url).alias_history(self.uri, self.name, "champion")

    async def seen(self) -> None:
        """Wait until the watch has remembered something."""
        await until(lambda: self.state.kept, "the watch never looked")


@pytest.fixture
def alias(mlflow_process: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Alias:
    url = f"sqlite:///{tmp_path}/ledger.db"
    connections = {
        "MLFLOW_DEFAULT": {"conn_type": "mlflow", "host": mlflow_process.uri},
        "AI_LEDGER_DEFAULT": {"conn_type": "ai_ledger", "extra": {"url": url}},
    }
    for name, connection in connections.items():
        monkeypatch.setenv(f"AIRFLOW_CONN_{name}", json.dumps(connection))
    return Alias(mlflow_process.uri, url)


async def told(waiting: asyncio.Future[TriggerEvent]) -> dict[str, Any]:
    return (await asyncio.wait_for(waiting, 90)).payload  # type: ignore[no-any-return]


async def until(is_so: Callable[[], Any], otherwise: str) -> None:
    deadline = asyncio.get_running_loop().time() + 90
    while not is_so():
        assert asyncio.get_running_loop().time() < deadline, otherwise
        await asyncio.sleep(0.05)


def test_a_move_is_one_event_and_is_remembered_over_a_restart(alias: Alias) -> None:
    model = f"{alias.name}@champion"

    async def first(events: AsyncIterator[TriggerEvent]) -> None:
        waiting = asyncio.ensure_future(anext(events))
        await alias.seen()
        await asyncio.sleep(0.3)
        assert not waiting.done(), "the first look tells nothing, and what stays tells nothing"
        alias.point("2")
        assert await told(waiting) == {"model": model, "version": "2", "before": "1"}
        waiting = asyncio.ensure_future(anext(events))
        await until(lambda: alias.looks()[-1].last_at > alias.looks()[-1].first_at, "it looks no more")
        assert not waiting.done() and alias.state.kept == {f"alias {model}": "2"}
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)

    async def after_a_move_meanwhile(events: AsyncIterator[TriggerEvent]) -> None:
        assert await told(asyncio.ensure_future(anext(events))) == {"model": model, "version": "1", "before": "2"}

    alias.watch(first)
    alias.point("1")
    alias.watch(after_a_move_meanwhile)
    seen = alias.looks()
    assert [s.version for s in seen] == ["1", "2", "1"], "each look is in the history that as_of reads"
    assert seen[1].first_at < seen[1].last_at


def test_an_alias_that_is_gone_wakes_nobody_until_it_points_elsewhere(alias: Alias) -> None:
    async def story(events: AsyncIterator[TriggerEvent]) -> None:
        waiting = asyncio.ensure_future(anext(events))
        await alias.seen()
        for version in (None, "1"):
            alias.point(version)
            await asyncio.sleep(0.4)
        assert not waiting.done()
        alias.point("2")
        assert (await told(waiting))["version"] == "2"

    alias.watch(story, ledger_conn_id=None)
    assert alias.looks() == []


def test_a_watch_of_several_assets_has_no_memory_but_works(alias: Alias) -> None:
    alias.state.kept = Refusing()

    async def story(events: AsyncIterator[TriggerEvent]) -> None:
        waiting = asyncio.ensure_future(anext(events))
        await until(alias.looks, "the watch never looked")
        await asyncio.sleep(0.3)
        alias.point("2")
        assert (await told(waiting))["version"] == "2"

    alias.watch(story)


class Refusing(dict[str, Any]):
    """Airflow's answer when it cannot say which asset's state is meant."""

    def get(self, *_: Any) -> Any:
        raise ValueError("Task has 2 concrete inlets and outlets")

    def __setitem__(self, *_: Any) -> None:
        raise ValueError("Task has 2 concrete inlets and outlets")


def test_a_watch_outlives_a_registry_that_is_away(alias: Alias, monkeypatch: pytest.MonkeyPatch) -> None:
    right = json.dumps({"conn_type": "mlflow", "host": alias.uri})
    monkeypatch.setenv("AIRFLOW_CONN_MLFLOW_DEFAULT", json.dumps({"conn_type": "mlflow", "host": "http://127.0.0.1:9"}))

    async def story(events: AsyncIterator[TriggerEvent]) -> None:
        waiting = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0.4)
        assert not waiting.done(), "it neither ends nor fires"
        monkeypatch.setenv("AIRFLOW_CONN_MLFLOW_DEFAULT", right)
        await alias.seen()
        alias.point("2")
        assert (await told(waiting))["version"] == "2"

    alias.watch(story)
