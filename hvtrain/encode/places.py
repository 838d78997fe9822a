"""Where the paths in a user's file point, and how names of any bytes are printed."""

from __future__ import annotations

import os
import reprlib
from pathlib import Path
from typing import Any

from hvtrain.errors import DataError

_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = _BRIEF.maxlong = 80
_BRIEF.maxlevel = 3


def place(name: str, beside: Path) -> Path:
    """The absolute path that `name` means in a file that lies in the folder `beside`.

    A relative one counts from that folder; where nothing has that name there, from the working directory, as
    in musubi-tuner. One that begins with a dot counts from the folder alone. A DataError if there is nothing
    at either place, or something else at each.
    """
    sound(name)
    if not name:
        raise DataError("'' is no path")
    dotted = os.path.isabs(name) or name.startswith(".")
    tried = list(
        dict.fromkeys(map(_absolute, [beside / name] if dotted else [beside / name, Path.cwd() / name]))
    )
    found = {p: status for p in tried if (status := _status(p)) is not None}
    if not found:
        looked = "" if os.path.isabs(name) else f" (looked for {' and '.join(map(shown, tried))})"
        raise DataError(f"'{shown(name)}' does not exist{looked}")
    if len(found) == 2 and not os.path.samestat(*found.values()):
        raise DataError(
            f"'{shown(name)}' could be {shown(tried[0])} or {shown(tried[1])}; give the whole path"
        )
    return next(iter(found))


def shown(name: str | Path) -> str:
    """A name on one line that any terminal can print: control characters and bytes
    that are not UTF-8 are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(name))


def brief(value: Any) -> str:
    """A value that a user gave, of any type and depth, in few letters."""
    try:
        return _BRIEF.repr(value)
    except ValueError:  # a whole number of more digits than Python prints
        return f"a {type(value).__name__} of enormous size"


def sound(name: str | Path) -> None:
    """A DataError for a name that cannot be written down as UTF-8: shard sets
    keep where a sample came from."""
    try:
        str(name).encode()
    except UnicodeEncodeError:
        raise DataError(f"'{shown(name)}' is not valid Unicode; rename it") from None


def _absolute(path: Path) -> Path:
    """A link keeps its own name, unless `..` has to be followed through links."""
    try:
        return path.resolve() if ".." in path.parts else Path(os.path.abspath(path))
    # RuntimeError: a circle of links, before Python 3.13
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"'{shown(path)}' cannot be looked up ({shown(str(error))})") from None


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # too long, a zero byte, not allowed
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise DataError(f"'{shown(path)[:200]}' cannot be looked up ({reason})") from None
