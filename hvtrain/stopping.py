"""Stopping in time: a signal or a file sets a flag; all ranks agree at a step's
end, save, and leave together.

No torch here: the launcher uses it before it is loaded, for signals that arrive that early.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hvtrain.parallel.context import ParallelContext

REQUEUE = 75  # exit code (EX_TEMPFAIL): saved as asked to; "start me again", for the scheduler
SAVE, QUIT = "save", "quit"  # files that a user may touch in a run's directory
_early: list[int] = []


def signals() -> list[int]:
    """Those that ask to stop. A terminal that closes is one, unless nohup said that it is of no concern."""
    unheard = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGUSR1, *([] if unheard else [signal.SIGHUP])]


def remember() -> None:
    """From now on these signals only leave a note: who still loads saves and
    leaves at the first step's end."""
    for number in signals():
        signal.signal(number, _note)


def leave(code: int) -> None:
    """From now on they end the process at once, with this code: for work that a re-run continues anyway."""
    for number in signals():
        signal.signal(number, lambda number, frame: os._exit(code))


def obey() -> None:
    """From now on they end the process, as they do by default."""
    for number in signals():
        signal.signal(number, signal.SIG_DFL)


def _note(number: int, frame: FrameType | None) -> None:
    _early.append(number)


def arrived() -> bool:
    """Whether one came; asking forgets it."""
    found = bool(_early)
    _early.clear()
    return found


class StopFlag:
    """Hears these signals and the first Ctrl-C while it is entered, and looks for the files `save` and `quit`
    in `folder`. A second Ctrl-C is a KeyboardInterrupt, as ever."""

    def __init__(self, folder: Path | None = None, *, show: bool = False) -> None:
        self.raised, self.folder, self.show = arrived(), folder, show
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopFlag:
        self._before = {number: signal.signal(number, self._raise) for number in signals()}
        self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _raise(self, number: int, frame: FrameType | None) -> None:
        self.raised = True

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.raised = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.show:  # not print: it may be what was interrupted
            with suppress(OSError):  # the same Ctrl-C ended who was reading: `2>&1 | tee log`
                os.write(2, b"\nsaving after this step; Ctrl-C again ends at once, without saving\n")

    def agreed(self, ctx: ParallelContext) -> bool:
        """Whether any rank was signalled, or the file `quit` is there; the same everywhere. Collective."""
        return ctx.any(self.raised or self._taken(QUIT, ctx))

    def asked_to_save(self, ctx: ParallelContext) -> bool:
        """Whether the file `save` is there; the same answer everywhere. Collective."""
        return ctx.any(self._taken(SAVE, ctx))

    def _taken(self, name: str, ctx: ParallelContext) -> bool:
        """A file counts once: it is removed. Only rank 0 looks."""
        if self.folder is None or not ctx.is_main:
            return False
        try:
            (self.folder / name).unlink()
        except OSError:
            return False
        return True
