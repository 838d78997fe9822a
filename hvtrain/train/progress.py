"""The live line of training: step, loss and time left."""

from __future__ import annotations

import math

from hvtrain.progress import Bar


def duration(seconds: float) -> str:
    """45 s, 12 min, 3 h 05 min"""
    minutes = round(seconds / 60)
    if minutes >= 100:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{minutes} min" if seconds >= 100 else f"{seconds:.0f} s"


class ProgressLine:
    """Shown by one rank."""

    def __init__(self, total: int, *, start: int, show: bool) -> None:
        self.total, self.start = total, start
        self.bar = Bar("training", total, done=start, show=show)
        self.note, self.close = self.bar.note, self.bar.close
        self.sum, self.weight = 0.0, 0.0  # of the losses so far, the newest counting most

    def update(self, step: int, *, loss: float, lr: float, seconds: float, speed: str = "") -> None:
        if math.isfinite(loss):  # one bad step must not hide all later ones
            self.sum, self.weight = 0.95 * self.sum + loss, 0.95 * self.weight + 1.0
        average = f" (average {self.sum / self.weight:.4f})" if self.weight else ""
        place, text = (
            f"{step}/{self.total}",
            f"loss {loss:.4f}{average}  lr {lr:.2e}  {seconds:.2f} s/step  {speed}".rstrip()
        )

        def log(since_s: float) -> str:
            left = since_s / max(1, step - self.start) * (self.total - step)
            return f"step {place}  {text}  {duration(left)} left"

        self.bar.update(step, f"{place}  {text}", log)
