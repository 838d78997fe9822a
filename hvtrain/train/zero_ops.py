"""DeepSpeed's disk access, which it compiles when it is first used (minutes).

Whoever compiles puts down a file, `lock`, for which all others wait: torch.utils.cpp_extension. A process
that is killed meanwhile, as a preempted job is, leaves it there, and every later training would wait for
ever without a word. So one process after the other loads it, under a lock that ends with its holder.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any, Protocol

from hvtrain.errors import ConfigError
from hvtrain.train.runlock import Busy, RunLock

WAIT_S = 3600.0  # for the others of this node, or of all that share a home
SILENT_S = 5.0
MAKES = "DeepSpeed's disk access is being compiled, minutes the first time"


class Op(Protocol):
    """One of DeepSpeed's `op_builder`s."""

    name: str

    def load(self, verbose: bool = False) -> Any: ...


def compiled(*ops: Op, says: bool = True, wait_s: float = WAIT_S) -> None:
    """All are loaded, and compiled where they are not. What a killed process left half-done is removed.
    `says`: that it waits; one process of a node may. Raises ConfigError where nothing can be written, or
    another program's lock stays for `wait_s`."""
    from torch.utils.cpp_extension import _get_build_directory

    try:
        folders = {op.name: Path(_get_build_directory(op.name, False)) for op in ops}
        lock = _taken(next(iter(folders.values())).parent, wait_s, says)
    except OSError as err:
        raise ConfigError(f"DeepSpeed cannot compile its disk access: {err}; set TORCH_EXTENSIONS_DIR to a "
                          "directory that can be written") from err
    with lock:
        for op in ops:
            folder = folders[op.name]
            if lock.left_by is not None and (folder / "lock").exists():
                killed = lock.left_by.describe()
                print(f"{folder}: {killed} was killed while it compiled; made anew", flush=True)
                # not only the lock, and out of the way first: its compilers may still be writing there
                aside = folder.rename(folder.with_name(f"{folder.name}-{lock.left_by.token}"))
                shutil.rmtree(aside, ignore_errors=True)
                folder.mkdir()
            _wait_for_strangers(folder / "lock", wait_s)
            if not any(folder.glob("*.so")):
                print(f"{MAKES}: {folder}", flush=True)
            op.load(verbose=False)


def _taken(folder: Path, wait_s: float, says: bool) -> RunLock:
    """Most wait for milliseconds only, and say nothing."""
    lock, began = RunLock(folder, key="TORCH_EXTENSIONS_DIR"), time.monotonic()
    while time.monotonic() < began + wait_s:
        try:
            return lock.acquire(0)
        except Busy as busy:
            if says and time.monotonic() > began + SILENT_S:
                says = False
                print(f"{MAKES}: {busy}", flush=True)
            time.sleep(0.1)
    return lock.acquire(0)


def _wait_for_strangers(path: Path, wait_s: float) -> None:
    """Another program that uses DeepSpeed may be compiling."""
    end, told = time.monotonic() + wait_s, False
    while path.exists():
        if time.monotonic() > end:
            raise ConfigError(
                f"{path} has been there for more than {wait_s / 60:.0f} minutes: a program that compiled "
                f"DeepSpeed's disk access was killed; if none does so now, remove it: rm -r '{path.parent}'"
            )
        if not told:
            told = True
            print(
                f"waiting for whoever compiles DeepSpeed's disk access to remove {path}; if nobody does, "
                f"stop this and rm -r '{path.parent}'", flush=True
            )
        time.sleep(0.1)
