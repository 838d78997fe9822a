"""A scheduler and a sliced run for each test."""

from __future__ import annotations

import locale
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.fake import Fake


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    return Fake(tmp_path, monkeypatch)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def ascii_locale() -> Iterator[None]:
    """As on nodes where no language is set: text without an encoding of its own is ASCII."""
    before = locale.setlocale(locale.LC_CTYPE)
    locale.setlocale(locale.LC_CTYPE, "C")
    yield
    locale.setlocale(locale.LC_CTYPE, before)


@pytest.fixture
def flushes(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One for each time that standard output was flushed."""
    times: list[int] = []
    monkeypatch.setattr(sys.stdout, "flush", lambda: times.append(1))
    return times
