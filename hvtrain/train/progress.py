"""The live line on the terminal; plain lines now and then where there is no terminal."""

from __future__ import annotations

import math
import sys
import time

PLAIN_EVERY_S = 5.0


class ProgressLine:
    """Step, loss and time left. Shown by one rank."""

    def __init__(self, total: int, *, start: int, show: bool) -> None:
        self.total, self.show, self.bar, self.last = total, show, None, 0.0
        self.begun, self.start = time.monotonic(), start
        self.sum, self.weight = 0.0, 0.0  # of the losses so far, the newest counting most
        if show and sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self.bar = Progress(
                TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
            )
            self.task = self.bar.add_task("training", total=total, completed=start, text="")
            self.bar.start()

    def update(self, step: int, *, loss: float, lr: float, seconds: float) -> None:
        if not self.show:
            return
        if math.isfinite(loss):  # one bad step must not hide all later ones
            self.sum, self.weight = 0.95 * self.sum + loss, 0.95 * self.weight + 1.0
        average = f" (average {self.sum / self.weight:.4f})" if self.weight else ""
        text = f"loss {loss:.4f}{average}  lr {lr:.2e}  {seconds:.2f} s/step"
        if self.bar is not None:
            self.bar.update(self.task, completed=step, text=text)
        elif time.monotonic() - self.last >= PLAIN_EVERY_S or step == self.total:
            self.last = time.monotonic()
            left = (self.last - self.begun) / max(1, step - self.start) * (self.total - step)
            print(f"step {step}/{self.total}  {text}  {left:.0f} s left", flush=True)

    def note(self, text: str) -> None:
        if not self.show:
            return
        if self.bar is not None:
            self.bar.console.print(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
