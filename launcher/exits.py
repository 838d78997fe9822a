"""How a command ends: a user's mistake is one line and exit code 2, a bug is a traceback
and 1, "start me again" is 75.

Several processes usually fail together, for one reason. Under `hvtrain launch` each one therefore leaves a
record in a folder instead of printing, and the launcher prints the one that explains the others.
"""

from __future__ import annotations

import errno
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from launcher import output

USER_ERROR = 2
INTERRUPTED = 130
FOLDER_VARIABLE = "HVTRAIN_REPORT_DIR"
# A disk's or a user's limits, met anywhere: no bug of ours, and nothing that a traceback would help to mend.
PLACES = {
    errno.ENOSPC: "make room, then the same command again",
    errno.EDQUOT: "your quota is used up: make room, then the same command again",
    errno.EROFS: "choose a place that can be written",
    errno.EACCES: "choose a place that you may read and write, or ask for the permission",
    errno.EPERM: "choose a place that you may read and write, or ask for the permission",
    errno.EFBIG: "larger than files may be here (ulimit -f, or the file system)",
    errno.EMFILE: "too few open files are allowed: ulimit -n 4096",
}


@dataclass(frozen=True)
class Failure:
    """Why one process ended."""

    rank: int
    code: int
    time_s: float
    text: str


def guarded(run: Callable[[], int | None]) -> int:
    """Run a command; its exit code. Never raises, except SystemExit."""
    try:
        with output.watched():
            return run() or 0
    except output.OutputLost as lost:
        # none: `hvtrain models keys X | head`
        return _tell(USER_ERROR, f"error: {lost}") if lost.reason else 0
    except KeyboardInterrupt:
        return _tell(INTERRUPTED, "interrupted")
    except Exception as error:
        if is_user_error(error):
            return _tell(USER_ERROR, f"error: {one_line(error)}")
        if advice := PLACES.get(_number(error)):
            named = isinstance(error, OSError) and error.filename is not None
            said = one_line(error)
            if named:
                said = f"{error.filename}: {error.strerror}"  # type: ignore[attr-defined]
            return _tell(USER_ERROR, f"error: {said}; {advice}")
        return _tell(1, traceback.format_exc().rstrip())


def is_user_error(error: BaseException) -> bool:
    """The error classes are looked up among the loaded modules: importing
    `shards` here would import torch."""
    homes = (("hvtrain.errors", "HvtrainError"), ("shards.errors", "ShardError"))
    classes = [getattr(sys.modules[module], name) for module, name in homes if module in sys.modules]
    return isinstance(error, tuple(classes))


def _number(error: BaseException) -> int:
    """The system's number of an error, also of a library in Rust (safetensors), which only writes it."""
    if isinstance(error, OSError):
        return error.errno or 0
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else 0


def one_line(error: BaseException) -> str:
    return "; ".join(line.strip() for line in str(error).splitlines() if line.strip())


def first_cause(folder: Path) -> Failure | None:
    """The record that explains the others: the earliest mistake of the user, else the earliest failure. The
    rest are mostly processes that lost their peers."""
    failures = [Failure(**json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))]
    if not failures:
        return None
    cause = min(failures, key=lambda f: (f.code != USER_ERROR, f.time_s))
    # all say it: then rank 0 does
    return min((f for f in failures if f.text == cause.text), key=lambda f: f.rank)


def _tell(code: int, text: str) -> int:
    rank = int(os.environ.get("RANK", "0"))
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder is None:
        with suppress(OSError):  # the exit code still says it
            print(text if rank == 0 else f"{text} (rank {rank})", file=sys.stderr, flush=True)
        return code
    record = Path(folder, f"{rank}.json")
    temporary = record.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(Failure(rank, code, time.time(), text))))
    temporary.replace(record)  # the launcher may be reading
    return code
