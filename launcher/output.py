"""Standard output and error whose reader may leave, whose disk may be full, or that are closed.

A command whose result is what it prints ends then. One that makes files goes on in silence: what was begun
for hours is not given up for a line that nobody reads, and its exit code says how the work itself ended.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


class OutputLost(Exception):
    """Nothing more can be printed; `reason` is empty where the reader has left, which is no mistake."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"standard output: {reason}; what was printed is not complete")
        self.reason = reason


class Output:
    """Stands before sys.stdout or sys.stderr while a command runs."""

    def __init__(self, stream: Any, *, ends: bool) -> None:
        self.ends = ends  # the command, with OutputLost
        self.lost: str | None = None if stream is not None else "closed"
        if stream is None:
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 lives on
        self.stream = stream

    def write(self, text: str) -> int:
        if self.ends and self.lost is not None:
            raise OutputLost(self.lost)
        try:
            self.stream.write(text)
        except OSError as error:
            self._lose(error)
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        self.lost = "" if error.errno == errno.EPIPE else str(error.strerror)
        # What is still buffered goes nowhere: Python would complain once more when it flushes at exit.
        with suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)
        if self.ends:
            raise OutputLost(self.lost) from None
        if self.lost and self.stream is not sys.__stderr__:
            with suppress(OSError):
                print(
                    f"warning: standard output: {self.lost}; going on without it", file=sys.__stderr__,
                    flush=True
                )

    def __getattr__(self, name: str) -> Any:  # isatty, encoding, fileno ...
        return getattr(self.stream, name)


@contextmanager
def watched() -> Iterator[None]:
    """Until the end of the block; leaves nothing unprinted in a buffer."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Output(sys.stdout, ends=True), Output(sys.stderr, ends=False)
    try:
        yield
        sys.stdout.flush()
    finally:
        sys.stdout, sys.stderr = before


def go_on_unread() -> None:
    """From here on the command makes files: it does not end when its output is lost."""
    if isinstance(sys.stdout, Output):
        sys.stdout.ends = False


def prepare() -> None:
    """Once, at the start of the program: a closed descriptor 0-2 must not become that of the next file that
    is opened, and a file name that is no text in the terminal's encoding is printed with escapes."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
