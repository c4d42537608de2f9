"""I2: a transformer encoder over lists of tokens of different lengths, Parquet to predictions in Parquet.

The limit is ``session.run`` on calls that were sorted by length over all rows and padded to the longest of each before
the clock starts, the best of several sizes, on all cores. Ours reads a landed batch, proves digests, sorts, pads,
predicts, accounts for every row, writes and lands. The neighbours do what is usually done: every row padded to the
maximum, or each batch to its longest in the order of arrival; neither reads nor writes in the time that is measured.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import predicting
from benchmarks.harness import Case, Place, Run

PART_ROWS, LONGEST, VOCABULARY = 4_000, 256, 5_000
SHAPE = {"hidden": 128, "layers": 2, "heads": 4, "vocabulary": VOCABULARY, "longest": LONGEST}


def make(place: Place, shape: Mapping[str, int] = SHAPE) -> None:
    """Pin the model, land the rows: 8 to 256 tokens, 38 on average."""
    import numpy as np
    import pyarrow as pa

    from airflow_ai_provider.core.batch import ACCEPTED, ROW_ID
    from airflow_ai_provider.core.store import Store
    from tests.core.infer.nets import sequence_pin

    pin, folder = sequence_pin(**shape)
    shutil.copytree(folder, place.folder / "model")
    (place.folder / "pin.json").write_text(json.dumps(pin.to_dict()), encoding="utf-8")
    random = np.random.default_rng(0)
    lengths = np.clip(np.round(random.lognormal(np.log(29), 0.75, place.size)), 8, LONGEST).astype(int)
    lists = pa.array([random.integers(1, VOCABULARY, length) for length in lengths], pa.list_(pa.int64()))
    rows = pa.table({ROW_ID: [f"texts~0a1b2c3d/0/{i}" for i in range(place.size)], "input_ids": lists})
    writer = Store(str(place.folder / "store")).open_batch("bench", "batch", "rows")
    for start in range(0, place.size, PART_ROWS):
        writer.write(ACCEPTED, rows.slice(start, PART_ROWS))
    ref = writer.land({"read": place.size, "accepted": place.size, "quarantined": 0}, {})
    (place.folder / "batch.json").write_text(json.dumps(ref.to_dict()), encoding="utf-8")


def token_lists(place: Place) -> list[Any]:
    """Read the rows' tokens, in the rows' order."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = sorted((place.folder / "store/bench/batch/rows/accepted").glob("*.parquet"))
    column = pa.concat_tables([pq.read_table(path, columns=["input_ids"]) for path in files])["input_ids"]
    return [np.asarray(value, np.int64) for value in column.to_pylist()]


def padded(lists: list[Any], rows: Any, width: int) -> dict[str, Any]:
    """Return what the model is given for some rows."""
    import numpy as np

    ids, mask = np.zeros((len(rows), width), np.int64), np.zeros((len(rows), width), np.int64)
    for place, row in enumerate(rows):
        ids[place, : len(lists[row])], mask[place, : len(lists[row])] = lists[row], 1
    return {"input_ids": ids, "attention_mask": mask}


def plan(lists: list[Any], budget: int) -> tuple[list[Any], list[dict[str, Any]]]:
    """Sort by length over all rows; return the rows of each call of at most so many tokens, and what it is given."""
    import numpy as np

    lengths = np.array([len(tokens) for tokens in lists])
    order = np.argsort(lengths, kind="stable")
    groups, first = [], 0
    while first < len(order):
        end = first + 1
        while end < len(order) and lengths[order[end]] * (end + 1 - first) <= budget:
            end += 1
        groups.append(order[first:end])
        first = end
    return groups, [padded(lists, rows, int(lengths[rows].max())) for rows in groups]


