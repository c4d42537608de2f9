"""What every model registry promises a pin, over memory and a real MLflow server."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from airflow_ai_provider.core.infer.choose import Asked, Registry, choose
from airflow_ai_provider.errors import ModelPinError
from airflow_ai_provider.testing import MemoryLedger, MemoryRegistry
from tests.core.infer.dense import register_dense

NOW = datetime.now(UTC)


@dataclass
class Case:
    """A registry with a model of two versions, its name, and how to move its alias."""

    registry: Registry
    name: str
    point: Callable[[str, str | None], Any]


def memory(_: pytest.FixtureRequest, __: Path) -> Case:
    models, name = MemoryRegistry(), "triage"
    for _version in (1, 2):
        models.register(name)
    return Case(models, name, lambda alias, version: models.point(name, alias, version))


def mlflow(request: pytest.FixtureRequest, folder: Path) -> Case:
    from mlflow import MlflowClient

    from airflow_ai_provider.core.infer.pin import MlflowRegistry

    uri, name = request.getfixturevalue("mlflow_process").uri, f"triage-{uuid4().hex[:8]}"
    for seed in (1, 2):
        register_dense(uri, name, ["x", "y"], seed=seed)
    client = MlflowClient(uri, uri)

    def point(alias: str, version: str | None) -> None:
        if version is None:
            client.delete_registered_model_alias(name, alias)
        else:
            client.set_registered_model_alias(name, alias, version)

    return Case(MlflowRegistry(uri, folder), name, point)


@pytest.fixture(params=[memory, mlflow], ids=lambda make: make.__name__)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    make: Callable[..., Case] = request.param
    return make(request, tmp_path)


def test_aliases_versions_and_their_times(case: Case) -> None:
    assert case.registry.aliases(case.name) == {}
    case.point("champion", "1")
    case.point("next", "2")
    assert case.registry.aliases(case.name) == {"champion": "1", "next": "2"}
    case.point("next", None)
    assert case.registry.aliases(case.name) == {"champion": "1"}
    times = [case.registry.created(case.name, version) for version in ("1", "2")]
    assert times == sorted(times) and all(abs(at - NOW) < timedelta(minutes=10) for at in times if at) and all(times)
    assert case.registry.created(case.name, "3") is None


def test_a_pin_names_version_alias_and_bytes(case: Case) -> None:
    case.point("champion", "2")
    by_alias = case.registry.resolve(f"{case.name}@champion")
    by_version = case.registry.resolve(f"{case.name}/2")
    assert (by_alias.name, by_alias.version, by_alias.alias) == (case.name, "2", "champion")
    assert (by_version.version, by_version.alias, by_version.digest) == ("2", "", by_alias.digest)
    assert case.registry.resolve(f"{case.name}/1").digest != by_alias.digest
    assert by_alias.registry == case.registry.address


def test_what_is_not_there_is_no_pin(case: Case) -> None:
    for ask in (
        lambda: case.registry.aliases("nobody's"),
        lambda: case.registry.resolve("nobody's@champion"),
        lambda: case.registry.resolve(f"{case.name}@nobody"),
        lambda: case.registry.resolve(f"{case.name}/3"),
    ):
        with pytest.raises(ModelPinError):
            ask()


def test_the_policies_find_their_version_in_it(case: Case) -> None:
    clock = [NOW]
    ledger = MemoryLedger(lambda: clock[0])

    def version(run_id: str, policy: str, hour: int) -> str:
        window = (NOW + timedelta(hours=hour), NOW + timedelta(hours=hour + 1))
        asked = Asked("p", run_id, f"{case.name}@champion", [policy], window, window[0])
        return choose(asked, ledger, case.registry)[0].version

    for hour, pointed in ((0, "1"), (1, "1"), (2, "2"), (3, "2")):
        clock[0] = NOW + timedelta(hours=hour)
        case.point("champion", pointed)
        assert version(f"r{hour}", "current", hour) == pointed
    case.point("champion", "1")
    clock[0] = NOW + timedelta(hours=9)
    assert [version(f"again{hour}", "as_run", hour) for hour in range(4)] == ["1", "1", "2", "2"]
    assert [version(f"then{hour}", "as_of", hour) for hour in range(4)] == ["1", "1", "2", "2"]
