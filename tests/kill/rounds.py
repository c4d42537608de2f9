"""Start ingests, kill them, start them again: round after round, each moment chosen by a seed.

Invariants: a killed run is never forgotten, it is tried again under its own key until it has landed; what a task has
handed on is kept and handed to the next, as XCom does, and two tries of one task hand on the same; a process that ends
by anything but the kill, success, or an error that Airflow would retry, fails the whole story with its traceback.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from multiprocessing.context import ForkServerProcess
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from signal import SIGALRM, SIGKILL
from typing import Any

from tests.kill.traffic import PARTITIONS
from tests.kill.worker import BROKEN, CONFLICT, LATER, PIPELINE, STEPS, STEPS_OF, Aim, Errand, World, work
from tests.servers.kafka import KafkaBroker

# processes are forked from one that has imported everything and started nothing: a round takes a tenth of a second
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["tests.kill.worker"])
_DEADLINE_S = 120


@dataclass
class Tally:
    """What the rounds did; kills are told by task and step."""

    kills: Counter[tuple[str, str]] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    broker_kills: int = 0
    pairs: int = 0
    clears: int = 0
    seconds: dict[str, list[float]] = field(default_factory=dict)

    @property
    def kill_count(self) -> int:
        return sum(self.kills.values())

    def typical_s(self, task: str) -> float:
        """How long the task takes undisturbed."""
        return statistics.median(self.seconds.get(task, [0.3]))

    def __str__(self) -> str:
        tasks = {task: [step for step in STEPS if self.kills[task, step]] for task in STEPS_OF}
        told = [
            f"{task}: " + ", ".join(f"{step} {self.kills[task, step]}" for step in hit)
            for task, hit in tasks.items()
            if hit
        ]
        ends = ", ".join(f"{end} {count}" for end, count in sorted(self.ends.items()))
        typical = ", ".join(f"{task} {self.typical_s(task):.2f} s" for task in self.seconds)
        return (
            f"{self.kill_count} kills ({'; '.join(told)}); two shards at once: {self.pairs}; other ends: {ends}; "
            f"{self.clears} clears of landed runs; {self.broker_kills} kills of the broker; undisturbed: {typical}"
        )


@dataclass
class _Run:
    """How far a run has come: what its tasks have handed on.

    :param shards: into how many pieces its batch is cut; 1: one task does it all.
    """

    key: str
    shards: int
    planned: list[dict[str, Any]] = field(default_factory=list)
    parts: dict[int, dict[str, Any]] = field(default_factory=dict)
    landed: list[dict[str, Any]] = field(default_factory=list)

    def errands(self) -> list[Errand]:
        """The tasks that may run now."""
        if self.shards == 1:
            return [Errand(self.key)]
        if not self.planned:
            return [Errand(self.key, "plan", shards=self.shards)]
        missing = [ref for ref in self.planned if ref["shard"]["number"] not in self.parts]
        if missing:
            return [Errand(self.key, "shard", (ref,)) for ref in missing]
        return [Errand(self.key, "land", tuple(self.parts.values()))]

    def note(self, errand: Errand, told: list[dict[str, Any]]) -> None:
        """Keep what a task hands on; a second try of it must not hand on anything else."""
        if errand.task == "plan":
            # a plan that found nothing claims nothing, and the next try may find something
            claimed = [plan for plan in (self.planned, told) if plan and plan[0]["span"] is None]
            assert len(claimed) < 2 or claimed[0] == claimed[1], f"{self.key}: {claimed[0]}, then {claimed[1]}"
            self.planned = claimed[0] if claimed else told
        elif errand.task == "shard":
            known = self.parts.setdefault(errand.shard, told[0])
            # once its batch has landed, a shard has no mark any more
            assert known == told[0] or not (known["mark"] and told[0]["mark"]), f"{known}, then {told[0]}"
        elif told != self.landed:
            assert not self.landed or not self.landed[0]["counts"]["read"], f"{self.key}: {self.landed}, then {told}"
            self.landed = told

    def clear(self) -> None:
        """Forget what was handed on, as clearing all its tasks does."""
        self.planned, self.parts = [], {}


@dataclass
class _Try:
    """One process at work."""

    run: _Run
    errand: Errand
    process: ForkServerProcess
    step: Synchronized[int]
    answer: Path
    begun: float


class Rounds:
    """Kill ingests of one topic.

    :param world: where they work.
    :param seed: decides who is killed when, and who works beside whom.
    :param shards: into how many pieces a batch is cut at the most; 1: one task does it all.
    """

    def __init__(self, world: World, seed: int, shards: int = 1) -> None:
        self._world, self._chance, self._shards = world, random.Random(seed), shards
        self._waiting: list[_Run] = []
        self._over: list[_Run] = []
        self._count = 0
        self.run_keys: list[str] = []
        self.tally = Tally()

    def warm_up(self, count: int = 2) -> None:
        """Let some runs pass, to learn how long each task takes."""
        for _ in range(count):
            self._land(self._new_run(), is_timed=True)

    def kill(self, kills: int) -> None:
        """Go on until so many processes were killed."""
        while self.tally.kill_count < kills:
            # sometimes two at once: a killed task's zombie beside its successor, or two runs that plan the same rows
            run = self._next_run()
            beside = run if self._chance.random() < 0.5 else self._next_run()
            others = [self._start(beside, e) for e in beside.errands() if self._chance.random() < 0.2]
            self._strike(run)
            for one in others:
                self._end(one)

    def kill_broker(self, broker: KafkaBroker) -> None:
        """Kill the broker in the middle of a run, half of the time the run too, and start it again."""
        run = self._next_run()
        tries = [self._start(run, errand) for errand in run.errands()]
        time.sleep(self._chance.uniform(0, self.tally.typical_s(tries[0].errand.task)))
        broker.kill()
        self.tally.broker_kills += 1
        for one in tries:
            if self._chance.random() < 0.5:
                self._kill(one)
        broker.restart()
        for one in tries:
            self._end(one)

    def drain(self) -> None:
        """Let every run that waits land, then take what is left of the topic."""
        for run in [*self._waiting]:
            self._land(run)
        deadline = time.monotonic() + _DEADLINE_S
        while not self._is_drained():  # the last transaction's marker takes a moment to be seen
            assert time.monotonic() < deadline, "the topic is never drained"
            self._land(self._new_run())

    def _next_run(self) -> _Run:
        if self._waiting and self._chance.random() < 0.7:
            return self._chance.choice(self._waiting)
        if self._over and self._chance.random() < 0.15:
            run = self._chance.choice(self._over)
            run.clear()
            self.tally.clears += 1
            return run
        return self._new_run()

    def _new_run(self) -> _Run:
        self.run_keys.append(f"run-{len(self.run_keys)}")
        return _Run(self.run_keys[-1], self._chance.randint(2, self._shards) if self._shards > 1 else 1)

    def _start(self, run: _Run, errand: Errand, aim: Aim | None = None) -> _Try:
        self._count += 1
        errand = replace(errand, attempt=f"{self._count:06d}")
        answer = Path(self._world.faults).parent / f"answer-{self._count}"
        step = _PROCESSES.Value("i", 0, lock=False)
        process = _PROCESSES.Process(target=work, args=(self._world, errand, step, answer, aim), daemon=True)
        process.start()
        # typeshed knows only the kind of value with a lock
        return _Try(run, errand, process, step, answer, time.monotonic())  # type: ignore[arg-type]

    def _strike(self, run: _Run) -> None:
        """Start what the run has to do, and kill one process of it, sometimes two: at any moment of its time, or soon
        after it begins a step."""
        errands = run.errands()
        victims = set(self._chance.sample(range(len(errands)), min(len(errands), 1 + (self._chance.random() < 0.3))))
        self.tally.pairs += len(victims) > 1
        is_aimed = self._chance.random() < 0.5
        aims = {at: self._aim(errands[at]) for at in sorted(victims)} if is_aimed else {}
        tries = [self._start(run, errand, aims.get(at)) for at, errand in enumerate(errands)]
        if not is_aimed:
            time.sleep(self._chance.uniform(0, self.tally.typical_s(errands[0].task)))
            for at in victims:
                self._kill(tries[at])
        for one in tries:
            self._end(one)

    def _aim(self, errand: Errand) -> Aim:
        step = self._chance.choice(STEPS_OF[errand.task][1:-1])
        return Aim(step, self._chance.choice([0, 0.01]) * self._chance.random() ** 2)

    def _kill(self, one: _Try) -> None:
        one.process.kill()
        one.process.join(_DEADLINE_S)

    def _end(self, one: _Try) -> str:
        """Wait for a process and note how it ended."""
        one.process.join(_DEADLINE_S)
        code, run = one.process.exitcode, one.run
        assert code is not None, f"{one.errand} hangs at {STEPS[one.step.value]}"
        assert code != BROKEN, f"{one.errand}: {Path(self._world.faults).read_text()}"
        end = {
            0: "done",
            -SIGKILL: "killed",
            -SIGALRM: "killed",
            LATER: "to be retried",
            CONFLICT: "another was quicker",
        }[code]
        if end == "killed":
            self.tally.kills[one.errand.task, STEPS[one.step.value]] += 1
        else:
            self.tally.ends[end] += 1
        if end == "done":
            run.note(one.errand, json.loads(one.answer.read_text()))
        one.answer.unlink(missing_ok=True)
        is_over = end == "another was quicker" or (end == "done" and one.errand.task in ("ingest", "land"))
        for runs, belongs in ((self._waiting, not is_over), (self._over, end == "done" and is_over)):
            if run in runs and not belongs:
                runs.remove(run)
            elif belongs and run not in runs:
                runs.append(run)
        return end

    def _land(self, run: _Run, *, is_timed: bool = False) -> None:
        for _ in range(20):
            tries = [self._start(run, errand) for errand in run.errands()]
            ends = [self._end(one) for one in tries]
            if is_timed:
                taken = self.tally.seconds.setdefault(tries[0].errand.task, [])
                taken.append(time.monotonic() - tries[0].begun)
            if run not in self._waiting:
                return
            assert ends
        raise AssertionError(f"{run.key} never lands: {Path(self._world.faults).read_text()}")

    def _is_drained(self) -> bool:
        reader = self._world.reader()
        try:
            position = self._world.ledger().position(PIPELINE, reader.name, reader.identity())
            span = reader.plan(position, {}, None, None)
            return span.is_empty and not span.facts["waiting"] and len(position) == PARTITIONS
        finally:
            reader.close()
