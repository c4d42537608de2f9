"""The provider's Airflow plugin, found by its entry point."""

from __future__ import annotations

from airflow.plugins_manager import AirflowPlugin


class AiProviderPlugin(AirflowPlugin):
    """Register the provider's plugin by name; its page comes with a later release."""

    name = "ai_provider"
