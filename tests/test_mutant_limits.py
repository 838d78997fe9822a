"""Mutants that take too long end; processes that got their numbers do not."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest

from tests.mutant_limits import end_own


def test_only_own_children_are_ended() -> None:
    ours = subprocess.Popen(["sh", "-c", "sleep 600 & echo $!; wait"], stdout=subprocess.PIPE, text=True)
    assert ours.stdout is not None
    other = int(ours.stdout.readline())  # a child's child
    try:
        with pytest.raises(ProcessLookupError):
            end_own(other, signal.SIGKILL)
        os.kill(other, 0)  # is there
        end_own(ours.pid, signal.SIGXCPU)
        assert ours.wait(60) == -signal.SIGXCPU
        with pytest.raises(ProcessLookupError):
            end_own(ours.pid, signal.SIGKILL)
    finally:
        os.kill(other, signal.SIGKILL)
