"""A scheduler and a sliced run for each test."""

from __future__ import annotations

import locale
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.jobs import backends, slices
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
def flushes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Whether each printed line was flushed."""
    found: list[Any] = []

    def say(text: str, **how: Any) -> None:
        found.append(how.get("flush"))
        print(text, **how)

    for module in (backends, slices):
        monkeypatch.setattr(module, "print", say, raising=False)
    return found
