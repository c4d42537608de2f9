"""Draw what a policy does: how sure the model is, where the bars lie, and whether its confidence can be believed.

Invariants: the numbers come from pure functions and are drawn as they are; matplotlib is loaded only to draw.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from airflow_ai_provider.core.decide.calibrate import calibration_error, reliability
from airflow_ai_provider.core.decide.policy import Policy
from airflow_ai_provider.errors import MissingExtraError

_COLOURS = {"act": "#2e7d4f", "review": "#d98e04", "rest": "#8a8f98", "line": "#1f4e9c"}


def histogram(confidence: npt.ArrayLike, policy: Policy, bins: int = 20) -> pa.Table:
    """Count rows by confidence, without a bin that lies on both sides of a bar.

    :param confidence: one per row, 0 to 1; rows without one are left out.
    :param policy: its bars become edges of bins.
    :param bins: how many bins of equal width before the bars cut them.
    :return: one row per bin: ``low``, ``high``, ``row_count``, ``zone`` (``act``, ``review`` or ``rest``).
    """
    sure = np.asarray(confidence, dtype=float)
    edges = np.unique(np.concatenate([np.linspace(0, 1, bins + 1), [policy.act, policy.review]]))
    # The bin of a confidence is the last edge that it reaches; 1.0 belongs to the last bin.
    place = np.minimum(np.searchsorted(edges, sure[~np.isnan(sure)], side="right") - 1, len(edges) - 2)
    low = edges[:-1]
    zone = np.where(low >= policy.act, "act", np.where(low >= policy.review, "review", "rest"))
    count = np.bincount(place, minlength=len(low))
    return pa.table({"low": low, "high": edges[1:], "row_count": count, "zone": pa.array(zone.tolist())})


def draw_report(
    confidence: npt.ArrayLike, policy: Policy, path: str | Path, correct: npt.ArrayLike | None = None
) -> None:
    """Draw the histogram with the bars, and beside it the reliability curve, into a PNG.

    :param confidence: one per row, 0 to 1, NaN for none.
    :param policy: the bars.
    :param path: file to write.
    :param correct: whether each decision was right, where that is known; None leaves the curve out.
    :raises MissingExtraError: matplotlib is not installed; a retry does not help.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib is not installed: pip install 'airflow-ai-provider[demo]'.") from error
    panels = 1 if correct is None else 2
    # A Figure of its own, not pyplot: no global state, no display, safe in threads.
    figure = Figure(figsize=(6.5 * panels, 4.2), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, panels))
    _draw_histogram(axes[0], histogram(confidence, policy), policy)
    if correct is not None:
        _draw_reliability(axes[1], reliability(confidence, correct))
    figure.savefig(str(path), format="png", dpi=120, metadata={"Software": None})


def _draw_histogram(axes: Any, table: pa.Table, policy: Policy) -> None:
    low, high, count = (table[name].to_numpy() for name in ("low", "high", "row_count"))
    colours = [_COLOURS[zone] for zone in table["zone"].to_pylist()]
    axes.bar(low, count, width=high - low, align="edge", color=colours, edgecolor="white", linewidth=0.5)
    for name, bar in (("act", policy.act), ("review", policy.review)):
        axes.axvline(bar, color=_COLOURS[name], linestyle="--", label=f"{name} {bar:g}")
    axes.set(xlim=(0, 1), xlabel="confidence", ylabel="rows", title=f"{int(count.sum())} rows by confidence")
    axes.legend(loc="upper left")


def _draw_reliability(axes: Any, table: pa.Table) -> None:
    has = table["row_count"].to_numpy() > 0
    mean, share = (
        table[name].to_numpy(zero_copy_only=False)[has].astype(float) for name in ("mean_confidence", "share_correct")
    )
    axes.plot([0, 1], [0, 1], color=_COLOURS["rest"], linestyle=":", label="means what it says")
    axes.plot(mean, share, color=_COLOURS["line"], marker="o", label=f"error {calibration_error(table):.3f}")
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="confidence", ylabel="share of right decisions", title="Reliability")
    axes.legend(loc="upper left")