class _Model:
    """The model with one thread per call, or one call over all cores: whichever is faster for these calls."""

    def __init__(self, place: Place) -> None:
        import onnxruntime as ort

        def session(threads: int) -> Any:
            options = ort.SessionOptions()
            options.intra_op_num_threads = threads
            options.inter_op_num_threads = 1
            path = str(place.folder / "model/model.onnx")
            return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

        cores = len(os.sched_getaffinity(0))
        self._single, self._shared, self._pool = session(1), session(cores), ThreadPoolExecutor(cores)

    def abreast(self, calls: list[dict[str, Any]]) -> list[Any]:
        return list(self._pool.map(lambda call: self._single.run(None, call)[0], calls))

    def together(self, calls: list[dict[str, Any]]) -> list[Any]:
        return [self._shared.run(None, call)[0] for call in calls]

    def best(self, plans: list[list[dict[str, Any]]]) -> tuple[Any, int]:
        """Return the faster way for the fastest of several plans, and which that is."""
        found = []
        for number, plan in enumerate(plans):
            few = plan[:: max(1, len(plan) // 20)]
            tokens = sum(call["input_ids"].size for call in few)
            for way in (self.abreast, self.together):
                spent = []
                for _ in range(2):
                    started = time.perf_counter()
                    way(few)
                    spent.append(time.perf_counter() - started)
                found.append((min(spent) / tokens, number, way))
        _, number, way = min(found, key=lambda entry: entry[0])
        return way, number


# --- contenders ---


def open_limit(place: Place) -> Run:
    """session.run on calls that are ready: sorted over all rows, each padded to its longest."""
    import numpy as np

    lists = token_lists(place)
    model, plans = _Model(place), [plan(lists, budget) for budget in (512, 1024, 2048, 8192)]
    way, number = model.best([calls for _, calls in plans])
    groups, calls = plans[number]
    scores = np.zeros((len(lists), 3), np.float32)
    for rows, answer in zip(groups, way(calls), strict=True):
        scores[rows] = answer
    (place.folder / "out").mkdir(exist_ok=True)
    np.save(place.folder / "out/limit.npy", scores)

    def run() -> None:
        way(calls)

    return run


def open_ours(place: Place) -> Run:
    """The verb itself: a landed batch in, landed predictions out."""
    return predicting.open_verb(place, "cpu")


def _in_order(place: Place, *, to_longest: bool) -> Run:
    import numpy as np

    lists, model = token_lists(place), _Model(place)

    def calls(rows: list[Any]) -> list[dict[str, Any]]:
        stretches = [range(start, min(start + 32, len(rows))) for start in range(0, len(rows), 32)]
        return [padded(rows, s, LONGEST if to_longest else max(len(rows[i]) for i in s)) for s in stretches]

    way, _ = model.best([calls(lists[: 32 * 20])])
    np.save(place.folder / f"out/{'longest' if to_longest else 'arrival'}.npy", np.concatenate(way(calls(lists))))

    def run() -> None:
        way(calls(lists))

    return run


def open_longest(place: Place) -> Run:
    """Batches of 32, every row padded to the most tokens that the model takes."""
    return _in_order(place, to_longest=True)


def open_arrival(place: Place) -> Run:
    """Batches of 32 in the order of arrival, each padded to its longest."""
    return _in_order(place, to_longest=False)


def check(place: Place) -> None:
    """Hold every contender's output against the limit's, row by row."""
    import numpy as np

    expected = _softmax(np.load(place.folder / "out/limit.npy"))
    for who in ("longest", "arrival"):
        assert np.allclose(_softmax(np.load(place.folder / f"out/{who}.npy")), expected, atol=1e-4), who
    check_ours(place, 1e-4)


def check_ours(place: Place, tolerance: float) -> None:
    """Hold ours against the limit's, row by row, with the rows' ids in their order."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    expected = _softmax(np.load(place.folder / "out/limit.npy"))
    files: list[Path] = sorted((place.folder / "store/ours/predictions").glob("*/predictions/*.parquet"))
    found = pa.concat_tables([pq.read_table(path) for path in files])
    assert found["_row_id"].to_pylist() == [f"texts~0a1b2c3d/0/{i}" for i in range(place.size)]
    scores = np.asarray(found["probabilities"].combine_chunks().flatten()).reshape(-1, 3)
    assert np.allclose(scores, expected, atol=tolerance), "ours: other probabilities"


def _softmax(logits: Any) -> Any:
    import numpy as np

    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


CASE = Case(
    title="transformer encoder over lists of 8 to 256 tokens, Parquet to predictions in Parquet",
    unit="rows/s",
    sizes=(4_000, 1_000),
    size_unit="rows",
    goal="≥ 0.95 of the limit",
    make=make,
    check=check,
    contenders={
        "limit": open_limit,
        "ours": open_ours,
        "batches of 32, padded to the maximum": open_longest,
        "batches of 32, in the order of arrival": open_arrival,
    },
    packages=("onnxruntime", "pyarrow", "numpy"),
)
