"""I5, images: a residual net of 18 layers by torch on a GPU over PNG images of 224 × 224, Parquet to predictions.

The limit is a loop over images that were decoded and lie on the device before the clock starts, the best of several
batch sizes. Ours reads a landed batch of PNG files, proves digests, decodes, copies to the device and back, accounts
for every row, writes and lands. The neighbour does so too, by hand and one step after the other: decode, copy, predict.
"""

from __future__ import annotations

import io
import time
from typing import Any

from benchmarks import gpu, predicting
from benchmarks.cases import i3
from benchmarks.harness import Case, Place, Run

SIDE, CLASSES, PART_ROWS = 224, 10, 1_000
_SIZES = (32, 128, 512)


def make(place: Place) -> None:
    """Export the net and pin it, land the images."""
    from tests.core.infer.dense import fresh_folder, pin_folder, tensor_signature

    folder = fresh_folder("residual")
    (folder / "data").mkdir()
    _export(str(folder / "data/model.pt2"))
    names = [f"class {i}" for i in range(CLASSES)]
    i3.land(place, pin_folder(folder, "torch", tensor_signature(3, SIDE, SIDE), classes=names), folder, SIDE, PART_ROWS)


def _export(path: str) -> None:
    import torch
    from torch import nn

    class Block(nn.Module):
        """Two convolutions beside a shortcut."""

        def __init__(self, n: int, m: int, stride: int) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(n, m, 3, stride, 1), nn.Conv2d(m, m, 3, 1, 1)
            self.shortcut = nn.Identity() if n == m else nn.Conv2d(n, m, 1, stride)

        def forward(self, x: Any) -> Any:
            return torch.relu(self.second(torch.relu(self.first(x))) + self.shortcut(x))

    torch.manual_seed(0)
    widths = [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2)]
    net = nn.Sequential(
        *(nn.Conv2d(3, 64, 7, 2, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1)),
        *(Block(*width) for width in [*widths, (512, 512, 1)]),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, CLASSES)),
    ).eval()
    rows = torch.export.Dim("rows", min=2)
    torch.export.save(
        torch.export.export(net, (torch.zeros(4, 3, SIDE, SIDE),), dynamic_shapes=({0: rows},)),
        path,
    )


def _model(place: Place) -> tuple[Any, str]:
    import torch
    from torch.export.passes import move_to_device_pass

    device = "cpu" if gpu.missing() else "cuda"
    program = torch.export.load(str(place.folder / "model/data/model.pt2"))
    return move_to_device_pass(program, device).module(), device


# --- contenders ---


def open_limit(place: Place) -> Run:
    """The net on images that are on the device, call after call."""
    import numpy as np
    import torch

    model, device = _model(place)
    images = torch.from_numpy(i3.decoded(place)).to(device)

    def go(size: int) -> Any:
        with torch.inference_mode():
            answers = [model(images[start : start + size]) for start in range(0, len(images), size)]
            return torch.cat(answers).cpu()  # which waits for all of them

    def seconds(size: int) -> float:
        go(size)
        started = time.perf_counter()
        go(size)
        return time.perf_counter() - started

    size = min((size for size in _SIZES if size <= len(images)), key=seconds)
    (place.folder / "out").mkdir(exist_ok=True)
    np.save(place.folder / "out/limit.npy", go(size).numpy())

    def run() -> None:
        with gpu.watched("limit", device):
            go(size)

    return run


def open_ours(place: Place) -> Run:
    """The verb itself: a landed batch in, landed predictions out."""
    return predicting.open_verb(place, gpu.device())


def open_by_hand(place: Place) -> Run:
    """Decode 128 files, copy, predict, and the next."""
    import numpy as np
    import torch
    from PIL import Image

    model, device = _model(place)

    def run() -> None:
        with gpu.watched("by hand", device), torch.inference_mode():
            files = i3.files(place)
            for start in range(0, len(files), 128):
                found = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in files[start : start + 128]]
                pixels = np.stack(found).transpose(0, 3, 1, 2).astype(np.float32) / 255
                model(torch.from_numpy(pixels).to(device)).cpu()

    return run


def check(place: Place) -> None:
    """Hold ours against the limit's logits, row by row, with the rows' ids in their order."""
    i3.check(place, 1e-3)


CASE = Case(
    title="residual net of 18 layers on a GPU over PNG images of 224 × 224, by torch",
    unit="rows/s",
    sizes=(4_000, 32),
    size_unit="rows",
    goal="≥ 0.9 of a loop over what is on the device already",
    make=make,
    check=check,
    contenders={"limit": open_limit, "ours": open_ours, "by hand, one step after the other": open_by_hand},
    packages=("torch", "pyarrow", "numpy", "pillow", "kornia-rs"),
    missing=gpu.missing,
)
