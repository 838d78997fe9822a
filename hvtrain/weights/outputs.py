"""Where results go: the folder is made, and a disk that does not take them is one line, not a traceback."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hvtrain.errors import ConfigError
from shards.atomic import clear_leftovers

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CLOSED = (
    errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG,
    errno.ELOOP
)


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Around everything that writes `path`: its folder is made and rid of what killed processes left there,
    and what the disk refuses is the user's to mend.

    Raises ConfigError for a full disk, a quota, a read-only file system, missing rights and a file where a
    folder should be. Other errors of the system pass: they are not about the place.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(PermissionError):  # another user's
            clear_leftovers(path.parent)
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise ConfigError(
                f"{path}: no room for it ({error.strerror}; {size_text(free_bytes(path.parent))} free); "
                "nothing half-written has its name: make room and run the same command again"
            ) from error
        if error.errno in _CLOSED:
            where = f": {error.filename}" if error.filename else ""
            raise ConfigError(
                f"{path}: cannot be written ({error.strerror}{where}); choose another place"
            ) from error
        raise


def check_place(path: str | Path) -> None:
    """Before long work: refuse a place that will not take the file in the end. Makes nothing."""
    path = Path(path)
    folder = next(p for p in path.absolute().parents if p.exists())
    if not folder.is_dir():
        raise ConfigError(
            f"{path} cannot be written: {folder} is a file, not a directory; choose another place"
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{path} cannot be written: {folder} is read-only, or not yours to write in; choose another place"
        )


def free_bytes(folder: Path) -> int:
    """What this user may still write there."""
    return shutil.disk_usage(folder).free


def disk_bytes(path: Path) -> int:
    """What the disk gets back when this name goes: nothing, if the file has another name too."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return 0
    return status.st_blocks * 512 if status.st_nlink == 1 else 0


def size_text(n_bytes: float) -> str:
    """12.3 GB, 4.5 MB, 6.7 kB: in the unit that shows something."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= size:
            return f"{n_bytes / size:.1f} {unit}"
    return f"{n_bytes:.0f} bytes"
