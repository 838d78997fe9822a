"""Guidance: velocities combined so that the video follows the prompt more than the model alone would."""

from __future__ import annotations

from torch import Tensor

from hvtrain.flow.solvers import Velocity


def classifier_free(conditional: Velocity, unconditional: Velocity, scale: float) -> Velocity:
    """From the unconditional velocity through the conditional one and beyond
    (arXiv:2207.12598); 1 is the latter.

    Two forward passes rather than one of twice the batch: the prompts differ in
    length, and memory stays the same.
    """

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        without = unconditional(x, sigma).float()
        return without + scale * (conditional(x, sigma).float() - without)

    return velocity
