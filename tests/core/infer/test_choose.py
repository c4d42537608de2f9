"""Which version a run uses, by policy and by what the ledger remembers."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from airflow_ai_provider.core.infer.choose import Asked, choose, parse_model, read_policies, version_at
from airflow_ai_provider.core.ledger import Sighting
from airflow_ai_provider.errors import ModelPinError, RegistryUnavailableError, SpecError
from airflow_ai_provider.testing import MemoryLedger, MemoryRegistry

DAY = datetime(2026, 11, 1, tzinfo=UTC)


def hour(number: float) -> datetime:
    return DAY + timedelta(hours=number)


class World:
    """A clock, a registry with triage versions 1 to 3, a ledger, and hourly runs: run n has the window n to n+1."""

    def __init__(self) -> None:
        self.at = DAY
        self.models, self.ledger = MemoryRegistry(now=lambda: self.at), MemoryLedger(lambda: self.at)
        for _ in range(3):
            self.models.register("triage")
        self.models.point("triage", "champion", "1")

    def run(self, number: float, policy: Any = "current", run_id: str = "", **fields: Any) -> str:
        """Pin at the clock's time and return the version."""
        window = (hour(number), hour(number + 1))
        values = {"model": "triage@champion", "window": window, "at": window[1], "pipeline": "p", **fields}
        asked = Asked(run_id=run_id or f"r{number}", policies=read_policies(policy), **values)
        return choose(asked, self.ledger, self.models)[0].version

    def at_hour(self, number: float) -> World:
        self.at = hour(number)
        return self


@pytest.fixture
def world() -> World:
    return World()


# --- current ---


def test_a_run_keeps_its_pin_whatever_policy_a_clear_brings(world: World) -> None:
    assert world.run(0) == "1"
    world.models.point("triage", "champion", "2")
    for policy in ("current", "as_of", "as_run"):
        assert world.run(0, policy) == "1"
    world.models.is_down = True
    assert world.run(0) == "1", "no registry is needed for a pin that is there"


def test_current_follows_the_alias_and_says_why(world: World) -> None:
    world.run(0)
    world.models.point("triage", "champion", "2")
    asked = Asked("p", "r1", "triage@champion", ("current",), None, hour(2))
    pin, why = choose(asked, world.ledger, world.models)
    assert (pin.version, pin.alias, why) == ("2", "champion", "current: triage@champion points to version 2")
    assert [h["policy"] for h in world.ledger.pin_history("triage")] == ["current", "current"]


def test_a_version_that_is_named_needs_no_policy(world: World) -> None:
    world.run(0)
    assert world.run(0, "as_run", "again", model="triage/3") == "3"
    assert world.ledger.pin_history("triage")[1]["policy"] is None


def test_a_registry_that_is_down_is_no_answer_of_a_policy(world: World) -> None:
    world.models.is_down = True
    with pytest.raises(RegistryUnavailableError):
        world.run(0, "as_of, current")
    assert world.ledger.pin_history("triage") == []


# --- as_run ---


def test_as_run_takes_what_the_window_used(world: World) -> None:
    for number, version in enumerate(["1", "2", "3"]):
        world.models.point("triage", "champion", version)
        world.at_hour(number + 1).run(number)
    assert [world.run(n, "as_run", f"again{n}") for n in range(3)] == ["1", "2", "3"]
    assert world.run(0, "as_run", "third", model="triage@other") == "1", "whatever the alias is called by now"


def test_as_run_of_another_cut_takes_what_all_its_windows_used(world: World) -> None:
    world.run(0)
    world.run(1)
    assert world.run(0, "as_run", "both", window=(hour(0), hour(2))) == "1"
    assert world.run(0, "as_run", "moment", window=(hour(1), hour(1))) == "1"
    world.models.point("triage", "champion", "2")
    world.run(2)
    with pytest.raises(ModelPinError, match="several versions of triage: version 1 by r0; .*version 2 by r2") as caught:
        world.run(0, "as_run, current", "all", window=(hour(0), hour(3)))
    assert "r2" in caught.value.runs
    assert world.run(2, "as_run", "one", window=(hour(2), hour(3))) == "2", "the same window goes before its neighbours"


def test_as_run_knows_its_own_pipeline_only(world: World) -> None:
    world.run(0, pipeline="other")
    with pytest.raises(ModelPinError, match="was never run by p.*Name the version"):
        world.run(0, "as_run")


