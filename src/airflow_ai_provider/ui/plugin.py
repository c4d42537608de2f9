"""The provider's Airflow plugin, found by its entry point.

Invariant: loading the plugin loads no web framework; every component loads plugins, only the API server asks for apps.
"""

from __future__ import annotations

from typing import Any

from airflow.plugins_manager import AirflowPlugin


class _Apps:
    """The plugin's apps, made when they are asked for."""

    def __get__(self, plugin: Any, owner: type) -> list[dict[str, Any]]:
        from airflow_ai_provider.ui.data_docs import app

        return [{"app": app, "url_prefix": "/ai-provider", "name": "AI provider"}]


class AiProviderPlugin(AirflowPlugin):
    """Register what the provider adds to Airflow's UI: the Data Docs of batches, under ``/ai-provider``."""

    name = "ai_provider"
    fastapi_apps: Any = _Apps()
