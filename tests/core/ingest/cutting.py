"""Land a batch as several tasks do, each with nothing but what XCom carries."""

from __future__ import annotations

import json
from typing import Any
from unittest import mock

from airflow_ai_provider.core.batch import BatchRef
from airflow_ai_provider.core.ingest import shard
from airflow_ai_provider.core.ingest.contract import Validator
from airflow_ai_provider.core.ingest.flow import Ingest, IngestRun, plan_shards
from airflow_ai_provider.core.ingest.shard import ShardRef
from airflow_ai_provider.core.ledger import Ledger
from airflow_ai_provider.core.store import Store


def cut_ingest(
    source: Any, rules: Validator, store: Store, ledger: Ledger, run: IngestRun, *, shards: int = 4
) -> BatchRef:
    """Plan, ingest each shard, land them, out of order; every row and every byte is worth a shard."""
    with mock.patch.multiple(shard, SMALLEST_ROWS=1, SMALLEST_BYTES=1):
        refs = [ref.to_dict() for ref in plan_shards(source, ledger, run, shards)]
    work = Ingest(source, rules, store, ledger, run)
    parts = [work.shard(ShardRef.from_dict(json.loads(json.dumps(ref)))).to_dict() for ref in refs]
    return work.land([ShardRef.from_dict(part) for part in reversed(parts)])
