"""The flow-matching loss. Noise and sigma are arguments: the same call trains, evaluates and is tested."""

from __future__ import annotations

from torch import Tensor


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x_sigma = (1 - sigma) x0 + sigma eps; sigma [B], the others [B ...]. arXiv 2210.02747."""
    s = sigma.view(-1, *[1] * (x0.ndim - 1)).to(x0.dtype)
    return (1 - s) * x0 + s * noise


def target(x0: Tensor, noise: Tensor) -> Tensor:
    """The velocity d x_sigma / d sigma."""
    return noise - x0


def squared_error(velocity: Tensor, wanted: Tensor, mask: Tensor | None = None) -> Tensor:
    """[B]: each sample's mean squared error in float32, over the elements where the mask [B 1 T 1 1] is 1."""
    error = (velocity.float() - wanted.float()).pow(2)
    if mask is None:
        return error.flatten(1).mean(1)
    weight = mask.to(error).expand_as(error)
    return (error * weight).flatten(1).sum(1) / weight.flatten(1).sum(1).clamp(min=1)
