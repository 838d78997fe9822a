"""The flow-matching loss. Noise and sigma are arguments: the same call trains, evaluates and is tested."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hvtrain.errors import ConfigError
from hvtrain.registry import Registry

# sigma below which a weight no longer grows: the first of the 1000 levels of a discrete schedule
SMALLEST = 1e-3


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x_sigma = (1 - sigma) x0 + sigma eps; sigma [B], the others [B ...]. arXiv 2210.02747."""
    s = sigma.view(-1, *[1] * (x0.ndim - 1)).to(x0.dtype)
    return (1 - s) * x0 + s * noise


def target(x0: Tensor, noise: Tensor) -> Tensor:
    """The velocity d x_sigma / d sigma."""
    return noise - x0


# --- what an error is ---------------------------------------------------------------------------------------

# (error, c [B 1 ...]) -> the same shape. All are error^2 where it is small against c.
LOSSES: Registry[Callable[[Tensor, Tensor], Tensor]] = Registry("loss")


@LOSSES.add("mse")
def mse(error: Tensor, c: Tensor) -> Tensor:
    return error.pow(2)


@LOSSES.add("huber")
def huber(error: Tensor, c: Tensor) -> Tensor:
    """error^2 up to c, then the line that goes on from there: 2 c |error| - c^2."""
    size = error.abs()
    return torch.where(size <= c, size.pow(2), 2 * c * size - c.pow(2))


@LOSSES.add("pseudo_huber")
def pseudo_huber(error: Tensor, c: Tensor) -> Tensor:
    """2 c (sqrt(error^2 + c^2) - c): smooth, and the same far away but for a constant."""
    return 2 * c * ((error.pow(2) + c.pow(2)).sqrt() - c)


# (sigma, c) -> c at sigma, for sigma / (1 - sigma) as the discrete models' standard deviation of the noise
HUBER_SCHEDULES: Registry[Callable[[Tensor, float], Tensor]] = Registry("schedule", {
    "constant": lambda sigma, c: torch.full_like(sigma, c),
    "exponential": lambda sigma, c: c**sigma,
    "snr": lambda sigma, c: c + (1 - c) * (1 - sigma).pow(2),
})

# --- what it counts -----------------------------------------------------------------------------------------

# (sigma, gamma) -> weight, both [B]
WEIGHTINGS: Registry[Callable[[Tensor, float], Tensor]] = Registry("weighting")


@WEIGHTINGS.add("none")
def unweighted(sigma: Tensor, gamma: float) -> Tensor:
    return torch.ones_like(sigma)


@WEIGHTINGS.add("sigma_sqrt")
def sigma_sqrt(sigma: Tensor, gamma: float) -> Tensor:
    """1 / sigma^2, as SD3's authors call it (arXiv 2403.03206)."""
    return sigma.clamp(min=SMALLEST).pow(-2)


@WEIGHTINGS.add("cosmap")
def cosmap(sigma: Tensor, gamma: float) -> Tensor:
    """2 / (pi (1 - 2 sigma + 2 sigma^2)): what the cosine schedule's density would be (arXiv 2403.03206)."""
    return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma.pow(2)))


@WEIGHTINGS.add("min_snr")
def min_snr(sigma: Tensor, gamma: float) -> Tensor:
    """min(SNR, gamma) sigma^2 with SNR = ((1 - sigma) / sigma)^2: arXiv 2303.09556 weighs the error of
    the clean latents, which is sigma times that of the velocity. Nothing counts more than (1 -
    sigma)^2, nor in pure noise."""
    return torch.minimum((1 - sigma).pow(2), gamma * sigma.pow(2))


@dataclass(frozen=True)
class Measure:
    """How wrong a velocity is, and what that counts. Raises ConfigError for names that there are not."""

    loss: str = "mse"
    huber_c: float = 0.1
    huber_schedule: str = "constant"
    weighting: str = "none"
    snr_gamma: float = 5.0

    def __post_init__(self) -> None:
        LOSSES.find(self.loss, key="flow.loss")
        HUBER_SCHEDULES.find(self.huber_schedule, key="flow.huber_schedule")
        WEIGHTINGS.find(self.weighting, key="flow.weighting")
        if not self.huber_c > 0 or not self.snr_gamma > 0:
            raise ConfigError(
                f"flow.huber_c {self.huber_c} and flow.snr_gamma {self.snr_gamma}: expected more than 0"
            )

    def weight(self, sigma: Tensor) -> Tensor:
        """[B] -> [B]."""
        return WEIGHTINGS[self.weighting](sigma, self.snr_gamma)

    def __call__(self, velocity: Tensor, wanted: Tensor, sigma: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B]: each sample's weighted mean error in float32, over the elements by the
        mask [B 1 T 1|h 1|w], 0 to 1."""
        error = velocity.float() - wanted.float()
        sigma = sigma.float()
        c = HUBER_SCHEDULES[self.huber_schedule](sigma, self.huber_c).view(-1, *[1] * (error.ndim - 1))
        return self.weight(sigma) * masked_mean(LOSSES[self.loss](error, c), mask)


def masked_mean(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """[B ...] -> [B]: each sample's mean; by a mask, over what it leaves; 0 where that is nothing."""
    if mask is None:
        return values.flatten(1).mean(1)
    share = mask.to(values).expand_as(values)
    total = share.flatten(1).sum(1)
    return (values * share).flatten(1).sum(1) / torch.where(total > 0, total, 1)


def squared_error(velocity: Tensor, wanted: Tensor, mask: Tensor | None = None) -> Tensor:
    """[B]: each sample's mean squared error in float32, over the elements where the mask [B 1 T 1 1] is 1."""
    return masked_mean((velocity.float() - wanted.float()).pow(2), mask)
