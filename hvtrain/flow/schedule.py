"""The sigmas that a video is sampled along."""

from __future__ import annotations

import torch
from torch import Tensor


def sigmas(steps: int, *, shift: float = 1.0, first: float = 1.0) -> Tensor:
    """[steps + 1] float64 from `first` to 0: evenly spaced, then moved towards
    noise by s x / (1 + (s - 1) x).

    Equal to diffusers' FlowMatchEulerDiscreteScheduler when that is given linspace(1, 0, steps + 1)[:-1].
    """
    # numpy's linspace, to the last bit: what
    even = first - torch.arange(steps + 1, dtype=torch.float64) * (first / steps)
    even[-1] = 0  # falls beside a whole timestep falls on the official side of it
    return shift * even / (1 + (shift - 1) * even)
