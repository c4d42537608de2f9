"""Run one case: every contender in a fresh process of its own, in turns, checked before it is timed.

Invariants: a contender imports, loads and warms up in its own process, so one does not disturb another's threads or
memory; rounds are interleaved (A B C, A B C, …), so that a noisy minute hits all; outputs are proved right before the
first timed round; a figure is a median of five rounds or more, a ratio compares medians of the same run.

A case is a module ``benchmarks/cases/<name>.py`` with a ``CASE``; it needs nothing else to be found. Every contender's
opener and the case's ``make`` and ``check`` are module-level functions: they are called in other processes.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import multiprocessing
import os
import pkgutil
import platform
import resource
import shutil
import signal
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "RESULTS.md"
BUILD = ROOT / "build" / "bench"
_PR_SET_PDEATHSIG = 1
_DEADLINE_S = 1800


@dataclass(frozen=True)
class Place:
    """Where a case's processes meet: a temporary folder, and the size of the work."""

    folder: Path
    size: int


Run = Callable[[], float | None]
"""Do the work once. Return seconds measured by the run itself, or None to have the whole call measured."""


@dataclass(frozen=True)
class Case:
    """One measurement.

    :param title: what is done, in one line.
    :param unit: ``s`` (a time: less is better), or ``rows/s``, ``messages/s`` … (size over time: more is better).
    :param sizes: full and quick size.
    :param size_unit: what the size counts.
    :param goal: what is aimed at, as text.
    :param make: writes the input into the place's folder.
    :param check: raises AssertionError when what the contenders' first runs left in the folder is wrong.
    :param contenders: openers by name: ``limit``, ``ours``, then one per neighbour. An opener loads what it needs and
        returns the run.
    :param packages: whose versions are recorded, of those that are installed.
    :param missing: why it cannot be run here at full size; empty when it can.
    """

    title: str
    unit: str
    sizes: tuple[int, int]
    size_unit: str
    goal: str
    make: Callable[[Place], None]
    check: Callable[[Place], None]
    contenders: Mapping[str, Callable[[Place], Run]]
    packages: tuple[str, ...] = ()
    missing: Callable[[], str] = str


@dataclass
class Timing:
    """What one contender took."""

    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    peak_mb: float = 0.0

    def value(self, case: Case, size: int) -> float:
        """Return the median in the case's unit."""
        median = statistics.median(self.seconds)
        return median if case.unit == "s" else size / median


def case_names() -> list[str]:
    """Return the cases that lie in ``benchmarks/cases``."""
    import benchmarks.cases

    return sorted(module.name.upper() for module in pkgutil.iter_modules(benchmarks.cases.__path__))


def load_case(name: str) -> Case:
    """Return a case by its name."""
    case: Case = importlib.import_module(f"benchmarks.cases.{name.lower()}").CASE
    return case


def run_case(name: str, *, quick: bool, rounds: int = 5) -> bool:
    """Run a case, print and record it.

    :return: False when a contender failed or an output is wrong; a case that cannot be run here says why.
    """
    case = load_case(name)
    size = case.sizes[1 if quick else 0]
    print(f"\n{name}: {case.title} ({size:,} {case.size_unit})", flush=True)
    if not quick and case.missing():
        print(f"  not run: {case.missing()}")
        return True
    place = Place(Path(tempfile.mkdtemp(prefix=f"bench-{name.lower()}-")), size)
    load = os.getloadavg()[0]
    try:
        _apart(name, "make", place)
        timings = _rounds(name, case, place, rounds)
    except ContenderError as error:
        print(f"  {name} FAILED\n{error}")
        return False
    finally:
        shutil.rmtree(place.folder, ignore_errors=True)
    found = _found(name, case, size, timings) | {"machine": machine(load), "versions": versions(case.packages)}
    _record(case, found, timings, quick)
    return True


class ContenderError(Exception):
    """A process of the case failed; the text is its traceback."""


def _rounds(name: str, case: Case, place: Place, rounds: int) -> dict[str, Timing]:
    processes = {contender: _Process(name, contender, place) for contender in case.contenders}
    try:
        for process in processes.values():
            process.ask("warm")
        _apart(name, "check", place)
        print("  outputs are right; timing", flush=True)
        timings = {contender: Timing() for contender in processes}
        for _ in range(rounds):
            for contender, process in processes.items():
                seconds, cpu = process.ask("run")
                timings[contender].seconds.append(seconds)
                timings[contender].cpu.append(cpu)
        for contender, process in processes.items():
            timings[contender].peak_mb = process.ask("peak")[0]
        return timings
    finally:
        for process in processes.values():
            process.close()


def _apart(name: str, step: str, place: Place) -> None:
    """Do a step of the case in a process that ends before the next."""
    process = _Process(name, "", place)
    try:
        process.ask(step)
    finally:
        process.close()


