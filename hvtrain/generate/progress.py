"""How far sampling is: a live bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

PLAIN_EVERY_S = 10.0


class Sampling:
    """Counts forward passes; registered as the model's forward hook, so that no sampler knows of it."""

    def __init__(self, total_steps: int, *, show: bool) -> None:
        self.total, self.show = total_steps, show
        self.done, self.per_pass, self.last = 0.0, 1.0, time.monotonic()
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

    def start(self, passes: int, *, steps: int) -> None:
        """The next `passes` forward passes are `steps` steps of the total."""
        self.per_pass = steps / passes

    def step(self, *_: object) -> None:
        self.done += self.per_pass
        if self.bar is not None:
            self.bar.update(self.task, completed=round(self.done))
        elif self.show and (time.monotonic() - self.last > PLAIN_EVERY_S or round(self.done, 6) >= self.total):
            self.last = time.monotonic()
            print(f"sampling: step {round(self.done)} of {self.total}", flush=True)
