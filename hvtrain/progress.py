"""How far a long job is: a bar on a terminal that is always up to date, elsewhere a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO, TypeVar

B = TypeVar("B", bound="Bar")


class Bar:
    """Shown by one rank. `total` None: nobody knows. Where there is no terminal, a line
    every `every_s` and at the end."""

    def __init__(
        self, label: str, total: float | None, *, done: int = 0, show: bool = True, to: TextIO | None = None,
        every_s: float = 5.0,
    ) -> None:
        to = to or sys.stdout
        self.total, self.show, self.to, self.every_s = total, show, to, every_s
        self.begun = self.last = time.monotonic()
        self.live = None
        if show and to.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = TextColumn(label), BarColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn()
            self.live = Progress(*columns, console=Console(file=to))
            self.task = self.live.add_task(label, total=total, completed=done, text="")
            self.live.start()

    def __enter__(self: B) -> B:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, done: float, text: str, log: Callable[[float], str] | None = None) -> None:
        """`text` stands beside the bar; log(seconds since the beginning) is a line of
        its own where there is none."""
        if self.live is not None:
            self.live.update(self.task, completed=done, text=text)
        elif self.show and log is not None:
            now = time.monotonic()
            if now - self.last >= self.every_s or done == self.total:
                self.last = now
                print(log(now - self.begun), file=self.to, flush=True)

    def note(self, text: str) -> None:
        """A line that stays."""
        if self.live is not None:
            self.live.console.print(text)
        elif self.show:
            print(text, file=self.to, flush=True)

    def close(self) -> None:
        if self.live is not None:
            self.live.stop()
