"""Show what is going on: a living list on a terminal, one line per piece of news anywhere else.

Invariants: each stage is shown from its beginning, with the time it takes; a stage that fails says so.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn
from rich.text import Text


class Stage:
    """One stage of the story.

    :param screen: where it is shown.
    :param title: as the user sees it.
    """

    def __init__(self, screen: Screen, title: str) -> None:
        self.title = title
        self._screen = screen
        self._began = time.monotonic()
        self._news = ""
        self._task = screen.add(title)

    @property
    def seconds(self) -> float:
        """How long it has taken so far."""
        return time.monotonic() - self._began

    def note(self, news: str) -> None:
        """Say what is going on in it."""
        if news != self._news:
            self._news = news
            self._screen.show(self._task, self.title, news)

    def end(self, news: str = "", *, failed: bool = False, seconds: float | None = None) -> float:
        """Say that it is over and how it ended.

        :param seconds: how long it took, if somebody measured it better.
        :return: how long it took.
        """
        took = self.seconds if seconds is None else seconds
        self._screen.close(self._task, self.title, news or self._news, took, failed)
        return took


class Screen:
    """The terminal, or a log file.

    :param console: where to write.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._live: Progress | None = None
        if self.console.is_terminal:
            columns = [
                SpinnerColumn(finished_text=" "),
                TextColumn("{task.description}"),
                TextColumn("{task.fields[news]}"),
            ]
            self._live = Progress(*columns, console=self.console)

    def __enter__(self) -> Screen:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    @contextmanager
    def stage(self, title: str) -> Iterator[Stage]:
        """Show a stage for the length of the block."""
        stage = Stage(self, title)
        try:
            yield stage
        except BaseException:
            stage.end("failed", failed=True)
            raise
        stage.end()

    def task(self, title: str) -> Stage:
        """Show a stage that somebody else begins and ends."""
        return Stage(self, title)

    def add(self, title: str) -> TaskID | None:
        """Begin a line."""
        if self._live:
            return self._live.add_task(_padded(title), total=1, news="")
        self.console.print(Text(f"        {_padded(title)} ..."))
        return None

    def show(self, task: TaskID | None, title: str, news: str) -> None:
        """Change a line."""
        if self._live and task is not None:
            self._live.update(task, news=_short(news, self.console.width - 32))
        else:
            self.console.print(Text(f"        {_padded(title)} {news}"))

    def close(self, task: TaskID | None, title: str, news: str, took: float, failed: bool) -> None:
        """End a line."""
        mark = "✗" if failed else "✓"
        if self._live and task is not None:
            news = _short(news, self.console.width - 42)
            self._live.update(task, completed=1, description=f"{mark} {_padded(title)}", news=f"{took:6.1f} s  {news}")
        else:
            self.console.print(Text(f"{took:6.1f}s {mark} {_padded(title)} {news}"))


def _padded(title: str) -> str:
    return f"{title:<24}"


def _short(news: str, width: int) -> str:
    line = " ".join(news.split())
    return line if len(line) <= width else line[: max(width - 1, 0)] + "…"