def test_as_run_of_a_window_that_never_ran_lets_the_next_policy_answer(world: World) -> None:
    assert world.run(5, "as_run, current") == "1"
    assert world.run(6, ["as_run", "current"]) == "1"
    with pytest.raises(ModelPinError, match="neither a data interval nor a logical date"):
        world.run(7, "as_run", window=None)


def test_as_run_refuses_a_version_whose_bytes_are_not_those_that_ran(world: World) -> None:
    world.run(0)
    world.models.change("triage", "1", "something else")
    with pytest.raises(ModelPinError, match="has other bytes .* than run r0 used"):
        world.run(0, "as_run, current", "again")


# --- as_of ---


def test_as_of_takes_where_the_alias_was_seen_at_the_end_of_the_window(world: World) -> None:
    for number, version in [(1, "1"), (2, "1"), (3, "2"), (4, "2"), (5, "3")]:
        world.models.point("triage", "champion", version)
        world.at_hour(number).run(number - 1)
    world.at_hour(9)
    said = [world.run(number, "as_of", f"again{number}") for number in range(4)]
    assert said == ["1", "1", "2", "2"]
    assert world.run(3.5, "as_of", "r", at=hour(8)) == "3"


def test_as_of_does_not_guess_between_two_sightings(world: World) -> None:
    world.at_hour(1).run(0)
    world.models.point("triage", "champion", "2")
    world.at_hour(3).run(2)
    with pytest.raises(ModelPinError, match="pointed to version 1 at .*T01:00.* and to version 2 at .*T03:00"):
        world.run(1, "as_of", "again")
    assert world.run(1, "as_of, current", "again") == "2"


def test_a_version_registered_later_bounds_the_move(world: World) -> None:
    world.at_hour(1).run(0)
    world.at_hour(2.5).models.register("triage")
    world.models.point("triage", "champion", "4")
    world.at_hour(3).run(2)
    assert world.run(1, "as_of", "again") == "1"


def test_as_of_before_anybody_looked_has_no_answer(world: World) -> None:
    with pytest.raises(ModelPinError, match="before that nobody looked"):
        world.at_hour(5).run(1, "as_of")
    assert world.run(5, "as_of") == "1", "this very look is the first"


def test_an_alias_that_was_gone_is_no_version(world: World) -> None:
    world.at_hour(1).run(0)
    world.models.point("triage", "champion", None)
    for number in (2, 3):
        with pytest.raises(ModelPinError):
            world.at_hour(number).run(number, "current")
        with pytest.raises(ModelPinError):
            world.run(number, "as_of")
    with pytest.raises(ModelPinError, match="the alias did not exist"):
        world.run(1.5, "as_of", "again")


# --- pieces ---


def seen(version: str, first: float, last: float) -> Sighting:
    return Sighting(version, hour(first), hour(last))


@pytest.mark.parametrize(
    ("history", "at", "expected"),
    [
        ([], 1, None),
        ([seen("1", 1, 1)], 1, "1"),
        ([seen("1", 1, 1)], 2, "1"),
        ([seen("1", 1, 1)], 0.5, None),
        ([seen("1", 1, 3)], 2, "1"),
        ([seen("1", 1, 2), seen("2", 4, 5)], 3, None),
        ([seen("1", 1, 2), seen("9", 4, 5)], 3, "1"),
        ([seen("1", 1, 2), seen("", 4, 5)], 3, None),
        ([seen("", 1, 2), seen("9", 4, 5)], 3, None),
        ([seen("1", 1, 2), seen("2", 2, 5)], 2, "2"),
    ],
)
def test_where_an_alias_pointed(history: list[Sighting], at: float, expected: str | None) -> None:
    found, why = version_at(history, hour(at), lambda version: hour(3.5) if version == "9" else hour(-1))
    assert (found, bool(why)) == (expected, True)


def test_policies_are_read_from_texts_and_lists() -> None:
    assert read_policies("auto") == ("current",)
    assert read_policies("auto", is_backfill=True) == ("as_run", "current")
    assert read_policies("current", is_backfill=True) == ("current",)
    assert read_policies("as_run, as_of") == read_policies(["as_run", "as_of"]) == ("as_run", "as_of")


@pytest.mark.parametrize("value", ["", "latest", [], ["auto", "current"], "current,current", None, 3 * ["as_of"]])
def test_what_is_no_policy_is_said_so(value: Any) -> None:
    with pytest.raises(SpecError, match=r"current, as_run, as_of"):
        read_policies(value)


def test_names_are_read_out_of_both_forms() -> None:
    named = [parse_model(m)[0] for m in ("triage@champion", "triage/3", "models:/triage/3", "a/b/3")]
    assert named == ["triage", "triage", "triage", "a/b"]
