"""``python -m demo`` tells the whole story and leaves the servers up to be looked at; ``python -m demo stop`` ends it.

Invariants: one demo at a time per folder; whatever goes wrong, what cannot be used any more is stopped; the exit status
is 0 only when every count adds up and agrees with the truth.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO

from airflow_ai_provider.errors import AiProviderError
from demo.screen import Screen
from demo.services import stop_all
from demo.world import PROJECT, World


def main() -> int:
    """Run the command line."""
    given = _arguments()
    folder = given.folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    # A demo that runs inside an activated Airflow installation must not read its settings.
    for name in [name for name in os.environ if name.startswith(("AIRFLOW_", "MLFLOW_"))]:
        del os.environ[name]
    os.environ |= {"DO_NOT_TRACK": "true", "GX_ANALYTICS_ENABLED": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    return _stop(folder) if given.command == "stop" else _run(folder, given.kafka)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m demo",
        description="Tumour triage, end to end: biopsies from Kafka, validated, predicted, routed, reviewed, acted on.",
    )
    parser.add_argument("command", nargs="?", choices=("run", "stop"), default="run")
    parser.add_argument(
        "--kafka",
        default=os.environ.get("KAFKA", ""),
        metavar="HOST:PORT",
        help="use this broker instead of an embedded one (or set the variable KAFKA)",
    )
    parser.add_argument(
        "--folder", type=Path, default=PROJECT / "build" / "demo", help="takes all state (default: build/demo)"
    )
    return parser.parse_args()


def _run(folder: Path, kafka: str) -> int:
    signal.signal(signal.SIGTERM, _interrupt)
    screen = Screen()
    with _alone(folder) as lock:
        if lock is None:
            print(f"A demo is running in {folder}. Wait for it, or end it with  make stop", file=sys.stderr)
            return 1
        stop_all(folder)
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
        try:
            return _tell(folder, kafka, screen)
        except KeyboardInterrupt:
            print("\nInterrupted.", file=sys.stderr)
            status = 130
        except AiProviderError as error:
            print(f"\nThe demo failed: {error}", file=sys.stderr)
            status = 1
        except BaseException:
            stop_all(folder)
            raise
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # impatience must not leave half of them running
        print(f"Stopped {stop_all(folder)} processes. What they wrote is in {folder}", file=sys.stderr)
        return status


def _tell(folder: Path, kafka: str, screen: Screen) -> int:
    from demo.report import Report
    from demo.story import Story

    began = time.monotonic()
    world = World(folder, kafka)
    with screen:
        told = Story(world, screen).tell()
        with screen.stage("check and draw") as stage:
            told.seconds["total"] = round(time.monotonic() - began, 2)
            report = Report(world, told)
            report.write()
            stage.note(f"wrote {folder / 'summary.json'}")
    report.show(screen.console)
    return 1 if report.faults else 0


def _stop(folder: Path) -> int:
    with _alone(folder) as lock:
        if lock is not None:
            print(f"Stopped {stop_all(folder)} processes.")
            return 0
    pid = int(_lock_file(folder).read_text() or 0)
    print(f"A demo is still at work (process {pid}): interrupting it.")
    os.kill(pid, signal.SIGTERM)
    for _ in range(600):
        with _alone(folder) as lock:
            if lock is not None:
                stop_all(folder)
                return 0
        time.sleep(0.1)
    print(f"It does not end. Look at it with  ps -fp {pid}", file=sys.stderr)
    return 1


def _lock_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


@contextmanager
def _alone(folder: Path) -> Iterator[IO[str] | None]:
    """Hold the folder's lock for the length of the block, or give None when another process holds it."""
    with _lock_file(folder).open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield lock


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
