"""A file of three small tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.merge.few import model


@pytest.fixture
def three(tmp_path: Path):
    """a [2, 2] bfloat16, b [3] float32, c [2] int64."""
    tensors = {
        "a": torch.tensor([[1.0, 2], [3, 4]]).bfloat16(), "b": torch.tensor([1.0, 2, 3]),
        "c": torch.tensor([5, 6])
    }
    return model(tmp_path / "in.safetensors", **tensors)
