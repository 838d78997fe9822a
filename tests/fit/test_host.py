"""What a full fine-tune needs of host memory, and which degrees come first where
there are several machines."""

from __future__ import annotations

from hvtrain.config import ZeroConfig
from hvtrain.fit.estimate import degrees
from hvtrain.fit.memory import Layout, host

N, LARGEST = 13 * 10**9, 4 * 3072 * 12288
COUNTS = {"n_trained": N, "trained": 4 * N, "frozen": 0}


def test_thirteen_billion_over_eight_ranks() -> None:
    """ZeRO-3 saves with a tensor and a half on rank 0; without it rank 0 has all that is saved."""
    three = host(COUNTS, LARGEST, Layout(ZeroConfig(stage=3), world=8))
    assert three.load == 4 * N and three.resident == 0 and three.save == LARGEST // 8 + LARGEST + LARGEST // 2
    assert three.save < 0.3e9
    both = host(
        COUNTS, LARGEST, Layout(ZeroConfig(stage=3, offload_optimizer="cpu", offload_param="cpu"), world=8)
    )
    assert both.resident == (4 + 8 + 4) * N // 8 + 4 * N // 8
    two = host(COUNTS, LARGEST, Layout(ZeroConfig(stage=2), world=8))
    assert (two.load, two.save) == (0, 14 * N)


def test_ulysses_stays_inside_a_machine() -> None:
    assert degrees(24, 24)[:2] == [(8, 3), (6, 4)] and set(degrees(24, 24)[-2:]) == {(24, 1), (12, 2)}
    assert degrees(16, 16)[0] == (8, 2) and degrees(24, 8)[0] == (8, 1) and degrees(40, 16)[0] == (8, 2)
