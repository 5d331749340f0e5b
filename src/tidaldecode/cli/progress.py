"""What a terminal shows while something is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

OnProgress = Callable[[int, int, str], None]
"""Told how many parts of how many are done, 0 of 0 where nothing is counted, and in words what comes next, if that is
waited for."""


@contextmanager
def progress(console: Console) -> Iterator[OnProgress]:
    """What is being waited for; a bar with the time left, where parts are counted. Both go away when they are done."""
    columns: list[Any] = [TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn()]
    columns += [TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()]
    bar = Progress(*columns, console=console, transient=True, speed_estimate_period=3600)
    status = console.status("starting")

    def show(done: int, total: int, what: str) -> None:
        if total:
            status.stop()
            if not bar.tasks:
                bar.add_task(what)
            bar.update(bar.task_ids[0], completed=done, total=total, description=what)
            bar.start()
        elif what:
            status.update(Text(what))
            status.start()
        else:
            status.stop()

    status.start()
    try:
        yield show
    finally:
        status.stop()
        if bar.tasks:
            bar.stop()
