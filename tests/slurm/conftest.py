"""A scheduler and a sliced run for each test."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.slurm.fake import Fake


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    return Fake(tmp_path, monkeypatch)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"
