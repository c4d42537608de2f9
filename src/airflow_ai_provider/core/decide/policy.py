"""The values that say how predictions are decided: two bars, and what becomes of the rest.

Invariants: frozen, comparable, with a digest; a value that exists can be run (all faults are raised on creation);
importing this module loads no table library.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from airflow_ai_provider.core.batch import digest_of
from airflow_ai_provider.core.decide import rule as rules
from airflow_ai_provider.errors import SpecError

Value = str | int | float | bool
OTHERWISE = ("fallback", "review", "hold")


@dataclass(frozen=True)
class Fallback:
    """Decide by a rule over a row's columns where the model is not sure enough.

    Example: ``Fallback("worst_radius > 16.8", then="malignant", otherwise="benign")``. A row for which the rule has no
    answer (a value is missing) goes to review. Without ``then`` and ``otherwise`` the rule's own yes or no is the
    decision, which fits only a model that answers yes or no.

    :param rule: a yes-or-no expression over column names; see :mod:`airflow_ai_provider.core.decide.rule`.
    :param then: the decision where the rule says yes; of the type that the model predicts.
    :param otherwise: the decision where it says no.
    :raises SpecError: when the rule cannot be run, with the position of each fault; a retry does not help.
    """

    rule: str
    then: Value = True
    otherwise: Value = False

    def __post_init__(self) -> None:
        faults = [("rule", fault) for fault in rules.find_faults(self.rule)]
        for name, value in (("then", self.then), ("otherwise", self.otherwise)):
            if not isinstance(value, str | int | float | bool):
                faults.append((name, f"{value!r} is not a text, a number or yes or no"))
        if isinstance(self.then, str) != isinstance(self.otherwise, str):
            faults.append(("then", f"{self.then!r} and {self.otherwise!r} are of two types; give two of one type"))
        _raise("fallback", faults)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON."""
        return {"rule": self.rule, "then": self.then, "otherwise": self.otherwise}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Fallback:
        """Read what :meth:`to_dict` wrote.

        :raises SpecError: on unknown keys, or when the rule cannot be run; a retry does not help.
        """
        _demand_keys("fallback", data, ("rule", "then", "otherwise"))
        return cls(**data)


@dataclass(frozen=True)
class Policy:
    """Send each row to one route by its confidence.

    ``confidence ≥ act`` acts; ``≥ review`` goes to a person; below that, ``otherwise``. A row without a confidence
    (null, NaN, no number from 0 to 1) always goes to a person.

    :param act: lowest confidence to act on, from 0 to 1.
    :param review: lowest confidence to show to a person, from 0 to ``act``.
    :param otherwise: ``fallback``, ``review`` or ``hold``; None means ``fallback`` where one is given, else ``hold``.
    :param fallback: the rule that decides where the model does not; needed by, and only by, ``otherwise="fallback"``.
    :raises SpecError: with every fault; a retry does not help.
    """

    act: float
    review: float
    otherwise: str | None = None
    fallback: Fallback | None = None

    def __post_init__(self) -> None:
        if self.otherwise is None:
            object.__setattr__(self, "otherwise", "hold" if self.fallback is None else "fallback")
        faults = [*_bar_faults("act", self.act), *_bar_faults("review", self.review)]
        if not faults and self.review > self.act:
            faults.append(
                ("review", f"{self.review} is above act {self.act}; a person sees what is too unsure to act on")
            )
        if self.otherwise not in OTHERWISE:
            faults.append(("otherwise", f"{self.otherwise!r} is not one of {', '.join(OTHERWISE)}"))
        elif self.otherwise == "fallback" and self.fallback is None:
            faults.append(("fallback", "is missing: otherwise is fallback, so a rule must decide"))
        elif self.otherwise != "fallback" and self.fallback is not None:
            faults.append(("fallback", f"is never used: otherwise is {self.otherwise}. Set otherwise to fallback"))
        _raise("policy", faults)
        object.__setattr__(self, "act", float(self.act))
        object.__setattr__(self, "review", float(self.review))

    @property
    def digest(self) -> str:
        """SHA-256 of this policy: equal policies have equal digests."""
        return digest_of(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON."""
        fallback = self.fallback.to_dict() if self.fallback else None
        return {"act": self.act, "review": self.review, "otherwise": self.otherwise, "fallback": fallback}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Policy:
        """Read what :meth:`to_dict` wrote; bars may be text, as templates render them.

        :raises SpecError: on unknown keys, or when the policy cannot be run; a retry does not help.
        """
        _demand_keys("policy", data, ("act", "review", "otherwise", "fallback"))
        fallback = data.get("fallback")
        if isinstance(fallback, Mapping):
            fallback = Fallback.from_dict(fallback)
        return cls(
            _number(data.get("act")), _number(data.get("review")), data.get("otherwise") or None, fallback or None
        )


def _number(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value  # the policy names it as a fault, with the others


def _bar_faults(name: str, value: Any) -> list[tuple[str, str]]:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if is_number and 0 <= value <= 1:
        return []
    return [(name, f"{value!r} is not a confidence. Give a number from 0 to 1, such as 0.95")]


def _demand_keys(what: str, data: Mapping[str, Any], known: tuple[str, ...]) -> None:
    if not isinstance(data, Mapping):
        _raise(what, [("", f"{data!r} is not a mapping with {', '.join(known)}")])
    needed = known[:1] if what == "fallback" else known[:2]
    faults = [(key, f"is not a key of a {what}; it has {', '.join(known)}") for key in data if key not in known]
    _raise(what, faults + [(key, "is missing") for key in needed if data.get(key) is None])


def _raise(what: str, faults: list[tuple[str, str]]) -> None:
    if faults:
        text = "; ".join(f"{path}: {message}" if path else message for path, message in faults)
        raise SpecError(f"this {what} cannot be run: {text}. Correct it where it is written.", faults=faults)
