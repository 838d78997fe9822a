"""The command line's entry point. The commands themselves are in launcher/commands/."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence

if __name__ == "__main__" and not getattr(sys.flags, "safe_path", False):
    # `-m` put the working directory first, where a user's data may be called
    # `shards`: off, as in __main__.py.
    sys.path[:] = [*sys.path[1:], os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]

from launcher import commands as commands  # fills the table
from launcher import output
from launcher.exits import guarded
from launcher.table import COMMANDS, parse


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code. Without argv this process is hvtrain itself: the console script and
    `python DIR/launcher` end with it."""
    if argv is not None:
        return run(argv)
    # Helper processes (readers of data, compilers) are started by libraries with the
    # working directory on their path.
    os.environ["PYTHONSAFEPATH"] = "1"
    output.prepare()
    arguments = list(sys.argv[1:])
    if "LOCAL_RANK" in os.environ:
        if arguments and re.match("--local[-_]rank=", arguments[0]):
            del arguments[0]  # `deepspeed` says it twice
        if arguments and arguments[0] in COMMANDS and COMMANDS[arguments[0]].check:
            from launcher import worker

            worker.main(arguments)
    return run(arguments)


def run(arguments: Sequence[str]) -> int:
    """Run one command line in this process; its exit code."""
    return guarded(lambda: _run(arguments))


def _run(arguments: Sequence[str]) -> int | None:
    args = parse(arguments)
    command = COMMANDS[args.command]
    if not (command.prints or getattr(args, "dry_run", False)):
        output.go_on_unread()
    return command.run(args)


if __name__ == "__main__":
    sys.exit(main())
