"""The live line of training: step, loss and time left."""

from __future__ import annotations

import math

from hvtrain.progress import Bar


class ProgressLine:
    """Shown by one rank."""

    def __init__(self, total: int, *, start: int, show: bool) -> None:
        self.total, self.start = total, start
        self.bar = Bar("training", total, done=start, show=show)
        self.note, self.close = self.bar.note, self.bar.close
        self.sum, self.weight = 0.0, 0.0  # of the losses so far, the newest counting most

    def update(self, step: int, *, loss: float, lr: float, seconds: float) -> None:
        if math.isfinite(loss):  # one bad step must not hide all later ones
            self.sum, self.weight = 0.95 * self.sum + loss, 0.95 * self.weight + 1.0
        average = f" (average {self.sum / self.weight:.4f})" if self.weight else ""
        place, text = f"{step}/{self.total}", f"loss {loss:.4f}{average}  lr {lr:.2e}  {seconds:.2f} s/step"

        def log(since_s: float) -> str:
            left = since_s / max(1, step - self.start) * (self.total - step)
            return f"step {place}  {text}  {left:.0f} s left"

        self.bar.update(step, f"{place}  {text}", log)
