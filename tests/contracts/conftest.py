"""Each ledger there is, for the tests of what all of them promise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from airflow_ai_provider.core.ledger import Ledger
from airflow_ai_provider.core.ledger_sql import open_ledger
from airflow_ai_provider.testing.ledger import MemoryLedger
from tests.contracts.ledgers import Clock


@pytest.fixture(params=["memory", "sqlite", "postgresql"])
def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Ledger]:
    if request.param == "memory":
        yield MemoryLedger(Clock())
        return
    fresh: Callable[[], str] = (
        request.getfixturevalue("fresh_postgres_url") if request.param == "postgresql" else lambda: ""
    )
    yield open_ledger(fresh() or f"sqlite:///{tmp_path}/deep/ledger.db", Clock())
