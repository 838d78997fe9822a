"""The errors that are a user's to mend. Each prints as one line and ends the program with exit code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HvtrainError(Exception):
    """A mistake in the input, not a bug: one line that says what was found, what is
    allowed and how to mend it."""


class ConfigError(HvtrainError):
    """A wrong key, value or combination of options."""


class DataError(HvtrainError):
    """A clip, caption or dataset file that cannot be used."""


class CheckpointError(HvtrainError):
    """A weights file or run directory that cannot be used."""


class LaunchError(HvtrainError):
    """A job that cannot be started."""


def suggest(name: str, choices: Iterable[str]) -> str:
    """The tail of an "unknown name" message: the nearest legal name, or the legal names."""
    names = sorted(choices)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if near:
        return f"did you mean '{near[0]}'?"
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return f"choose one of: {shown}"
