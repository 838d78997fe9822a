"""Files that appear whole or not at all, and what a kill leaves of them."""

from __future__ import annotations

import hashlib
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

_TEMPORARY = re.compile(r"\..+\.([0-9a-f]{8})-([1-9][0-9]{0,9})-[0-9a-f]{8}\.tmp")
_NAME_BYTES = 200  # of a temporary name that are the final name's; the file system allows 255 in all


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A new empty file beside `path`, to be written; on success it is fsynced and renamed to
    `path`, on failure removed."""
    final = Path(path)
    temporary, handle = create_temporary(final)
    os.close(handle)
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, final)
    except BaseException:
        with suppress(OSError):  # the first error is the one to hear of
            temporary.unlink(missing_ok=True)
        raise
    sync(final.parent)


def write_text(path: str | Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def create_temporary(final: Path) -> tuple[Path, int]:
    """.NAME.HOST-PID-RANDOM.tmp beside `final`, and its handle for writing. Never through a link,
    never a file that was there."""
    name = os.fsdecode(os.fsencode(final.name)[:_NAME_BYTES])
    temporary = final.with_name(f".{name}.{_host()}-{os.getpid()}-{os.urandom(4).hex()}.tmp")
    return (
        temporary,
        os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    )


def no_links(path: str, flags: int) -> int:
    """For `open(..., opener=no_links)`: a link under a name that others can foresee is an
    OSError, not somebody's file."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def clear_leftovers(folder: str | Path) -> list[Path]:
    """Remove the temporaries of killed processes from a folder (not below it); returns which.

    Only names that `create_temporary` gives, of this host, whose process is gone: other hosts' may be at
    work.
    """
    removed = []
    with os.scandir(folder) as entries:
        for entry in entries:
            made = _TEMPORARY.fullmatch(entry.name)
            if (
                made and made[1] == _host() and not entry.is_dir(follow_symlinks=False)
                and not _alive(int(made[2]))
            ):
                with suppress(FileNotFoundError):  # another rank clears too
                    os.unlink(entry.path)
                    removed.append(Path(entry.path))
    return removed


def sync(path: Path) -> None:
    """Flush a file or directory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@cache
def _host() -> str:
    """Where a PID means something: the machine and, in a container, its own processes."""
    return hashlib.sha256(
        f"{socket.gethostname()}/{os.readlink('/proc/self/ns/pid')}".encode()
    ).hexdigest()[:8]


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's; no PID at all, so not our name
        return True
    return True
