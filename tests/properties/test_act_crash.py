"""Kill act and compensate at every step, run again, compare the world with one that was never killed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from airflow_ai_provider.core.act.sender import Request
from airflow_ai_provider.core.batch import BatchRef
from airflow_ai_provider.core.ledger import Ledger
from airflow_ai_provider.core.ledger_sql import open_ledger
from airflow_ai_provider.errors import AiProviderError, SagaFailedError
from airflow_ai_provider.testing.ledger import MemoryLedger
from airflow_ai_provider.testing.sender import ScriptedSender
from tests.core.act.world import PAGE, TICKET, Died, Life, World

SUBJECTS = ["a", "b", "c", "a", "d", "e", "f", "g", "h", "i"]
STEPS = ["ticket", "page"]


def refuse_pages(request: Request, _: int) -> str:
    return "refused" if request.path == "/pages" and (b'"b"' in request.body or b'"h"' in request.body) else "done"


def act_both(world: World, life: Callable[[], Life]) -> BatchRef:
    """Two steps, each in a process of its own; the second is partly refused."""
    rows = world.rows(SUBJECTS)
    world.act([rows], TICKET, life=life())
    try:
        return world.act([rows], PAGE, step=1, life=life())
    except SagaFailedError as error:
        return error.ref


def facts(world: World) -> dict[str, Any]:
    """All that a person could see afterwards, times and attempts left out."""
    return {
        "effects": dict(sorted(world.receiver.effects.items())),
        "entries": sorted(
            (e.key, e.state, e.step, sorted(e.outcome.items(), key=str)) for e in world.ledger.entries("p")
        ),
        "finished": world.ledger.finished_actions("p", "r1"),
        "files": {
            str(path.relative_to(world.store.root)): path.read_bytes()
            for path in sorted(Path(world.store.root).rglob("*"))
            if path.is_file() and path.suffix != ".aside"
        },
    }


def seams_of(tmp_path: Path) -> tuple[dict[str, Any], list[Life]]:
    """The undisturbed world and the seams of its two processes."""
    world, lives = World(tmp_path / "whole", receiver=ScriptedSender(refuse_pages)), []

    def live() -> Life:
        lives.append(Life())
        return lives[-1]

    act_both(world, live)
    return facts(world), lives


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
def test_killed_at_any_seam_and_run_again_the_world_is_the_same(tmp_path: Path, kind: str) -> None:
    whole, lives = seams_of(tmp_path)
    # act's own chunks run side by side, so the seams' order may vary; every position is hit before and after its call
    places = [
        (task, at, after) for task, life in enumerate(lives) for at in range(len(life.passed)) for after in (0, 1)
    ]
    assert {"dispatch", "send", "record", "finished", "open_batch"} <= set(lives[0].passed)
    if kind == "sqlite":
        places = places[::5]
    for number, (task, at, after) in enumerate(places):
        folder = tmp_path / f"{kind}-{number}"
        ledger: Ledger = MemoryLedger() if kind == "memory" else open_ledger(f"sqlite:///{folder}/ledger.db")
        world = World(folder, ledger, ScriptedSender(refuse_pages))
        plan = iter([Life(at, bool(after)) if index == task else Life() for index in range(2)])
        died = False
        try:
            act_both(world, lambda plan=plan: next(plan))
        except Died:
            died = True
        assert died or at >= len(lives[task].passed) - 4, f"no process died at seam {at} of task {task}"
        act_both(world, Life)
        seen = facts(world)
        assert set(seen["effects"].values()) == {1}, (task, at, after)
        for fact, value in whole.items():
            assert _moved(seen[fact], folder) == _moved(value, tmp_path / "whole"), (fact, task, at, after)


def _moved(value: Any, folder: Path) -> Any:
    """The same facts with the store's own folder left out: references carry the URI."""
    if isinstance(value, dict):
        return {k: _moved(v, folder) for k, v in value.items()}
    return str(value).replace(str(folder), "")


@pytest.mark.parametrize("after", [False, True])
def test_compensation_killed_at_any_seam_undoes_each_once(tmp_path: Path, after: bool) -> None:
    def failed_run(name: str) -> World:
        world = World(tmp_path / name, receiver=ScriptedSender(refuse_pages))
        act_both(world, Life)
        return world

    life = Life()
    whole = failed_run("whole")
    expected = whole.compensate(steps=STEPS, failed=["page"], scope="run", life=life)
    assert expected == {"compensated": 16, "kept": 0, "parked": 0}
    for at in range(len(life.passed)):
        world = failed_run(f"{after}-{at}")
        with pytest.raises(Died):
            world.compensate(steps=STEPS, failed=["page"], scope="run", life=Life(at, after))
        world.compensate(steps=STEPS, failed=["page"], scope="run")
        assert facts(world)["effects"] == facts(whole)["effects"], at
        assert set(world.receiver.effects.values()) == {1}
        assert facts(world)["entries"] == facts(whole)["entries"], at
        deletes = [r.path for r in world.receiver.requests if r.method == "DELETE"]
        first_seen = list(dict.fromkeys(deletes))
        assert [p.split("/")[1] for p in first_seen] == ["pages"] * 7 + ["tickets"] * 9, "in reverse, killed or not"


words = st.sampled_from(["done", "done", "done", "refused", "later", "lost", "unheard"])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    script=st.dictionaries(st.tuples(st.sampled_from("abcdefgh"), st.integers(1, 6)), words),
    deaths=st.lists(st.tuples(st.integers(0, 30), st.booleans()), max_size=4),
    subjects=st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=14),
    chunk=st.integers(1, 5),
)
def test_any_receiver_and_any_deaths(
    tmp_path_factory: pytest.TempPathFactory,
    script: dict[tuple[str, int], str],
    deaths: list[tuple[int, bool]],
    subjects: list[str],
    chunk: int,
) -> None:
    """Whatever the receiver says and whenever the process dies: once it all settles, each effect is there at most once,
    the ledger agrees with the receiver, and nothing was guessed."""

    def say(request: Request, came: int) -> str:
        return script.get((request.body.decode()[len('{"subject":"')], came), "done")

    world = World(tmp_path_factory.mktemp("any"), receiver=ScriptedSender(say))
    rows = world.rows(subjects)
    lives = [Life(at, after) for at, after in deaths] + [Life() for _ in range(12)]
    ref: BatchRef | None = None
    for life in lives:
        try:
            ref = world.act([rows], life=life, chunk=chunk)
            break
        except SagaFailedError as error:
            ref = error.ref
            break
        except (AiProviderError, Died):
            continue
    assert ref, "after so many tries every answer has come"
    assert set(world.receiver.effects.values()) <= {1}
    states = {e.key: e.state for e in world.ledger.entries("p")}
    assert set(states.values()) <= {"done", "refused"}
    assert {k for k, s in states.items() if s == "done"} == set(world.receiver.effects)
    outcomes = world.outcomes(ref)
    assert [o["state"] for o in outcomes] == [states[o["key"]] for o in outcomes]
    assert len(outcomes) == len(subjects)
