"""The value that says how a model is made faster at the price of other last bits.

Invariants: frozen; what is asked for is done or refused, never left out silently; it is part of what names a prediction
batch, so a part made in one way is never taken for one made in another.
"""

from __future__ import annotations

from dataclasses import dataclass

from airflow_ai_provider.errors import SpecError

PRECISIONS = ("bfloat16", "float16")


@dataclass(frozen=True)
class Tuning:
    """Say what a model may do to be faster.

    :param precision: ``bfloat16`` or ``float16`` for the heavy operations (torch: autocast; ONNX: TensorRT's float16);
        None keeps the model's own.
    :param compile: compile the model for this device before the first row: torch by its own compiler, ONNX by TensorRT.
    """

    precision: str | None = None
    compile: bool = False

    @property
    def faults(self) -> list[tuple[str, str]]:
        """Say by field what cannot be meant."""
        faults = []
        if self.precision is not None and self.precision not in PRECISIONS:
            said = f"{self.precision!r} is none of {', '.join(PRECISIONS)}; leave it out to keep the model's own"
            faults.append(("precision", said))
        if not isinstance(self.compile, bool):
            faults.append(("compile", f"{self.compile!r} is not true or false"))
        return faults

    def traits(self, compiler: str) -> dict[str, str]:
        """Return what a prediction's bits depend on, as plain JSON; empty for a model that is run as it is."""
        given = {"precision": self.precision, "compiler": compiler if self.compile else None}
        return {name: value for name, value in given.items() if value is not None}


AS_IT_IS = Tuning()


def demand(possible: bool, path: str, rule: str) -> None:
    """Refuse a tuning that an engine cannot do.

    :param path: the field.
    :param rule: why not, and the next move.
    :raises SpecError: when it is not possible; no retry helps.
    """
    if not possible:
        raise SpecError(f"{path} cannot be had for this model: {rule}", faults=[(path, rule)])
