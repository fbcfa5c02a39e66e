"""How far is a run? Told on standard error."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer


def say(line: str) -> None:
    typer.echo(line, err=True)


class Log:
    """Progress for a log: a line a tenth."""

    def __init__(self) -> None:
        self.tenth = 0

    say = staticmethod(say)

    def step(self, done: int, total: int) -> None:
        if done * 10 // total > self.tenth:
            self.tenth = done * 10 // total
            say(f"  {done:,} of {total:,} tokens")


class Bar:
    """Progress for a terminal."""

    def __init__(self, shown: Any) -> None:
        self.shown, self.task = shown, None

    def say(self, line: str) -> None:
        self.shown.console.print(line, markup=False, highlight=False)

    def step(self, done: int, total: int) -> None:
        if self.task is None:
            self.task = self.shown.add_task("tokens", total=total)
        self.shown.update(self.task, completed=done)


@contextmanager
def progress() -> Iterator[Log | Bar]:
    """A bar where a person looks on, else a log."""
    if not sys.stderr.isatty():
        yield Log()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        yield Bar(shown)
