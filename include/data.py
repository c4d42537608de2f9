"""The real data sets that scikit-learn ships, split once with a seed: one half to learn from, the other unseen.

Invariants: the same seed gives the same rows in the same order on every machine; no row is in both parts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SEED = 7
TRIAGE_CLASSES = ("malignant", "benign")
DIGIT_CLASSES = tuple(str(digit) for digit in range(10))


@dataclass(frozen=True)
class Part:
    """Rows of one half.

    :param numbers: the rows' places in the data set, which name them for ever.
    :param rows: one row each: 30 measures of a biopsy, or 8 × 8 grey values from 0 to 16.
    :param labels: index of the true class.
    """

    numbers: NDArray[np.int64]
    rows: NDArray[np.float64]
    labels: NDArray[np.int64]


def feature_names() -> tuple[str, ...]:
    """Return the names of the biopsy's 30 measures, as columns: ``mean_radius`` … ``worst_fractal_dimension``."""
    from sklearn.datasets import load_breast_cancer

    return tuple(str(name).replace(" ", "_") for name in load_breast_cancer().feature_names)


def biopsies() -> tuple[Part, Part]:
    """Return the 284 biopsies to learn from and the 285 unseen ones."""
    from sklearn.datasets import load_breast_cancer

    loaded = load_breast_cancer()
    return _split(np.asarray(loaded.data, dtype=np.float64), np.asarray(loaded.target), learn_count=284)


def digits() -> tuple[Part, Part]:
    """Return the 898 scanned digits to learn from and the 899 unseen ones."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    return _split(np.asarray(loaded.images, dtype=np.float64), np.asarray(loaded.target), learn_count=898)


def biopsy_id(number: int) -> str:
    """Name a biopsy by its place in the data set."""
    return f"B{number:04d}"


def biopsy_records() -> Iterator[tuple[dict[str, Any], str]]:
    """Give each unseen biopsy as the record that is published, and its true class."""
    names = feature_names()
    _, unseen = biopsies()
    for number, row, label in zip(unseen.numbers, unseen.rows, unseen.labels, strict=True):
        record = {"biopsy_id": biopsy_id(int(number)), **dict(zip(names, map(float, row), strict=True))}
        yield record, TRIAGE_CLASSES[int(label)]


def write_digits(folder: Path, truth: Path) -> int:
    """Write the unseen digits as PNG files, and their true classes elsewhere, so that no path gives one away.

    :param folder: takes ``scan-0007.png`` …, 8 × 8 pixels, 8-bit grey.
    :param truth: JSON file, file name → true class.
    :return: how many files there are.
    """
    from PIL import Image

    _, unseen = digits()
    folder.mkdir(parents=True, exist_ok=True)
    labels = {}
    for number, pixels, label in zip(unseen.numbers, unseen.rows, unseen.labels, strict=True):
        name = f"scan-{int(number):04d}.png"
        Image.fromarray(np.rint(pixels * 255 / 16).astype(np.uint8), mode="L").save(folder / name)
        labels[name] = DIGIT_CLASSES[int(label)]
    truth.parent.mkdir(parents=True, exist_ok=True)
    truth.write_text(json.dumps(labels, indent=1) + "\n", encoding="utf-8")
    return len(labels)


def _split(rows: NDArray[np.float64], labels: NDArray[np.int64], *, learn_count: int) -> tuple[Part, Part]:
    from sklearn.model_selection import train_test_split

    numbers = np.arange(len(rows))
    learn, unseen = train_test_split(numbers, train_size=learn_count, random_state=SEED, stratify=labels)
    return tuple(Part(chosen, rows[chosen], labels[chosen]) for chosen in (learn, np.sort(unseen)))  # type: ignore[return-value]
