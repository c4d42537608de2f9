"""What Airflow's provider discovery gets: valid by Airflow's own schema, every named class there, the fields shown."""

from __future__ import annotations

import importlib
import json
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import airflow
import jsonschema
import pytest
from airflow.providers_manager import ProvidersManager
from airflow.sdk import BaseHook

from airflow_ai_provider.provider_info import get_provider_info


def _dotted(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value] if value.startswith("airflow_ai_provider.") else []
    if isinstance(value, dict):
        value = list(value.values())
    return [name for item in value for name in _dotted(item)] if isinstance(value, list) else []


def test_valid_by_the_schema_that_airflow_ships() -> None:
    schema = json.loads((Path(airflow.__file__).parent / "provider_info.schema.json").read_text())
    jsonschema.validate(get_provider_info(), schema)


def test_every_class_it_names_imports() -> None:
    names = _dotted(get_provider_info())
    assert len(names) > 4
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute) or importlib.import_module(name), name


def test_both_entry_points_are_installed_and_load() -> None:
    ours = [e.load()() for e in entry_points(group="apache_airflow_provider") if "airflow_ai_provider" in e.value]
    assert [info["package-name"] for info in ours] == ["airflow-ai-provider"]
    plugin = entry_points(group="airflow.plugins")["ai_provider"].load()
    assert plugin.name == "ai_provider"


@pytest.mark.parametrize("conn", get_provider_info()["connection-types"], ids=lambda c: c["connection-type"])
def test_connection_types_as_airflow_reads_them(conn: dict[str, Any]) -> None:
    manager = ProvidersManager()
    assert conn["connection-type"] in manager.hooks
    for name in conn["conn-fields"]:
        widget = manager.connection_form_widgets[f"extra__{conn['connection-type']}__{name}"]
        assert widget.is_sensitive == (conn["conn-fields"][name]["schema"].get("format") == "password")
    assert conn["connection-type"] in manager.field_behaviours
    module, _, name = conn["hook-class-name"].rpartition(".")
    hook = getattr(importlib.import_module(module), name)
    assert issubclass(hook, BaseHook)
    assert hook.conn_type == conn["connection-type"]
    assert callable(hook.test_connection)
