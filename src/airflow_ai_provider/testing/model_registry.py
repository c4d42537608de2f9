"""A model registry in memory."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

from airflow_ai_provider.core.batch import Pin, digest_of
from airflow_ai_provider.core.infer.choose import parse_model
from airflow_ai_provider.errors import ModelPinError, RegistryUnavailableError


class MemoryModels:
    """Hold registered models, their versions and where aliases point; models without bytes.

    :param now: the clock, for when a version is registered.
    """

    def __init__(self, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._now = now
        self._versions: dict[str, list[tuple[datetime, str]]] = {}
        self._aliases: dict[str, dict[str, str]] = {}
        self.address = "memory://models"
        self.is_down = False

    def register(self, name: str, weights: str = "") -> str:
        """Register a model's next version, with bytes named by ``weights``, and return its number."""
        held = self._versions.setdefault(name, [])
        held.append((self._now(), weights or str(len(held) + 1)))
        return str(len(held))

    def point(self, name: str, alias: str, version: str | None) -> None:
        """Let an alias point to a version; None removes it."""
        aliases = self._aliases.setdefault(name, {})
        if version is None:
            aliases.pop(alias, None)
        else:
            aliases[alias] = version

    def change(self, name: str, version: str, weights: str) -> None:
        """Change the bytes under a version, as nobody should."""
        held = self._versions[name]
        held[int(version) - 1] = (held[int(version) - 1][0], weights)

    def aliases(self, name: str) -> dict[str, str]:
        """Return alias → version of a model."""
        self._demand(name)
        return dict(self._aliases.get(name, {}))

    def created(self, name: str, version: str) -> datetime | None:
        """Return when a version was registered."""
        self._demand(name)
        held = self._versions[name]
        return held[int(version) - 1][0] if 0 < int(version) <= len(held) else None

    def resolve(self, model: str) -> Pin:
        """Pin a model, without bytes."""
        name, alias, version = parse_model(model)
        if alias:
            version = self.aliases(name).get(alias, "")
        if not version or self.created(name, version) is None:
            raise ModelPinError(f"the registry in memory has no {model}", name=name)
        weights = {"model.onnx": digest_of(self._versions[name][int(version) - 1][1])}
        return Pin(name, version, alias, digest_of(weights), weights, "onnx", {"inputs": []}, {}, self.address)

    def _demand(self, name: str) -> None:
        if self.is_down:
            raise RegistryUnavailableError("the registry in memory is down, as the test asked")
        if name not in self._versions:
            raise ModelPinError(f"the registry in memory has no model {name!r}", name=name)
