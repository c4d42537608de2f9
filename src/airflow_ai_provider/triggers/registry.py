"""Wake a DAG when an alias of a registered model points to another version.

Invariants: an event is a wake-up: the run pins for itself; what was seen last is kept in the asset's state, so neither
a restart of the triggerer nor a move meanwhile is told wrongly; a registry that is away is waited for and never ends
the watch; every look is noted in the alias's history.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from airflow.triggers.base import BaseEventTrigger, TriggerEvent
from asgiref.sync import sync_to_async

from airflow_ai_provider.core.infer.choose import parse_model

if TYPE_CHECKING:
    from airflow_ai_provider.core.infer.choose import Registry
    from airflow_ai_provider.core.ledger import Ledger

_LONGEST_PAUSE_S = 600.0


class ModelAliasTrigger(BaseEventTrigger):
    """Fire when an alias points to another version than at the last look, at most once per interval.

    For an ``AssetWatcher`` of one asset (shared by several, it cannot remember over a restart). The first look ever
    only remembers. An alias that is removed fires nothing; set again, it fires when it points elsewhere than before.

    :param model: ``name@alias``.
    :param mlflow_conn_id: connection of the MLflow registry.
    :param ledger_conn_id: connection of the ledger, which notes every look; None notes none.
    :param interval_s: seconds between two looks, and so the least between two events.
    """

    def __init__(
        self,
        model: str,
        mlflow_conn_id: str = "mlflow_default",
        ledger_conn_id: str | None = "ai_ledger_default",
        interval_s: float = 60.0,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped there
        self.model = model
        self.mlflow_conn_id = mlflow_conn_id
        self.ledger_conn_id = ledger_conn_id
        self.interval_s = interval_s

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Return class path and arguments."""
        names = ("model", "mlflow_conn_id", "ledger_conn_id", "interval_s")
        path = "airflow_ai_provider.triggers.registry.ModelAliasTrigger"
        return path, {name: getattr(self, name) for name in names}

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Look, compare, fire, for ever."""
        pause = self.interval_s
        opened: tuple[Registry, Ledger | None] | None = None
        last: str | None = None
        while True:
            try:
                opened = opened or await sync_to_async(self._open)()
                # a thread of its own: a registry that hangs must not hold up the other triggers
                found = await asyncio.to_thread(self._look, *opened)
                last = last or await self._recall()
                if found and last and found != last:
                    self.log.info("%s moved from version %s to %s", self.model, last, found)
                    told = {"model": self.model, "version": found, "before": last}
                    yield TriggerEvent(told)  # type: ignore[no-untyped-call]
                if found and found != last:
                    last = found
                    await self._remember(found)  # after the event: told twice rather than never
                pause = self.interval_s
            except Exception as error:  # a watch that has ended is noticed by nobody
                opened, pause = None, min(2 * pause, _LONGEST_PAUSE_S)
                self.log.warning("%s is not watched for %.0f s: %s", self.model, pause, error)
            await asyncio.sleep(pause)

    def _open(self) -> tuple[Registry, Ledger | None]:
        from airflow_ai_provider.core.infer.pin import MlflowRegistry
        from airflow_ai_provider.hooks.ledger import LedgerHook
        from airflow_ai_provider.hooks.mlflow import MlflowRegistryHook

        # no cache: aliases are asked, nothing is downloaded
        registry = MlflowRegistry(MlflowRegistryHook(self.mlflow_conn_id).tracking_uri(), "")
        return registry, LedgerHook(self.ledger_conn_id).get_ledger() if self.ledger_conn_id else None

    def _look(self, registry: Registry, ledger: Ledger | None) -> str:
        name, alias, _ = parse_model(self.model)
        aliases = registry.aliases(name)
        if ledger is not None:
            ledger.saw_aliases(registry.address, name, aliases)
        return aliases.get(alias, "")

    async def _recall(self) -> str | None:
        kept: Any = None
        if self.asset_state_store is not None:
            with contextlib.suppress(ValueError):  # several assets share this trigger: none of them is meant
                kept = await self.asset_state_store.aget(self._key)
        return str(kept) if kept else None

    async def _remember(self, version: str) -> None:
        if self.asset_state_store is not None:
            with contextlib.suppress(ValueError):
                await self.asset_state_store.aset(self._key, version)

    @property
    def _key(self) -> str:
        return f"alias {self.model}"
