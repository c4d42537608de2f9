"""Two models on the same rows: how often they agree, how often each is right, and whether that is good enough.

Invariants: both models are held to the very same rows, by their ids; a row that one of them failed on is a row on
which they do not agree; a gate that lets everything pass cannot be written.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from statistics import median
from typing import TYPE_CHECKING, Any

from airflow_ai_provider.core.batch import ACCEPTED, PREDICTIONS, ROW_ID, BatchRef, Part, Pin
from airflow_ai_provider.errors import RowMismatchError, SignatureError, SpecError

if TYPE_CHECKING:
    import numpy.typing as npt
    import pyarrow as pa

    from airflow_ai_provider.core.infer.engine import Engine
    from airflow_ai_provider.core.store import Store

BINS = 10
"""Equal stretches of confidence over which the calibration error is taken."""


@dataclass(frozen=True)
class Gate:
    """Say what a new model must reach beside the old one on a reference batch.

    :param label: column of the batch that holds the truth; needed for ``max_accuracy_drop`` and
        ``max_calibration_error``.
    :param min_agreement: least share of rows (0 to 1) on which both predict the same; None: any.
    :param max_accuracy_drop: most that the new model's share of right rows may lie below the old one's (0.01: one
        row in a hundred); negative asks it to be better; None: any.
    :param max_calibration_error: most that the new model's confidence may differ from how often it is right, on
        average over ten stretches of confidence; None: any.
    :param min_speedup: least ratio of rows per second, new over old; None: any.
    :param tolerance: numbers that differ by no more count as the same.
    :raises SpecError: on creation, when it cannot be judged, or would let everything pass; a retry does not help.
    """

    label: str | None = None
    min_agreement: float | None = None
    max_accuracy_drop: float | None = None
    max_calibration_error: float | None = None
    min_speedup: float | None = None
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        bars = (self.min_agreement, self.max_accuracy_drop, self.max_calibration_error, self.min_speedup)
        faults = []
        if all(bar is None for bar in bars):
            faults.append(("", "it lets every model pass. Set min_agreement, max_accuracy_drop or another bar"))
        if self.label is None and (self.max_accuracy_drop is not None or self.max_calibration_error is not None):
            faults.append(("label", "is not set, and without the truth nothing says how often a model is right"))
        for name, low, high in (
            ("min_agreement", 0, 1),
            ("max_accuracy_drop", -1, 1),
            ("max_calibration_error", 0, 1),
            ("min_speedup", 0, 1000),
            ("tolerance", 0, float("inf")),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                faults.append((name, f"{value!r} is not between {low} and {high}"))
        if faults:
            text = "; ".join(f"{name}: {fault}" if name else fault for name, fault in faults)
            raise SpecError(f"this gate cannot be used: {text}.", faults=faults)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Gate:
        """Read what :meth:`to_dict` wrote; numbers may be text, as templates render them."""
        known = {f.name for f in fields(cls)}
        if set(data) - known:
            raise SpecError(
                f"a gate has no {sorted(set(data) - known)}; it has {sorted(known)}.", faults=[("gate", "unknown key")]
            )
        given = {name: value for name, value in data.items() if value not in (None, "", "None")}
        label = given.pop("label", None)
        try:
            return cls(label, **{name: float(value) for name, value in given.items()})
        except (TypeError, ValueError) as error:
            raise SpecError(f"this gate cannot be used: {error}.", faults=[("gate", str(error))]) from error

    def failures(self, found: Comparison) -> list[str]:
        """Say which bars the new model does not reach; empty when it passes."""
        new, old = found.challenger, found.champion
        drop = None if new.accuracy is None or old.accuracy is None else old.accuracy - new.accuracy
        error, speedup = new.calibration_error, found.speedup
        judged = [
            (self.min_agreement, found.agreement, "agreement", 1),
            (self.max_accuracy_drop, drop, "accuracy drop", -1),
            (self.max_calibration_error, error, "calibration error", -1),
            (self.min_speedup, speedup, "speedup", 1),
        ]
        said = []
        for bar, value, name, sign in judged:
            if bar is not None and (value is None or sign * value < sign * bar):
                rule = "at least" if sign > 0 else "at most"
                said.append(f"{name} {'unknown' if value is None else f'{value:.4f}'}, {rule} {bar:g} asked for")
        return said


@dataclass(frozen=True)
class Score:
    """How one model did on the rows.

    :param model: ``name/version``.
    :param digest: of its bytes.
    :param failed: rows that it could not predict.
    :param accuracy: share of all rows that it got right; None without labels.
    :param calibration_error: mean distance of confidence from the share of right rows, over :data:`BINS` equal
        stretches, weighted by rows (Guo et al., 2017, On Calibration of Modern Neural Networks); None without labels
        or scores.
    :param mean_confidence: None when the model gives no scores.
    :param rows_per_s: on one thread of this machine; None when it was not measured.
    """

    model: str
    digest: str
    failed: int = 0
    accuracy: float | None = None
    calibration_error: float | None = None
    mean_confidence: float | None = None
    rows_per_s: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Two models on the same rows.

    :param agreement: share of the rows on which both predict the same.
    """

    row_count: int
    agreement: float
    champion: Score
    challenger: Score

    @property
    def speedup(self) -> float | None:
        """Rows per second of the challenger over the champion's."""
        if not self.champion.rows_per_s or self.challenger.rows_per_s is None:
            return None
        return self.challenger.rows_per_s / self.champion.rows_per_s

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON."""
        return {**asdict(self), "speedup": self.speedup}

    def to_text(self) -> str:
        """Draw a table in Markdown."""
        lines = [
            f"{self.row_count:,} rows, agreement {self.agreement:.4f}",
            "",
            f"| | champion {self.champion.model} | challenger {self.challenger.model} |",
            "|---|---|---|",
        ]
        for name in ("failed", "accuracy", "calibration_error", "mean_confidence", "rows_per_s"):
            cells = [_cell(getattr(score, name)) for score in (self.champion, self.challenger)]
            lines.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} |")
        return "\n".join(lines)


@dataclass
class _Tally:
    """What is counted of one model, part by part."""

    failed: int = 0
    right: int = 0
    confident: float = 0.0
    scored: int = 0
    bins: list[list[float]] = field(default_factory=lambda: [[0.0, 0.0, 0.0] for _ in range(BINS)])

    def score(self, pin: Pin, row_count: int, labelled: bool) -> Score:
        error = (
            sum(abs(right - confidence) for _, right, confidence in self.bins) / self.scored if self.scored else None
        )
        return Score(
            f"{pin.name}/{pin.version}",
            pin.digest,
            self.failed,
            self.right / row_count if labelled and row_count else None,
            error if labelled else None,
            self.confident / self.scored if self.scored else None,
        )


def compare(
    store: Store, batch: BatchRef, champion: tuple[Pin, BatchRef], challenger: tuple[Pin, BatchRef], gate: Gate
) -> Comparison:
    """Hold two models' predictions of one batch against each other and against the truth.

    :param batch: what both predicted.
    :param champion: the model in use, and its predictions.
    :param challenger: the model that may take its place, and its predictions.
    :param gate: which column is the truth, and what counts as the same number.
    :raises RowMismatchError: the predictions are not of the same rows; a retry does not help.
    :raises SignatureError: the batch has no such label column; a retry does not help.
    """
    tallies = _Tally(), _Tally()
    row_count = agreed = 0
    rows = store.manifest(batch).table(ACCEPTED)
    of_champion, of_challenger = (store.manifest(ref).table(PREDICTIONS) for _, ref in (champion, challenger))
    for given, old, new in zip(rows, of_champion, of_challenger, strict=True):
        ids, truth = _truth(store, batch, given, gate.label)
        tables = store.read_part(champion[1], old), store.read_part(challenger[1], new)
        if not all(table[ROW_ID].combine_chunks().equals(ids) for table in tables):
            raise RowMismatchError(
                f"the predictions of {old.path} are not of the rows of {given.path} in batch {batch.batch_id}. "
                "Clear the task that wrote them.",
                path=old.path,
            )
        values = [table["prediction"].combine_chunks() for table in tables]
        agreed += int(_same(values[0], values[1], gate.tolerance).sum())
        row_count += given.row_count
        for tally, table, value in zip(tallies, tables, values, strict=True):
            _count(tally, table, None if truth is None else _same(value, truth, gate.tolerance))
    scores = (
        tallies[n].score(pin, row_count, gate.label is not None) for n, (pin, _) in enumerate((champion, challenger))
    )
    return Comparison(row_count, agreed / row_count if row_count else 0.0, *scores)


def measure_speed(engines: Sequence[Engine], rows: pa.Table, repeats: int = 5) -> list[float]:
    """Return each engine's rows per second over the same rows, one call at a time, median of several, in turns.

    :param rows: enough for some calls; a few thousand are plenty.
    """
    seconds: list[list[float]] = [[] for _ in engines]
    for turn in range(repeats + 1):
        for taken, engine in zip(seconds, engines, strict=True):
            started = time.perf_counter()
            engine.predict(rows, engine.batch_size)
            if turn:  # the first is a warm-up
                taken.append(time.perf_counter() - started)
    return [rows.num_rows / max(median(taken), 1e-9) for taken in seconds]


def _truth(store: Store, batch: BatchRef, part: Part, label: str | None) -> tuple[pa.Array, pa.Array | None]:
    wanted = [ROW_ID] if label is None else [ROW_ID, label]
    table = store.read_part(batch, part, wanted)
    if label is not None and label not in table.column_names:
        raise SignatureError(
            f"batch {batch.batch_id} has no column {label!r} to be the truth. Name the column that holds the label.",
            label=label,
        )
    return table[ROW_ID].combine_chunks(), None if label is None else table[label].combine_chunks()


def _same(left: pa.Array, right: pa.Array, tolerance: float) -> npt.NDArray[Any]:
    """Tell for each row whether both hold the same value; a missing one is like nothing."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    plain = [a.dictionary_decode() if pa.types.is_dictionary(a.type) else a for a in (left, right)]
    if all(_is_number(a.type) for a in plain):
        gap = np.abs(np.subtract(*(pc.cast(a, pa.float64()).to_numpy(zero_copy_only=False) for a in plain)))
        return np.asarray(gap <= tolerance)  # NaN, which a missing value becomes, is not
    equal = pc.equal(*(pc.cast(a, pa.string()) for a in plain))
    return np.asarray(pc.fill_null(equal, False).to_numpy(zero_copy_only=False), bool)


def _is_number(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _count(tally: _Tally, table: pa.Table, right: npt.NDArray[Any] | None) -> None:
    import numpy as np

    tally.failed += table.num_rows - table["error"].null_count
    scores = table["score"].combine_chunks().to_numpy(zero_copy_only=False)
    known = np.isfinite(scores)
    tally.scored += int(known.sum())
    tally.confident += float(scores[known].sum())
    if right is None:
        return
    tally.right += int(right.sum())
    stretch = np.minimum((scores[known] * BINS).astype(int), BINS - 1)
    for number in range(BINS):
        inside = stretch == number
        tally.bins[number][0] += float(inside.sum())
        tally.bins[number][1] += float(right[known][inside].sum())
        tally.bins[number][2] += float(scores[known][inside].sum())


def _cell(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4f}" if abs(value) < 100 else f"{value:,.0f}"
