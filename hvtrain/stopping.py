"""SIGTERM and SIGUSR1 that arrive before training can act on them: remembered, not deadly."""

from __future__ import annotations

import os
import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_early: list[int] = []


def remember() -> None:
    """From now on these signals only leave a note. A run that is still loading saves and leaves at its first step's end."""
    for number in SIGNALS:
        signal.signal(number, _note)


def leave(code: int) -> None:
    """From now on these signals end the process at once, with this code: for work that a re-run continues anyway."""
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: os._exit(code))


def obey() -> None:
    """From now on these signals end the process, as they do by default."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def _note(number: int, frame: FrameType | None) -> None:
    _early.append(number)


def arrived() -> bool:
    """Whether one came; asking forgets it."""
    found = bool(_early)
    _early.clear()
    return found
