"""How a video is integrated from noise along the velocity: functions of a velocity, a start and a list of sigmas."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]  # (x [B ...], sigma [B] float32) -> d x / d sigma


def euler(velocity: Velocity, x: Tensor, sigmas: Tensor) -> Tensor:
    """One straight step from each sigma to the next. x [B ...] float32, sigmas [steps + 1] falling to 0."""
    for here, there in pairwise(sigmas.tolist()):
        x = x + (there - here) * velocity(x, x.new_full((len(x),), here)).float()
    return x
