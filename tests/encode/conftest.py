"""A few tiny clips for each test."""

from __future__ import annotations

from pathlib import Path

import pytest

from hvtrain.tiny.data import ClipsRecipe, write_clips


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write_clips(ClipsRecipe(output=str(tmp_path / "clips"), n=6, seed=3))
