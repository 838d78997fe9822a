"""How a run stands, in its directory, for whoever lists runs. No torch here."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from shards.atomic import write_text

STATUS_FILE = "status.json"
RUNNING, FINISHED, STOPPED, FAILED = "running", "finished", "stopped", "failed"


@dataclass(frozen=True)
class Status:
    state: str = ""  # "": a run of an older version
    steps: int | None = None  # of the whole run
    error: str = ""
    time: float = 0.0  # wall time of the last change


@contextmanager
def told(output: Path, *, steps: int, main: bool) -> Iterator[Callable[[str], None]]:
    """Around a run, on every rank; rank 0 writes. Call what it gives with the state that the run ends in; an
    exception is `failed`, with its first line. A process that is killed leaves `running`, and no lock."""

    def tell(state: str, error: str = "") -> None:
        if main:
            write_text(
                output / STATUS_FILE,
                json.dumps(asdict(Status(state, steps, error, round(time.time(), 3)))) + "\n"
            )

    tell(RUNNING)
    try:
        yield tell
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt)
        said = str(error).strip().splitlines()
        tell(
            STOPPED if stopped else FAILED,
            "" if stopped else f"{said[0] if said else type(error).__name__}"[:500]
        )
        raise


def read_status(output: Path) -> Status:
    try:
        return Status(**json.loads((output / STATUS_FILE).read_text()))
    except (OSError, ValueError, TypeError):
        return Status()
