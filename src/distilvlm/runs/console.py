"""What a person sees while a run works: a progress bar with time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from distilvlm.train import Update

CONSOLE = Console(stderr=True)
"""Log lines and progress share it, so that a line never cuts a bar in two."""

PLAIN_EVERY = 15.0
"""Seconds between plain lines: enough to see life in a log file, few enough to read it."""

WORTH_TELLING = 0.02
"""Share of the time waiting for data from which on more loader processes (machine.workers) would help."""


class Reporter(Protocol):
    """Follows one stage."""

    def begin(self, stage: str, done: int, updates: int) -> None: ...

    def update(self, update: Update) -> None: ...

    def end(self) -> None: ...


def reporter(console: Console | None) -> Reporter:
    """The reporter that suits `console`; None is silence (every process but the main one)."""
    if console is None:
        return _Silent()
    return _Bar(console) if console.is_terminal else _Lines(console)


def _terms(update: Update) -> str:
    values = [f"loss {update.loss:.4f}"]
    if len(update.terms) > 1:
        # Of each encoder its distance, behind their sum; what it counts is in the events.
        values += [
            f"{name.removeprefix('encoder.')} {value:.4f}"
            for name, value in update.terms.items()
            if not name.startswith("encoder_weight.")
        ]
    return "  ".join(values)


class _Silent:
    def begin(self, stage: str, done: int, updates: int) -> None: ...

    def update(self, update: Update) -> None: ...

    def end(self) -> None: ...


class _Bar:
    def __init__(self, console: Console) -> None:
        self._console = console

    def begin(self, stage: str, done: int, updates: int) -> None:
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[terms]}"),
            console=self._console,
        )
        self._task = self._progress.add_task(stage, total=updates, completed=done, terms="")
        self._progress.start()

    def update(self, update: Update) -> None:
        self._progress.update(self._task, completed=update.number, terms=_terms(update))

    def end(self) -> None:
        self._progress.stop()


class _Lines:
    def __init__(self, console: Console) -> None:
        self._console = console

    def begin(self, stage: str, done: int, updates: int) -> None:
        self._stage, self._updates, self._first = stage, updates, done
        self._started = self._last = time.monotonic()
        self._waited = 0.0

    def update(self, update: Update) -> None:
        now = time.monotonic()
        self._waited += update.wait
        if now - self._last < PLAIN_EVERY and update.number < self._updates:
            return
        self._last = now
        pace = (now - self._started) / (update.number - self._first)
        share = self._waited / max(1e-9, now - self._started)
        waiting = f"{share:.0%} waiting for data  " if share >= WORTH_TELLING else ""
        left = int(pace * (self._updates - update.number))
        self._console.print(
            f"{self._stage} {update.number}/{self._updates}  {_terms(update)}  "
            f"{pace:.2f} s/update  {waiting}{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left",
            highlight=False,
            soft_wrap=True,
        )

    def end(self) -> None: ...
