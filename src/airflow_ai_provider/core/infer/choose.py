"""Which version a run uses: what the alias points to now, what the window used, what the alias pointed to then.

Invariants: a run that has its pin keeps it; a policy that cannot be sure has no answer, and never guesses; every look
at an alias is noted in the ledger, because the registry keeps no history of aliases; mlflow is not imported here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Protocol

from airflow_ai_provider.core.batch import Pin
from airflow_ai_provider.core.ledger import Ledger, Sighting, Window
from airflow_ai_provider.errors import ModelPinError, SpecError

POLICIES = ("current", "as_run", "as_of")
"""Where the alias points now · what this window was run with · where the alias pointed at the window's end."""


class Registry(Protocol):
    """Registered models, their versions and aliases. ``address`` names it, without credentials."""

    address: str

    def aliases(self, name: str) -> dict[str, str]:
        """Return alias → version of a model.

        :raises ModelPinError: there is no such model; a retry does not help.
        """

    def created(self, name: str, version: str) -> datetime | None:
        """Return when a version was registered; None when it is not there (any more)."""

    def resolve(self, model: str) -> Pin:
        """Pin ``name@alias`` or ``name/version``; see :func:`~airflow_ai_provider.core.infer.pin.resolve_pin`."""


@dataclass(frozen=True)
class Asked:
    """What a run asks for.

    :param model: ``name@alias`` or ``name/version``.
    :param policies: of :data:`POLICIES`, tried in order; a version that is named needs none.
    :param window: the run's data interval, or its logical date twice; None when it has neither.
    :param at: the moment that ``as_of`` looks at.
    """

    pipeline: str
    run_id: str
    model: str
    policies: Sequence[str]
    window: Window | None
    at: datetime


def choose(asked: Asked, ledger: Ledger, registry: Registry) -> tuple[Pin, str]:
    """Pin a model for a run.

    :return: the pin that holds for the run, and in words why it is this version.
    :raises SpecError: the model or a policy is not written as it must be; no retry helps.
    :raises ModelPinError: no policy has an answer, or the version is not there any more; no retry helps.
    :raises RegistryUnavailableError: the registry does not answer; a retry may help.
    """
    name, alias, _ = parse_model(asked.model)
    held = ledger.pin_of(asked.pipeline, asked.run_id, name)
    if held is not None:
        return held, "this run has it pinned"
    if not alias:
        return _keep(asked, ledger, registry.resolve(asked.model), None), "the version is named"
    silences = []
    for policy in asked.policies:
        found, why = _ANSWERS[policy](asked, ledger, registry)
        if found is not None:
            return _keep(asked, ledger, found, policy), f"{policy}: {why}"
        silences.append(f"{policy}: {why}")
    raise ModelPinError(
        f"no policy says which version of {asked.model} this run shall use. {'. '.join(silences)}. Name the version "
        f"({name}/3), or let another policy answer where these cannot: [{', '.join([*asked.policies, 'current'])}].",
        name=name,
        alias=alias,
        policies=list(asked.policies),
    )


def read_policies(value: Any, is_backfill: bool = False) -> tuple[str, ...]:
    """Read what the author wrote as ``model_policy``.

    :param value: ``auto``, one policy, several as a list, or several with commas between.
    :param is_backfill: ``auto`` then asks for what the window used, and for where the alias points now only where
        that window never ran; otherwise for where it points now.
    :raises SpecError: a policy is unknown; a retry does not help.
    """
    names = [name.strip() for name in value.split(",")] if isinstance(value, str) else list(value or [])
    if names == ["auto"]:
        return ("as_run", "current") if is_backfill else ("current",)
    if not names or len(set(names)) != len(names) or not set(names) <= set(POLICIES):
        raise SpecError(
            f"model_policy {value!r} is not 'auto', nor one or more of {', '.join(POLICIES)}, each once.",
            faults=[("model_policy", f"{value!r} is no policy")],
        )
    return tuple(names)


def parse_model(model: str) -> tuple[str, str, str]:
    """Split ``name@alias`` or ``name/version`` into name, alias, version; one of the last two is empty.

    :raises SpecError: it is neither; a retry does not help.
    """
    name, at, alias = model.rpartition("@")
    if at and name and alias:
        return name, alias, ""
    name, slash, version = model.removeprefix("models:/").rpartition("/")
    if slash and name and version.isdecimal() and not at:
        return name, "", version
    raise SpecError(
        f"model {model!r} names no alias or version. Write name@alias (triage@champion) or name/version (triage/3).",
        faults=[("model", f"{model!r} is neither name@alias nor name/version")],
    )


