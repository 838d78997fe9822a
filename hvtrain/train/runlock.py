"""One process group per run directory: a lock that the kernel drops when its holder dies, and
a heartbeat for other machines.

`FOLDER/.lock` says who holds it (process, host, since when). On one machine flock decides: it ends with the
process, however that ends. Between machines flock may hold nothing (some network file systems keep it per
node), and after a node was lost its processes may live on. The holder therefore touches the file every BEAT_S
seconds; whoever comes later from another machine watches for WATCH_S whether it still does. Clocks are never
compared. A holder that was stopped so long that another took the directory finds that out by its next save
(`check`) and writes nothing more.

No torch here: `slices` and the launcher may use it.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from hvtrain.errors import LaunchError

NAME = ".lock"
BEAT_S = 5.0
WATCH_S = 18.0  # three beats and what a network file system may keep back
WAIT_S = 10.0  # for a run that is just ending
REQUEUED_WAIT_S = 120.0  # a job that was started again: its first life may still be saving


class Busy(LaunchError):
    """Another process holds the directory."""


@dataclass(frozen=True)
class Holder:
    """Who has it."""

    host: str
    pid: int
    since: float  # wall time
    job: str  # of Slurm, or ""
    token: str  # tells two holders apart whatever the rest says

    @classmethod
    def me(cls, job: str = "") -> Holder:
        return cls(socket.gethostname(), os.getpid(), time.time(), job, secrets.token_hex(8))

    def describe(self) -> str:
        since = datetime.fromtimestamp(self.since).isoformat(" ", "seconds")
        return f"process {self.pid} on {self.host} since {since}" + (
            f" (Slurm job {self.job})" if self.job else ""
        )


class RunLock:
    """Holds `folder` from `acquire` to `release`, or to the end of the process. `key` is the option that
    names the folder, `job` the Slurm job that asks."""

    def __init__(self, folder: str | Path, *, key: str = "run.output_dir", job: str = "") -> None:
        self.path, self.key, self.job = Path(folder) / NAME, key, job
        self._me: Holder | None = None
        self._handle: int | None = None
        self._end = threading.Event()
        self._beating: threading.Thread | None = None
        self._taken_by: Holder | None = None
        self.left_by: Holder | None = None  # who held it before and died

    def acquire(self, wait_s: float) -> RunLock:
        """Raises Busy, naming the holder, when it is still held after `wait_s`."""
        deadline, told = time.monotonic() + wait_s, False
        while not self._try():
            if time.monotonic() >= deadline:
                raise Busy(
                    f"{self.key}: {self.path.parent} is in use by {self._holder()}; wait for it, stop it, or "
                    "choose another directory"
                )
            if not told:
                said = f"{self.path.parent} is in use by {self._holder()}; waiting {wait_s:.0f} s for it"
                print(said, file=sys.stderr, flush=True)
                told = True
            time.sleep(0.2)
        self._beating = threading.Thread(target=self._beat, name="hvtrain-lock", daemon=True)
        self._beating.start()
        return self

    def check(self) -> None:
        """Before something is written. Raises Busy if another run has taken the directory meanwhile."""
        if self._taken_by is None and self._me is not None:
            self._look()
        if self._taken_by is not None:
            raise Busy(
                f"{self.key}: {self.path.parent} was taken over by {self._taken_by.describe()} while this "
                "process stood still; nothing more is written here"
            )

    def release(self) -> None:
        if self._handle is None:
            return
        self._end.set()
        if self._beating is not None:
            self._beating.join()
        if self._taken_by is None and _same_file(self._handle, self.path):
            self.path.unlink(missing_ok=True)
        os.close(self._handle)
        self._handle = self._me = None

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()

    # --- taking it ------------------------------------------------------------------------------------------

    def _try(self) -> bool:
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            taken = self._take(handle)
        except BaseException:
            os.close(handle)
            raise
        if taken:
            self._handle = handle
        else:
            os.close(handle)
        return taken

    def _take(self, handle: int) -> bool:
        kernel = _flock(handle)
        # the other has just removed it: not the lock any more
        if kernel is False or not _same_file(handle, self.path):
            return False
        before = _read(self.path)
        decided = kernel is True and (before is None or before.host == socket.gethostname())
        if not decided and before is not None and _moves(self.path):
            return False
        me = Holder.me(self.job)
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(asdict(me)).encode(), 0)
        os.fsync(handle)
        if not decided:  # where flock says nothing, two may come at once: the last to write has it
            time.sleep(1.0)
            found = _read(self.path)
            if found is None or found.token != me.token:
                return False
        self._me, self.left_by = me, before
        return True

    def _holder(self) -> str:
        found = _read(self.path)
        return found.describe() if found else "another process"

    # --- keeping it -----------------------------------------------------------------------------------------

    def _beat(self) -> None:
        while not self._end.wait(BEAT_S):
            self._look()
            if self._taken_by is not None:
                return
            with suppress(OSError):  # the file system is away for a moment, or the directory was removed
                os.utime(self.path)

    def _look(self) -> None:
        found = _read(self.path)
        if found is not None and self._me is not None and found.token != self._me.token:
            self._taken_by = found


def _flock(handle: int) -> bool | None:
    """Whether we have it; None where this file system has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError:
        return None


def _same_file(handle: int, path: Path) -> bool:
    try:
        mine, there = os.fstat(handle), path.stat()
    except OSError:
        return False
    return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)


def _read(path: Path) -> Holder | None:
    try:
        return Holder(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None  # nobody, or being written


def _moves(path: Path) -> bool:
    """Whether its holder gives a sign of life within WATCH_S. Opened anew each time: that is
    what makes NFS ask its server."""
    def state() -> tuple[int, str]:
        try:
            with path.open() as file:
                return os.fstat(file.fileno()).st_mtime_ns, file.read()
        except OSError:
            return 0, ""

    first, end = state(), time.monotonic() + WATCH_S
    while time.monotonic() < end:
        time.sleep(min(0.5, WATCH_S / 10))
        if state() != first:
            return True
    return False
