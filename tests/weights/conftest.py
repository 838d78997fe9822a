import pytest
import torch

from tests.weights.scaled import ScaledProduct


@pytest.fixture
def product(monkeypatch) -> ScaledProduct:
    """A GPU's float8 product; its fast sums are off by 2 %."""
    made = ScaledProduct(coarse=0.02)
    monkeypatch.setattr(torch, "_scaled_mm", made)
    return made
