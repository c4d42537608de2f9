"""I3: a residual net of 18 layers over images of 64 × 64, encoded in Parquet, to predictions in Parquet.

The limit is ``session.run`` on images that were decoded before the clock starts, with the best of several batch sizes,
on all cores. Ours reads a landed batch of PNG files, proves digests, decodes, predicts, accounts for every row, writes
and lands. The neighbour calls the session image by image, on images that are decoded already.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import predicting
from benchmarks.harness import Case, Place, Run

if TYPE_CHECKING:
    import pyarrow as pa

    from airflow_ai_provider.core.batch import Pin

PART_ROWS, SIDE, CLASSES = 500, 64, 10


def model() -> tuple[Pin, Path]:
    """Make the model and pin its folder."""
    from tests.core.infer.dense import fresh_folder, pin_folder, tensor_signature
    from tests.core.infer.nets import resnet_onnx

    folder = fresh_folder("resnet")
    (folder / "model.onnx").write_bytes(resnet_onnx(classes=CLASSES))
    signature = tensor_signature(3, SIDE, SIDE)
    return pin_folder(folder, "onnx", signature, classes=[f"class {i}" for i in range(CLASSES)]), folder


def images(count: int, side: int = SIDE) -> pa.Table:
    """Make PNG files of smooth noise, which compress as photographs do and not as noise does."""
    import numpy as np
    import pyarrow as pa
    from PIL import Image

    random, files = np.random.default_rng(0), []
    for _ in range(count):
        small = Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8))
        sink = io.BytesIO()
        small.resize((side, side), Image.Resampling.BILINEAR).save(sink, "png")
        files.append(sink.getvalue())
    return pa.table({"_row_id": [f"images/{i}" for i in range(count)], "bytes": files})


def make(place: Place) -> None:
    """Pin the model, land the images."""
    land(place, *model(), SIDE, PART_ROWS)


def land(place: Place, pin: Pin, folder: Path, side: int, part_rows: int) -> None:
    """Land images of a size beside a pinned model."""
    from airflow_ai_provider.core.batch import ACCEPTED
    from airflow_ai_provider.core.store import Store

    shutil.copytree(folder, place.folder / "model")
    shutil.rmtree(folder.parent)
    (place.folder / "pin.json").write_text(json.dumps(pin.to_dict()), encoding="utf-8")
    writer, rows = Store(str(place.folder / "store")).open_batch("bench", "batch", "rows"), images(place.size, side)
    for start in range(0, place.size, part_rows):
        writer.write(ACCEPTED, rows.slice(start, part_rows))
    ref = writer.land({"read": place.size, "accepted": place.size, "quarantined": 0}, {})
    (place.folder / "batch.json").write_text(json.dumps(ref.to_dict()), encoding="utf-8")


def files(place: Place) -> list[bytes]:
    """Read the rows' images, encoded, in the rows' order."""
    import pyarrow.parquet as pq

    parts = sorted((place.folder / "store/bench/batch/rows/accepted").glob("*.parquet"))
    return [data for path in parts for data in pq.read_table(path, columns=["bytes"])["bytes"].to_pylist()]


def decoded(place: Place) -> Any:
    """Return the rows' images as the model takes them."""
    import numpy as np
    from PIL import Image

    pixels = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.float32) / 255 for data in files(place)]
    return np.ascontiguousarray(np.stack(pixels).transpose(0, 3, 1, 2))


def _session(place: Place, threads: int) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    path = str(place.folder / "model/model.onnx")
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


# --- contenders ---


def open_limit(place: Place) -> Run:
    """session.run on images that are ready, the best of batch sizes, threads and sessions."""
    import numpy as np

    images, cores = decoded(place), len(os.sched_getaffinity(0))
    shared, single, pool = _session(place, cores), _session(place, 1), ThreadPoolExecutor(cores)

    def together(batch: int, rows: Any) -> list[Any]:
        return [shared.run(None, {"image": rows[i : i + batch]})[0] for i in range(0, len(rows), batch)]

    def abreast(batch: int, rows: Any) -> list[Any]:
        starts = range(0, len(rows), batch)
        return list(pool.map(lambda i: single.run(None, {"image": rows[i : i + batch]})[0], starts))

    ways: list[tuple[Callable[[int, Any], list[Any]], int]] = [
        (way, batch) for way in (together, abreast) for batch in (8, 16, 32, 64)
    ]

    def seconds(entry: tuple[Callable[[int, Any], list[Any]], int]) -> float:
        spent = []
        for _ in range(2):
            started = time.perf_counter()
            entry[0](entry[1], images[:128])
            spent.append(time.perf_counter() - started)
        return min(spent)

    way, batch = min(ways, key=seconds)
    (place.folder / "out").mkdir()
    np.save(place.folder / "out/limit.npy", np.concatenate(way(batch, images)))

    def run() -> None:
        way(batch, images)

    return run


def open_ours(place: Place) -> Run:
    """The verb itself: a landed batch in, landed predictions out."""
    return predicting.open_verb(place, "cpu")


def open_one_by_one(place: Place) -> Run:
    """A call per image, on all cores."""
    images, session = decoded(place), _session(place, len(os.sched_getaffinity(0)))

    def run() -> None:
        for i in range(len(images)):
            session.run(None, {"image": images[i : i + 1]})

    return run


def check(place: Place, tolerance: float = 1e-4) -> None:
    """Hold ours against the limit's logits, row by row, with the rows' ids in their order."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    logits = np.load(place.folder / "out/limit.npy")
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    files = sorted((place.folder / "store/ours/predictions").glob("*/predictions/*.parquet"))
    found = pa.concat_tables([pq.read_table(path) for path in files])
    assert found["_row_id"].to_pylist() == [f"images/{i}" for i in range(place.size)]
    scores = np.asarray(found["probabilities"].combine_chunks().flatten()).reshape(-1, CLASSES)
    assert np.allclose(scores, powers / powers.sum(axis=1, keepdims=True), atol=tolerance), "other probabilities"


CASE = Case(
    title="residual net of 18 layers over PNG images of 64 × 64 in Parquet, to predictions in Parquet",
    unit="rows/s",
    sizes=(2_000, 256),
    size_unit="rows",
    goal="≥ 0.95 of the limit",
    make=make,
    check=check,
    contenders={"limit": open_limit, "ours": open_ours, "image by image": open_one_by_one},
    packages=("onnxruntime", "pyarrow", "numpy", "pillow", "kornia-rs"),
)
