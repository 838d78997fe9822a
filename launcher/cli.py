"""The command line's entry point. The commands themselves are in launcher/commands/."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from launcher import commands as commands  # fills the table
from launcher.report import guarded
from launcher.table import COMMANDS, parse


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code. The console script and launcher.worker end with it."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return guarded(lambda: _main(arguments))


def _main(arguments: Sequence[str]) -> int | None:
    args = parse(arguments)
    return COMMANDS[args.command].run(args)


if __name__ == "__main__":
    sys.exit(main())