class _Process:
    """One contender in its process, driven by short messages."""

    def __init__(self, name: str, contender: str, place: Place) -> None:
        # spawn: a fresh interpreter, as a task gets it; and ru_maxrss starts from nothing big
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._who = f"{name} {contender}".strip()
        self._process = context.Process(target=_serve, args=(theirs, name, contender, place))
        self._process.start()
        theirs.close()

    def ask(self, what: str) -> tuple[float, float]:
        self._pipe.send(what)
        try:
            if not self._pipe.poll(_DEADLINE_S):
                raise ContenderError(f"{self._who} took more than {_DEADLINE_S} s to {what}")
            answer = self._pipe.recv()
        except EOFError:
            self._process.join(10)
            raise ContenderError(f"{self._who} ended with {self._process.exitcode} in {what}") from None
        if isinstance(answer, str):
            raise ContenderError(f"{self._who}, {what}:\n{answer}")
        return float(answer[0]), float(answer[1])

    def close(self) -> None:
        self._pipe.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _serve(pipe: Any, name: str, contender: str, place: Place) -> None:
    """Answer until the other side hangs up."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    state: dict[str, Any] = {}
    while True:
        try:
            what = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(_do(what, load_case(name), contender, place, state))
        except BaseException:
            pipe.send(traceback.format_exc())


def _do(what: str, case: Case, contender: str, place: Place, state: dict[str, Any]) -> tuple[float, float]:
    if what in ("make", "check"):
        (case.make if what == "make" else case.check)(place)
        return 0.0, 0.0
    if what == "peak":
        return _peak_mb(), 0
    if what == "warm":
        state["run"] = case.contenders[contender](place)
    cpu, started = _cpu(), time.perf_counter()
    own = state["run"]()
    spent = time.perf_counter() - started
    return (spent if own is None else own), _cpu() - cpu


def _cpu() -> float:
    """Processor seconds of this process and of all below it, those that have ended too."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    below = [time for process in _below() for time in process.cpu_times()[:4]]  # and those that it waited for
    return sum(each.ru_utime + each.ru_stime for each in used) + sum(below)


def _peak_mb() -> float:
    """What the largest of this process and of all below it held at most."""
    ended = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    status = [Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8") for process in _below()]
    return max(*ended, *(int(text.partition("VmHWM:")[2].split()[0]) for text in status)) / 1024


def _below() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


# --- recording ---


def _found(name: str, case: Case, size: int, timings: Mapping[str, Timing]) -> dict[str, Any]:
    def shown(contender: str) -> dict[str, Any]:
        return {"value": round(timings[contender].value(case, size), 4), "unit": case.unit}

    limit, ours = (timings[who].value(case, size) for who in ("limit", "ours"))
    return {
        "case": name,
        "size": size,
        "limit": shown("limit"),
        "ours": shown("ours"),
        "peer": {who: shown(who) for who in timings if who not in ("limit", "ours")},
        "ratio": round(ours / limit, 3),
        "goal": case.goal,
        "peak_mb": round(timings["ours"].peak_mb),
    }


def _record(case: Case, found: Mapping[str, Any], timings: Mapping[str, Timing], quick: bool) -> None:
    BUILD.mkdir(parents=True, exist_ok=True)
    (BUILD / f"{found['case']}.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    text = table(case, found, timings)
    print(text)
    if not quick:
        before = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else _HEAD
        RESULTS.write_text(f"{before.rstrip()}\n\n{text}", encoding="utf-8")


_HEAD = """# Results

Appended by `python -m benchmarks` at full size. Machines differ: read the ratios, each measured within one run against
a limit of the same run (median of the rounds; every contender in a process of its own, in turns).
"""


def table(case: Case, found: Mapping[str, Any], timings: Mapping[str, Timing]) -> str:
    """Write what was found as a Markdown section."""
    size, limit = int(found["size"]), timings["limit"].value(case, int(found["size"]))
    lines = [
        f"## {found['case']} · {case.title}",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, {size:,} {case.size_unit}, {len(timings['ours'].seconds)} rounds. "
        f"Ratio **{found['ratio']}**, goal {case.goal}.",
        "",
        f"| | {case.unit} | of the limit | fastest … slowest, s | processor s | peak MB |",
        "|---|---|---|---|---|---|",
    ]
    for who, timing in timings.items():
        value = timing.value(case, size)
        number = f"{value:.3f}" if case.unit == "s" else f"{value:,.0f}"
        spread = f"{min(timing.seconds):.3f} … {max(timing.seconds):.3f}"
        cpu = statistics.median(timing.cpu)
        lines.append(f"| {who} | {number} | {value / limit:.2f} | {spread} | {cpu:.2f} | {timing.peak_mb:,.0f} |")
    facts = found["machine"]
    packages = ", ".join(f"{package} {version}" for package, version in found["versions"].items())
    lines += [
        "",
        f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_gb']} GB, load {facts['load']} at the start;",
        f"{packages}.",
        "",
    ]
    return "\n".join(lines)


def machine(load: float) -> dict[str, Any]:
    """Describe the machine without naming it."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(memory / 2**30),
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "load": round(load, 1),
    }


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Return the versions of Python and of the packages that a case names, of those that are installed."""
    installed = [package for package in packages if next(metadata.distributions(name=package), None)]
    return {"python": platform.python_version(), **{package: metadata.version(package) for package in installed}}
