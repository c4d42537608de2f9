"""A real SIGKILL in the middle of a batch: the retry pays for the parts in flight only, and lands the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from airflow_ai_provider.core.store import Store
from airflow_ai_provider.testing import ArithmeticEngine
from tests.core.infer.batches import land, part_files, rows

PARTS, PART_ROWS = 12, 1000
SCRIPT = """
import json, sys, time
from airflow_ai_provider.core.batch import BatchRef
from airflow_ai_provider.core.infer.flow import infer
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.testing import ArithmeticEngine
from tests.core.infer.batches import PIN
# the last part is never done: however late the killer comes, it comes in the middle
slow = lambda rows: time.sleep(0.1 if int(rows["_row_id"][0].as_py().rpartition("/")[2]) < LAST else 3600)
engine = ArithmeticEngine(["x", "y"], before=slow)
infer(BatchRef.from_dict(json.loads(sys.argv[2])), PIN, Store(sys.argv[1]), engine, pipeline="p", batch_size=250)
""".replace("LAST", str((PARTS - 1) * PART_ROWS))


def predict(store: Store, batch: object, engine: ArithmeticEngine) -> object:
    from airflow_ai_provider.core.infer.flow import infer
    from tests.core.infer.batches import PIN

    return infer(batch, PIN, store, engine, pipeline="p", batch_size=250)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("kill_after", [1, PARTS // 2, PARTS - 1])
def test_a_kill_costs_at_most_the_parts_in_flight(tmp_path: Path, kill_after: int) -> None:
    import json

    parts = [rows(PART_ROWS, start=i * PART_ROWS) for i in range(PARTS)]
    whole, store = Store(str(tmp_path / "whole")), Store(str(tmp_path / "killed"))
    expected = predict(whole, land(whole, parts), ArithmeticEngine(["x", "y"]))
    batch = land(store, parts)
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, store.root, json.dumps(batch.to_dict())],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("killed/p/predictions/*/predictions/*.done"))) < kill_after:
            assert process.poll() is None and time.monotonic() < deadline, "it ended before it could be killed"
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = len(list(tmp_path.glob("killed/p/predictions/*/predictions/*.done")))
    assert not list(tmp_path.glob("killed/p/predictions/*/manifest.json"))
    engine = ArithmeticEngine(["x", "y"])
    ref = predict(store, batch, engine)
    assert len(engine.seen) == len(set(engine.seen)) == (PARTS - done) * PART_ROWS
    assert done >= kill_after
    assert part_files(store, ref) == part_files(whole, expected)  # type: ignore[arg-type]
