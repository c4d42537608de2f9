"""A short version of ``make kill``: the long one has hundreds of kills, PostgreSQL too, and kills of the broker."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.kill.story import tell

if TYPE_CHECKING:
    from tests.servers.kafka import KafkaBroker

pytestmark = [pytest.mark.integration, pytest.mark.slow]


def test_ingest_killed_at_any_moment_loses_and_doubles_nothing(kafka_broker: KafkaBroker, tmp_path: Path) -> None:
    outcome = tell(kafka_broker, tmp_path, f"sqlite:///{tmp_path}/ledger.db", seed=7, kills=8)
    assert outcome.tally.kill_count >= 8
    assert outcome.proof.accepted > 100  # how many come meanwhile is the machine's affair
    assert outcome.proof.quarantined > 10
    assert outcome.proof.aborted > 0


def test_shards_killed_side_by_side_lose_and_double_nothing(kafka_broker: KafkaBroker, tmp_path: Path) -> None:
    outcome = tell(kafka_broker, tmp_path, f"sqlite:///{tmp_path}/ledger.db", seed=8, kills=8, shards=3)
    assert outcome.tally.kill_count >= 8
    assert outcome.proof.cut > 0
    assert outcome.proof.accepted > 100
    assert outcome.proof.doubled > 0
