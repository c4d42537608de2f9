"""Start ingests, kill them, start them again: round after round, each moment chosen by a seed.

Invariants: a killed run is never forgotten, it is tried again under its own key until it has landed; a process that
ends by anything but the kill, success, or an error that Airflow would retry, fails the whole run with its traceback.
"""

from __future__ import annotations

import multiprocessing
import random
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from signal import SIGALRM, SIGKILL

from tests.kill.traffic import PARTITIONS
from tests.kill.worker import BROKEN, CONFLICT, LATER, PIPELINE, STEPS, Aim, World, work
from tests.servers.kafka import KafkaBroker

# processes are forked from one that has imported everything and started nothing: a round takes a tenth of a second
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["tests.kill.worker"])
_DEADLINE_S = 120


@dataclass
class Tally:
    """What the rounds did."""

    kills: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    broker_kills: int = 0
    seconds: list[float] = field(default_factory=list)

    @property
    def kill_count(self) -> int:
        return sum(self.kills.values())

    def __str__(self) -> str:
        steps = ", ".join(f"{step} {self.kills[step]}" for step in STEPS if self.kills[step])
        ends = ", ".join(f"{end} {count}" for end, count in sorted(self.ends.items()))
        typical = f"{statistics.median(self.seconds):.2f} s" if self.seconds else "none"
        return (
            f"{self.kill_count} kills ({steps}); other ends: {ends}; {self.broker_kills} kills of the broker; "
            f"an undisturbed ingest took {typical}"
        )


@dataclass
class _Try:
    """One process at work for one run key."""

    run_key: str
    process: ForkServerProcess
    step: Synchronized[int]


class Rounds:
    """Kill ingests of one topic.

    :param world: where they work.
    :param seed: decides who is killed when, and who works beside whom.
    """

    def __init__(self, world: World, seed: int) -> None:
        self._world, self._chance = world, random.Random(seed)
        self._waiting: list[str] = []
        self.run_keys: list[str] = []
        self.tally = Tally()

    def warm_up(self, count: int = 2) -> None:
        """Let some runs pass, to learn how long one takes."""
        for _ in range(count):
            begun = time.monotonic()
            self._end(self._start(self._new_key()))
            self.tally.seconds.append(time.monotonic() - begun)

    def kill(self, kills: int) -> None:
        """Go on until so many processes were killed."""
        while self.tally.kill_count < kills:
            # sometimes two at once: a killed task's zombie beside its successor, or two runs that plan the same rows
            others = [self._start(self._next_key()) for _ in range(self._chance.random() < 0.2)]
            key = others[0].run_key if others and self._chance.random() < 0.5 else self._next_key()
            self._strike(key)
            for one in others:
                self._end(one)

    def kill_broker(self, broker: KafkaBroker) -> None:
        """Kill the broker in the middle of a run, half of the time the run too, and start it again."""
        one = self._start(self._next_key())
        time.sleep(self._chance.uniform(0, self._typical_s))
        broker.kill()
        self.tally.broker_kills += 1
        if self._chance.random() < 0.5:
            self._kill(one)
        broker.restart()
        self._end(one)

    def drain(self) -> None:
        """Let every run that waits land, then take what is left of the topic."""
        for key in [*self._waiting]:
            self._land(key)
        deadline = time.monotonic() + _DEADLINE_S
        while not self._is_drained():  # the last transaction's marker takes a moment to be seen
            assert time.monotonic() < deadline, "the topic is never drained"
            self._land(self._new_key())

    @property
    def _typical_s(self) -> float:
        return statistics.median(self.tally.seconds)

    def _next_key(self) -> str:
        if self._waiting and self._chance.random() < 0.7:
            return self._chance.choice(self._waiting)
        return self._new_key()

    def _new_key(self) -> str:
        self.run_keys.append(f"run-{len(self.run_keys)}")
        return self.run_keys[-1]

    def _start(self, run_key: str, aim: Aim | None = None) -> _Try:
        step = _PROCESSES.Value("i", 0, lock=False)
        process = _PROCESSES.Process(target=work, args=(self._world, run_key, step, aim), daemon=True)
        process.start()
        return _Try(run_key, process, step)  # type: ignore[arg-type]  # typeshed knows only the kind with a lock

    def _strike(self, key: str) -> None:
        """Start a process and kill it at any moment of its time, or soon after it begins a step."""
        if self._chance.random() < 0.5:
            one = self._start(key)
            time.sleep(self._chance.uniform(0, self._typical_s))
            self._kill(one)
        else:
            step = self._chance.choice(STEPS[1:-1])
            one = self._start(key, Aim(step, self._chance.choice([0, 0.01]) * self._chance.random() ** 2))
        self._end(one)

    def _kill(self, one: _Try) -> None:
        one.process.kill()
        one.process.join(_DEADLINE_S)

    def _end(self, one: _Try) -> str:
        """Wait for a process and note how it ended."""
        one.process.join(_DEADLINE_S)
        code = one.process.exitcode
        assert code is not None, f"{one.run_key} hangs at {STEPS[one.step.value]}"
        faults = Path(self._world.faults)
        assert code != BROKEN, f"{one.run_key}: {faults.read_text()}"
        end = {
            0: "landed",
            -SIGKILL: "killed",
            -SIGALRM: "killed",
            LATER: "to be retried",
            CONFLICT: "another was quicker",
        }[code]
        if end == "killed":
            self.tally.kills[STEPS[one.step.value]] += 1
        else:
            self.tally.ends[end] += 1
        if end in ("landed", "another was quicker"):
            self._waiting = [key for key in self._waiting if key != one.run_key]
        elif one.run_key not in self._waiting:
            self._waiting.append(one.run_key)
        return end

    def _land(self, run_key: str) -> None:
        for _ in range(10):
            if self._end(self._start(run_key)) != "to be retried":
                return
        raise AssertionError(f"{run_key} never lands: {Path(self._world.faults).read_text()}")

    def _is_drained(self) -> bool:
        reader = self._world.reader()
        try:
            position = self._world.ledger().position(PIPELINE, reader.name, reader.identity())
            span = reader.plan(position, {}, None, None)
            return span.is_empty and not span.facts["waiting"] and len(position) == PARTITIONS
        finally:
            reader.close()
