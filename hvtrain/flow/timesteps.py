"""Which noise levels are trained: a timestep sampler is one quantile function u in (0, 1) -> sigma in [0, 1].

Non-decreasing in u. Stratification over the global batch, truncation that keeps the distribution's shape, and the
fixed quantiles of the held-out loss then exist once, here, for all of them. A sampler's keyword arguments are keys of
the config's `flow` section. Formulas: facts common to SD3 (arXiv 2403.03206) and the sd-scripts family.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hvtrain.errors import ConfigError
from hvtrain.registry import Registry
from hvtrain.rng import generator

Quantile = Callable[[Tensor], Tensor]
SAMPLERS: Registry[Callable[..., Tensor]] = Registry("distribution")
_EDGE = 1e-7  # the normal quantile is infinite at 0 and 1


@SAMPLERS.add("uniform")
def uniform(u: Tensor) -> Tensor:
    return u


@SAMPLERS.add("sigmoid")
def sigmoid(u: Tensor, *, sigmoid_scale: float) -> Tensor:
    """Sigmoid of a normal of this width."""
    return torch.sigmoid(sigmoid_scale * _normal(u))


@SAMPLERS.add("logit_normal")
def logit_normal(u: Tensor, *, logit_mean: float, sigmoid_scale: float) -> Tensor:
    return torch.sigmoid(logit_mean + sigmoid_scale * _normal(u))


@SAMPLERS.add("shift")
def shift(u: Tensor, *, shift: float, sigmoid_scale: float) -> Tensor:
    """Sigmoid of a normal, moved towards noise as the sampling schedule is: s t / (1 + (s - 1) t)."""
    t = torch.sigmoid(sigmoid_scale * _normal(u))
    return shift * t / (1 + (shift - 1) * t)


def _normal(u: Tensor) -> Tensor:
    return torch.special.ndtri(u.clamp(_EDGE, 1 - _EDGE))


def quantile_function(name: str, settings: Any) -> Quantile:
    """The sampler `name` with its parameters from `settings` (a FlowConfig), cut to [min_sigma, max_sigma]."""
    function = SAMPLERS.find(name, key="flow.timestep_sampling")
    keys = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    parameters = {key: getattr(settings, key) for key in keys}
    low, high = settings.min_sigma, settings.max_sigma
    if not 0 <= low < high <= 1:
        raise ConfigError(f"flow.min_sigma {low} and flow.max_sigma {high}: expected 0 <= min < max <= 1")

    def plain(u: Tensor) -> Tensor:
        return function(u, **parameters)

    if (low, high) == (0.0, 1.0):
        return plain
    u_low, u_high = _inverse(plain, low), _inverse(plain, high)
    if u_high - u_low < 1e-6:
        raise ConfigError(
            f"flow.timestep_sampling '{name}' has nothing between flow.min_sigma {low} and flow.max_sigma {high}"
        )
    return lambda u: plain(u_low + (u_high - u_low) * u).clamp(low, high)


def share(quantile: Quantile, low: float, high: float) -> float:
    """Of the distribution, what lies between two noise levels."""
    return _inverse(quantile, high) - _inverse(quantile, low)


def _inverse(quantile: Quantile, sigma: float) -> float:
    """The share of the distribution below sigma, by bisection (quantile functions do not decrease)."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        below = float(quantile(torch.tensor([middle], dtype=torch.float64))[0]) < sigma
        low, high = (middle, high) if below else (low, middle)
    return (low + high) / 2


def stratified(n: int, *, seed: int, step: int, part: int, n_parts: int) -> Tensor:
    """[n] numbers in (0, 1): this part's share of n * n_parts equal strata, one number in each.

    A part is one rank's micro-step. All parts of a step share one shuffle of the strata, so the global batch covers
    the distribution evenly whatever the number of ranks.
    """
    total = n * n_parts
    order = torch.randperm(total, generator=generator(seed, step=step, stream="strata"))
    inside = torch.rand(total, generator=generator(seed, step=step, stream="timestep"), dtype=torch.float64)
    u = (order.double() + inside) / total
    return u[part * n : (part + 1) * n]
