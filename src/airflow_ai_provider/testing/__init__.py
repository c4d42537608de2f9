"""Fakes of the provider's Protocols, for tests of pipelines without servers; each is held honest by a contract suite.

Names load lazily (PEP 562): asking for one fake imports only that fake.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_FAKES = {
    "ArithmeticEngine": "engine",
    "MemoryLedger": "ledger",
    "MemoryRegistry": "model_registry",
    "MemorySource": "source",
    "RuleValidator": "source",
    "ScriptedSender": "sender",
}

__all__ = [  # noqa: PLE0604 - the names are those of _FAKES, each resolved by __getattr__
    *_FAKES
]

if TYPE_CHECKING:
    from airflow_ai_provider.testing.engine import ArithmeticEngine as ArithmeticEngine
    from airflow_ai_provider.testing.ledger import MemoryLedger as MemoryLedger
    from airflow_ai_provider.testing.model_registry import MemoryRegistry as MemoryRegistry
    from airflow_ai_provider.testing.sender import ScriptedSender as ScriptedSender
    from airflow_ai_provider.testing.source import MemorySource as MemorySource
    from airflow_ai_provider.testing.source import RuleValidator as RuleValidator


def __getattr__(name: str) -> Any:
    if name not in _FAKES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_FAKES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
