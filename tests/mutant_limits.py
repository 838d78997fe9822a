"""mutmut, as `make mutate` runs it: a mutant that takes too long is ended, and nothing else.

mutmut 3.8 notes each mutant's process number and signals it when the mutant's time is over, also when the
mutant has ended long ago: by then the number can be another program's. Run as a text (`python -c`), so that
nothing of tests/ is imported from here.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace


def end_own(pid: int, number: int) -> None:
    """os.kill of this process's children; of another's, or of none, ProcessLookupError."""
    try:
        parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except FileNotFoundError:
        raise ProcessLookupError from None
    if parent != os.getpid():
        raise ProcessLookupError
    os.kill(pid, number)


if __name__ == "__main__":
    from mutmut.__main__ import cli
    from mutmut.workers import timeout

    timeout.os = SimpleNamespace(kill=end_own, getpid=os.getpid)  # type: ignore[attr-defined]
    cli()
