"""A model registry in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from airflow_ai_provider.core.batch import Pin, digest_of
from airflow_ai_provider.core.infer.choose import parse_model
from airflow_ai_provider.errors import ModelPinError, RegistryUnavailableError


class MemoryRegistry:
    """Hold registered models, their versions and where aliases point; bytes only of what is registered as ONNX.

    :param models: model → its aliases, to begin with.
    :param before_set: called before each :meth:`set_alias`, to raise or to be another process.
    :param now: the clock, for when a version is registered.
    """

    def __init__(
        self,
        models: Mapping[str, Mapping[str, str]] | None = None,
        before_set: Callable[[], None] = lambda: None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._aliases = {name: dict(aliases) for name, aliases in (models or {}).items()}
        self._versions: dict[str, list[tuple[datetime, str]]] = {name: [] for name in self._aliases}
        self._before_set, self._now = before_set, now
        self.registered: dict[str, list[dict[str, Any]]] = {}
        self.address = "memory://models"
        self.is_down = False

    def register(self, name: str, weights: str = "") -> str:
        """Register a model's next version, with bytes named by ``weights``, and return its number."""
        held = self._versions.setdefault(name, [])
        held.append((self._now(), weights or str(len(held) + 1)))
        return str(len(held))

    def register_onnx(
        self, source: Pin, folder: Path, path: Path, *, tags: Mapping[str, str], metadata: Mapping[str, Any]
    ) -> str:
        """Keep the file's bytes as a new version."""
        made = self.registered.setdefault(source.name, [])
        version = str(int(source.version) + len(made) + 1)
        made.append({"version": version, "tags": dict(tags), "metadata": dict(metadata), "bytes": path.read_bytes()})
        return version

    def find(self, name: str, tags: Mapping[str, str]) -> str | None:
        """Return the newest version registered as ONNX that carries all these tags."""
        found = [made["version"] for made in self.registered.get(name, []) if tags.items() <= made["tags"].items()]
        return found[-1] if found else None

    def set_alias(self, name: str, alias: str, version: str) -> None:
        """Let an alias point to a version."""
        self._before_set()
        self.point(name, alias, version)

    def point(self, name: str, alias: str, version: str | None) -> None:
        """Let an alias point to a version, as somebody else; None removes it."""
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
