"""How far sampling is."""

from __future__ import annotations

from hvtrain.progress import Bar


class StepsBar(Bar):
    """Counts the steps of all videos of this rank."""

    def __init__(self, total_steps: int, *, show: bool) -> None:
        super().__init__("sampling", total_steps, show=show, every_s=10.0)
        self.done, self.steps = 0, total_steps

    def step(self) -> None:
        self.done += 1
        self.update(
            self.done, f"{self.done}/{self.steps} steps",
            lambda _: f"sampling: step {self.done} of {self.steps}"
        )
