"""How far sampling is: a live bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

PLAIN_EVERY_S = 10.0


class Sampling:
    """Counts the steps of all videos of this rank."""

    def __init__(self, total_steps: int, *, show: bool) -> None:
        self.total, self.show = total_steps, show
        self.done, self.last = 0, time.monotonic()
        self.bar: Any = None

    def __enter__(self) -> Sampling:
        if self.show and sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self.bar = Progress(
                TextColumn("sampling"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"), TimeRemainingColumn()
            )
            self.task = self.bar.add_task("sampling", total=self.total)
            self.bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def step(self) -> None:
        self.done += 1
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done)
        elif self.show and (time.monotonic() - self.last > PLAIN_EVERY_S or self.done >= self.total):
            self.last = time.monotonic()
            print(f"sampling: step {self.done} of {self.total}", flush=True)
