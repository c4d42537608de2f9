"""Input batches for the tests of the verb, landed in a store as ingest lands them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from airflow_ai_provider.core.batch import ACCEPTED, ROW_ID, BatchRef, Pin, digest_of
from airflow_ai_provider.core.store import Store


def rows(count: int, seed: int = 0, start: int = 0) -> pa.Table:
    random = np.random.default_rng(seed + start)
    return pa.table(
        {
            ROW_ID: pa.array([f"orders/0/{start + i}" for i in range(count)], pa.string()),
            "x": random.normal(size=count),
            "y": random.normal(size=count),
            "note": pa.array(["not for the model"] * count, pa.string()),
        }
    )


def land(store: Store, parts: Sequence[pa.Table], batch_id: str = "orders-1") -> BatchRef:
    """Land accepted rows, one table per part."""
    writer = store.open_batch("p", "batch", batch_id)
    for part in parts:
        writer.write(ACCEPTED, part)
    count = sum(part.num_rows for part in parts)
    return writer.land({"read": count, "accepted": count, "quarantined": 0}, {})


def part_files(store: Store, ref: BatchRef) -> dict[str, bytes]:
    """Return every Parquet file of a batch, by name."""
    folder = Path(ref.uri)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.parquet"))}


FILES = {"model.onnx": "sha256:" + "1" * 64}
PIN = Pin("sum", "1", "", digest_of(FILES), FILES, "arithmetic", {"inputs": [], "outputs": []})
