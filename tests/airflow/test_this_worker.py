"""What Airflow's configuration says of a worker: its defaults, and by environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from airflow_ai_provider.core.infer.worker import Worker
from airflow_ai_provider.operators.infer import this_worker


def test_what_a_worker_keeps_where_by_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AIRFLOW_HOME", str(tmp_path))
    found = this_worker()
    assert (found.cache_dir, found.cache_gb, found.patience_s) == (f"{tmp_path}/ai_provider/models", 20.0, 3600.0)
    assert found.lease_dir.endswith("/airflow_ai_provider_gpus")


def test_what_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for option, value in {
        "MODEL_CACHE_FOLDER": "/data/models",
        "MODEL_CACHE_GB": "0",
        "GPU_LOCK_FOLDER": "/run/gpus",
        "GPU_PATIENCE_S": "60",
    }.items():
        monkeypatch.setenv(f"AIRFLOW__AI_PROVIDER__{option}", value)
    assert this_worker() == Worker("/data/models", 0.0, "/run/gpus", 60.0)
