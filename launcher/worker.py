"""One process of several: what hvtrain is when `hvtrain launch`, torchrun or
`deepspeed` has started it as a rank."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

if __name__ == "__main__" and not getattr(sys.flags, "safe_path", False):
    # `-m` put the working directory first, where a user's data may be called
    # `shards`: off, as in __main__.py.
    sys.path[:] = [*sys.path[1:], os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]

from hvtrain import stopping
from hvtrain.stopping import REQUEUE
from launcher import cli


def main(arguments: Sequence[str]) -> NoReturn:
    if arguments[:1] in (["train"], ["generate"]):
        stopping.remember()  # before the imports, which take seconds
    elif arguments[:1] == ["encode"]:
        stopping.leave(REQUEUE)
    else:
        stopping.obey()  # the launcher starts its workers deaf
    _end_with_parent()
    code = cli.run(arguments)
    # At once: the ordinary exit may wait for a collective whose other ranks have failed too, and tearing
    # libraries' threads down now and then aborts a process that has finished its work.
    os._exit(code)


def _end_with_parent() -> None:
    """If the launcher is killed, be asked to stop (and save) instead of running on unseen. Linux only."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(cli.main())
