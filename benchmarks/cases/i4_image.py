"""I4: the residual net of I3 in eight bits against floats; the dynamic method leaves convolutions as they are."""

from __future__ import annotations

from benchmarks import quantised
from benchmarks.cases.i3 import images, model
from benchmarks.harness import Place


def make(place: Place) -> None:
    """Quantise the net; its weights are random, so its classes are close and less agreement is asked for."""
    quantised.make(place, model, images, 0.5)


CASE = quantised.case(
    "residual net of 18 layers over images, int8 against float", (1_000, 300), "a gated version, never a default", make
)
