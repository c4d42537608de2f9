"""A registry's versions and aliases in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from airflow_ai_provider.core.batch import Pin


class MemoryRegistry:
    """Keep versions and aliases of models in this process.

    :param models: model → its aliases, to begin with.
    :param before_set: called before each change of an alias, to raise or to be another process.
    """

    def __init__(self, models: Mapping[str, Mapping[str, str]], before_set: Callable[[], None] | None = None) -> None:
        self._aliases = {name: dict(aliases) for name, aliases in models.items()}
        self._before_set = before_set
        self.registered: dict[str, list[dict[str, Any]]] = {}

    def aliases(self, name: str) -> dict[str, str]:
        """Return alias → version of a registered model."""
        return dict(self._aliases[name])

    def set_alias(self, name: str, alias: str, version: str) -> None:
        """Let an alias point to a version."""
        if self._before_set is not None:
            self._before_set()
        self._aliases[name][alias] = version

    def find(self, name: str, tags: Mapping[str, str]) -> str | None:
        """Return the newest version of a model that carries all these tags."""
        found = [made["version"] for made in self.registered.get(name, []) if tags.items() <= made["tags"].items()]
        return found[-1] if found else None

    def register_onnx(
        self, source: Pin, folder: Path, path: Path, *, tags: Mapping[str, str], metadata: Mapping[str, Any]
    ) -> str:
        """Keep the file's bytes as a new version."""
        made = self.registered.setdefault(source.name, [])
        version = str(int(source.version) + len(made) + 1)
        made.append({"version": version, "tags": dict(tags), "metadata": dict(metadata), "bytes": path.read_bytes()})
        return version
