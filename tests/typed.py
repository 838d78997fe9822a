"""`hvtrain ...` as a person types it, but in this process: loading torch takes longer than most commands."""

from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass

from launcher import cli


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


def hvtrain(*arguments: object) -> Done:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = cli.main([str(one) for one in arguments])
        except SystemExit as end:  # --help
            code = int(end.code or 0)
    return Done(code, out.getvalue(), err.getvalue())
