"""Stopping in time: a signal sets a flag, all ranks agree on it at the end of a step, save, and leave together."""

from __future__ import annotations

import signal
from types import FrameType

from hvtrain.parallel.context import ParallelContext
from hvtrain.signals import SIGNALS, arrived

REQUEUE = 75  # EX_TEMPFAIL: "start me again", for the scheduler


class StopFlag:
    """Catches SIGTERM and SIGUSR1 while it is entered."""

    def __init__(self) -> None:
        self.raised = arrived()
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopFlag:
        self._before = {number: signal.signal(number, self._raise) for number in SIGNALS}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _raise(self, number: int, frame: FrameType | None) -> None:
        self.raised = True

    def agreed(self, ctx: ParallelContext) -> bool:
        """Whether any rank was signalled; the same answer everywhere. Collective."""
        return ctx.any(self.raised)
