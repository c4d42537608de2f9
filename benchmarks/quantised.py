"""One model in floats and in eight bits, over the same rows in memory: what the cases I4 share.

Each contender predicts through the engine on both cores, as the verb does, without reading and writing: only the model
differs. How often they agree is checked before anything is timed.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness import Case, Place, Run

if TYPE_CHECKING:
    import pyarrow as pa

    from airflow_ai_provider.core.batch import Pin

Model = Callable[[], "tuple[Pin, Path]"]
Rows = Callable[[int], "pa.Table"]
_REFERENCE_ROWS = 1_000


def make(place: Place, model: Model, rows: Rows, least: float) -> None:
    """Quantise the model both ways, compare on reference rows, keep models and rows.

    :param least: agreement below which the case fails.
    """
    import pyarrow.parquet as pq

    from airflow_ai_provider.core.batch import ACCEPTED
    from airflow_ai_provider.core.infer.compare import Gate
    from airflow_ai_provider.core.infer.trial import derive_quantized
    from airflow_ai_provider.core.store import Store

    pin, folder = model()
    shutil.copytree(folder, place.folder / "fp32")
    pins = {"fp32": pin.to_dict()}
    table = rows(place.size)
    pq.write_table(table, place.folder / "rows.parquet")
    store = Store(str(place.folder / "store"))
    reference = table.slice(0, _REFERENCE_ROWS)
    writer = store.open_batch("bench", "batch", "reference")
    writer.write(ACCEPTED, reference)
    count = reference.num_rows
    batch = writer.land({"read": count, "accepted": count, "quarantined": 0}, {})
    found = {}
    for method in ("dynamic", "static"):
        scratch = place.folder / method
        scratch.mkdir()
        made = derive_quantized(
            pin, folder, batch, store, method=method, gate=Gate(min_agreement=least), pipeline="bench", scratch=scratch
        )
        pins[method] = made.pin.to_dict()
        found[method] = asdict(made.comparison)
        print(f"  {method}: agreement {made.comparison.agreement:.4f} on {count} rows", flush=True)
    (place.folder / "pins.json").write_text(json.dumps(pins), encoding="utf-8")


def _opener(which: str) -> Callable[[Place], Run]:
    def opened(place: Place) -> Run:
        import pyarrow.parquet as pq

        from airflow_ai_provider.core.batch import Pin
        from airflow_ai_provider.core.infer.engine import open_engine

        pin = Pin.from_dict(json.loads((place.folder / "pins.json").read_text(encoding="utf-8"))[which])
        engine = open_engine(pin, place.folder / which, "cpu")
        rows = pq.read_table(place.folder / "rows.parquet")
        cores = len(os.sched_getaffinity(0))
        pool = ThreadPoolExecutor(cores)
        length = max(1, min(16_384, rows.num_rows // (4 * cores)))
        pieces = [rows.slice(start, length) for start in range(0, rows.num_rows, length)]

        def predict() -> list[Any]:
            return list(pool.map(lambda piece: engine.predict(piece, engine.batch_size), pieces))

        done = predict()
        assert sum(table["error"].null_count for table in done) == rows.num_rows, f"{which}: rows failed"

        def run() -> float:
            started = time.perf_counter()
            predict()
            return time.perf_counter() - started

        return run

    return opened


open_floats, open_dynamic, open_static = _opener("fp32"), _opener("dynamic"), _opener("static")


def check(place: Place) -> None:
    """Nothing is left to prove: making demanded the agreement, opening that every row is predicted."""
    assert (place.folder / "pins.json").is_file()


def case(title: str, sizes: tuple[int, int], goal: str, prepare: Callable[[Place], None]) -> Case:
    """Write a case of floats (the limit) against eight bits."""
    return Case(
        title=title,
        unit="rows/s",
        sizes=sizes,
        size_unit="rows",
        goal=goal,
        make=prepare,
        check=check,
        contenders={"limit": open_floats, "ours": open_dynamic, "int8, static": open_static},
        packages=("onnxruntime", "onnx", "numpy"),
    )