def version_at(
    seen: Sequence[Sighting], at: datetime, created: Callable[[str], datetime | None]
) -> tuple[str | None, str]:
    """Say where an alias pointed at a moment, from where it was seen to point.

    Between two sightings of the same version the alias is taken to have stayed. Between two different ones it moved,
    nobody knows when; only a version that was registered after the moment cannot have been meant by it.

    :param seen: an alias's history, oldest first.
    :param created: version → when it was registered.
    :return: the version, or None when it cannot be told; and why.
    """
    before = next((s for s in reversed(seen) if s.first_at <= at), None)
    after = next((s for s in seen if s.first_at > at), None)
    if before and (at <= before.last_at or after is None):
        there = f"it was seen there from {_text(before.first_at)} to {_text(before.last_at)}"
        return (before.version or None), there if before.version else f"{there}: the alias did not exist"
    if after is None:
        return None, "the ledger has never seen this alias"
    registered = created(after.version) if after.version else None
    if before and before.version and registered and registered > at:
        return before.version, f"version {after.version} came after it only at {_text(registered)}"
    last = f"it pointed to {_shown(before)} at {_text(before.last_at)} and" if before else "before that nobody looked;"
    return None, (
        f"at {_text(at)} nobody knows: {last} to {_shown(after)} at {_text(after.first_at)}, "
        "the alias's history is as fine as the looks at it"
    )


def _current(asked: Asked, ledger: Ledger, registry: Registry) -> tuple[Pin | None, str]:
    name, _, _ = parse_model(asked.model)
    ledger.saw_aliases(registry.address, name, registry.aliases(name))
    pin = registry.resolve(asked.model)
    return pin, f"{asked.model} points to version {pin.version}"


def _as_run(asked: Asked, ledger: Ledger, registry: Registry) -> tuple[Pin | None, str]:
    name, _, _ = parse_model(asked.model)
    if asked.window is None:
        return None, "this run has neither a data interval nor a logical date"
    window = f"window {_text(asked.window[0])} to {_text(asked.window[1])}"
    met = ledger.pin_history(name, asked.pipeline, asked.window)
    whole = [row for row in met if tuple(map(_read, (row["window_start"], row["window_end"]))) == asked.window]
    rows = whole or met
    if not rows:
        return None, f"the {window} was never run by {asked.pipeline}, as far as the ledger knows"
    if len({row["digest"] for row in rows}) > 1:
        runs = "; ".join(f"version {row['version']} by {row['run_id']}" for row in rows[:5])
        raise ModelPinError(
            f"the {window} was run with several versions of {name}: {runs}. Name the one that is meant ({name}/3).",
            name=name,
            runs=[row["run_id"] for row in rows],
        )
    ran = rows[0]
    pin = registry.resolve(f"{name}/{ran['version']}")
    if pin.digest != ran["digest"]:
        raise ModelPinError(
            f"version {ran['version']} of model {name} has other bytes ({pin.digest[:19]}…) than run {ran['run_id']} "
            f"used ({ran['digest'][:19]}…). Somebody changed the files of a registered version: restore them, or "
            "choose another policy.",
            name=name,
            version=ran["version"],
        )
    return replace(pin, alias=ran["alias"]), f"run {ran['run_id']} used version {pin.version} for this window"


def _as_of(asked: Asked, ledger: Ledger, registry: Registry) -> tuple[Pin | None, str]:
    name, alias, _ = parse_model(asked.model)
    ledger.saw_aliases(registry.address, name, registry.aliases(name))
    seen = ledger.alias_history(registry.address, name, alias)
    version, why = version_at(seen, asked.at, lambda found: registry.created(name, found))
    if version is None:
        return None, why
    return replace(registry.resolve(f"{name}/{version}"), alias=alias), f"version {version} at {_text(asked.at)}, {why}"


_ANSWERS: Mapping[str, Callable[[Asked, Ledger, Registry], tuple[Pin | None, str]]] = {
    "current": _current,
    "as_run": _as_run,
    "as_of": _as_of,
}


def _keep(asked: Asked, ledger: Ledger, pin: Pin, policy: str | None) -> Pin:
    return ledger.pin(asked.pipeline, asked.run_id, pin, asked.window, policy)


def _shown(sighting: Sighting) -> str:
    return f"version {sighting.version}" if sighting.version else "nothing"


def _read(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None


def _text(at: datetime) -> str:
    return at.isoformat(timespec="seconds")
