"""I5, lists of tokens: a transformer encoder of six layers by ONNX Runtime on a GPU, Parquet to predictions in Parquet.

The limit is a loop over calls whose inputs lie on the device before the clock starts: sorted by length over all rows,
padded to the longest of each, the best of several sizes, in ours' arithmetic (no ten-bit mantissas). Ours reads a
landed batch, proves digests, sorts, pads, copies to the device and back, accounts for every row, writes and lands. The
neighbour calls the same session with arrays of the processor's memory, in the order of arrival, 64 rows at a time.
"""

from __future__ import annotations

import time
from typing import Any

from benchmarks import gpu, predicting
from benchmarks.cases import i2
from benchmarks.harness import Case, Place, Run

SHAPE = {"hidden": 768, "layers": 6, "heads": 12, "vocabulary": i2.VOCABULARY, "longest": i2.LONGEST}
_BUDGETS = (4_096, 16_384, 65_536)


def make(place: Place) -> None:
    """As I2, with a larger model."""
    i2.make(place, SHAPE)


def _session(place: Place) -> tuple[Any, str]:
    import onnxruntime as ort

    providers: list[Any] = ["CPUExecutionProvider"]
    if not gpu.missing():
        providers.insert(0, ("CUDAExecutionProvider", {"cudnn_conv_algo_search": "DEFAULT", "use_tf32": "0"}))
    session = ort.InferenceSession(str(place.folder / "model/model.onnx"), providers=providers)
    return session, "cuda" if session.get_providers()[0].startswith("CUDA") else "cpu"


# --- contenders ---


def open_limit(place: Place) -> Run:
    """The session on inputs that are on the device, call after call."""
    import numpy as np
    import onnxruntime as ort

    session, device = _session(place)
    lists = i2.token_lists(place)

    def bound(call: dict[str, Any]) -> Any:
        binding = session.io_binding()
        for name, array in call.items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array, device, 0))
        binding.bind_output(session.get_outputs()[0].name, device, 0)
        return binding

    def go(bindings: list[Any]) -> None:
        for binding in bindings:
            session.run_with_iobinding(binding)

    plans = []
    for budget in _BUDGETS:
        groups, calls = i2.plan(lists, budget)
        bindings = [bound(call) for call in calls]
        go(bindings)
        started = time.perf_counter()
        go(bindings)
        plans.append((time.perf_counter() - started, groups, bindings))
    _, groups, bindings = min(plans, key=lambda entry: entry[0])
    scores = np.zeros((len(lists), 3), np.float32)
    for rows, binding in zip(groups, bindings, strict=True):
        scores[rows] = binding.copy_outputs_to_cpu()[0]
    (place.folder / "out").mkdir(exist_ok=True)
    np.save(place.folder / "out/limit.npy", scores)

    def run() -> None:
        with gpu.watched("limit", device):
            go(bindings)

    return run


def open_ours(place: Place) -> Run:
    """The verb itself: a landed batch in, landed predictions out."""
    return predicting.open_verb(place, gpu.device())


def open_arrival(place: Place) -> Run:
    """64 rows at a time in the order of arrival, each call padded to its longest, from the processor's memory."""
    session, device = _session(place)
    lists = i2.token_lists(place)

    def run() -> None:
        with gpu.watched("in the order of arrival", device):
            for start in range(0, len(lists), 64):
                rows = range(start, min(start + 64, len(lists)))
                session.run(None, i2.padded(lists, rows, max(len(lists[row]) for row in rows)))

    return run


def check(place: Place) -> None:
    """Hold ours against the limit's, row by row, with the rows' ids in their order."""
    i2.check_ours(place, 1e-3)


CASE = Case(
    title="transformer encoder of six layers on a GPU over lists of 8 to 256 tokens, by ONNX Runtime",
    unit="rows/s",
    sizes=(40_000, 64),
    size_unit="rows",
    goal="≥ 0.9 of a loop over what is on the device already",
    make=make,
    check=check,
    contenders={"limit": open_limit, "ours": open_ours, "64 rows in the order of arrival": open_arrival},
    packages=("onnxruntime-gpu", "onnxruntime", "pyarrow", "numpy"),
    missing=gpu.missing,
)
