"""Which noise levels are trained: a timestep sampler is one quantile function u in (0, 1) -> sigma in [0, 1].

Non-decreasing in u. Stratification over the global batch, truncation that keeps the distribution's shape, and
the fixed quantiles of the held-out loss then exist once, here, for all of them. A sampler's keyword arguments
are keys of the config's `flow` section, or what a batch's latents say. Formulas: facts common to SD3 (arXiv
2403.03206) and the sd-scripts family. But for `uniform`, `mode` and `sigma` all are normal in logit(sigma),
for a shift by s adds log s to it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from hvtrain.errors import ConfigError
from hvtrain.models.spec import Flavor
from hvtrain.registry import Registry
from hvtrain.rng import generator


class Quantile(Protocol):
    """u [n] float64 -> sigma [n]. `shape`: of the latents [... T H W], for samplers that depend on it."""

    def __call__(self, u: Tensor, shape: Sequence[int] | None = None, /) -> Tensor: ...


SAMPLERS: Registry[Callable[..., Tensor]] = Registry("distribution")
# of the config's `flow` section
SAMPLER_KEYS = ("shift", "sigmoid_scale", "logit_mean", "logit_std", "mode_scale")
_EDGE = 1e-7  # the normal quantile is infinite at 0 and 1
_LEVELS = 1000  # of the discrete schedules
_STYLE = (5.36, 1.0)  # mean and width of log SNR in the noise-free end of the qinglong mixtures


@SAMPLERS.add("uniform")
def uniform(u: Tensor) -> Tensor:
    return u


@SAMPLERS.add("sigmoid")
def sigmoid(u: Tensor, *, sigmoid_scale: float) -> Tensor:
    """Sigmoid of a normal of this width."""
    return _logistic_normal(u, 0.0, sigmoid_scale)


@SAMPLERS.add("logit_normal")
def logit_normal(u: Tensor, *, logit_mean: float, logit_std: float) -> Tensor:
    return _logistic_normal(u, logit_mean, logit_std)


@SAMPLERS.add("mode")
def mode(u: Tensor, *, mode_scale: float) -> Tensor:
    """SD3's heavy tails: 1 - v - s (cos^2(pi v / 2) - 1 + v) of v = 1 - u; s > 0 favours the middle, s < 0
    the ends, and s from -1 to 2 / (pi - 2) is a distribution."""
    return (u - mode_scale * ((torch.sin(math.pi / 2 * u)) ** 2 - u)).clamp(0, 1)


@SAMPLERS.add("shift")
def shift(u: Tensor, *, shift: float, sigmoid_scale: float) -> Tensor:
    """Sigmoid of a normal, moved towards noise as the sampling schedule is: s t / (1 + (s - 1) t)."""
    return _logistic_normal(u, math.log(shift), sigmoid_scale)


@SAMPLERS.add("flux_shift")
def flux_shift(u: Tensor, *, sigmoid_scale: float, frame_tokens: int) -> Tensor:
    """`shift` by the resolution, as FLUX has it."""
    return _logistic_normal(u, flux_line(frame_tokens), sigmoid_scale)


@SAMPLERS.add("qwen_shift")
def qwen_shift(u: Tensor, *, sigmoid_scale: float, frame_tokens: int) -> Tensor:
    """`shift` by the resolution, as Qwen-Image has it."""
    return _logistic_normal(u, qwen_line(frame_tokens), sigmoid_scale)


@SAMPLERS.add("logsnr")
def logsnr(u: Tensor, *, logit_mean: float, logit_std: float) -> Tensor:
    """sigmoid(-l / 2) of a normal l, which is log SNR = 2 log((1 - sigma) / sigma). arXiv 2411.14793"""
    return _logistic_normal(u, -logit_mean / 2, logit_std / 2)


@SAMPLERS.add("qinglong_flux")
def qinglong_flux(
    u: Tensor, *, sigmoid_scale: float, logit_mean: float, logit_std: float, frame_tokens: int
) -> Tensor:
    """79 % flux_shift, 11 % logsnr, 10 % almost without noise."""
    style = (0.11, -logit_mean / 2, logit_std / 2), (0.1, -_STYLE[0] / 2, _STYLE[1] / 2)
    return _mixture(u, (0.79, flux_line(frame_tokens), sigmoid_scale), *style)


@SAMPLERS.add("qinglong_qwen")
def qinglong_qwen(u: Tensor, *, sigmoid_scale: float, frame_tokens: int) -> Tensor:
    """95 % qwen_shift, 5 % almost without noise."""
    return _mixture(u, (0.95, qwen_line(frame_tokens), sigmoid_scale), (0.05, -_STYLE[0] / 2, _STYLE[1] / 2))


@SAMPLERS.add("sigma")
def sigma(u: Tensor) -> Tensor:
    """One of 1/1000, 2/1000, ..., 1: the levels of a discrete schedule, each as often."""
    return (u * _LEVELS).ceil().clamp(1, _LEVELS) / _LEVELS


def flux_line(frame_tokens: float) -> float:
    """log of the shift: a line through 256 and 4096 image tokens of one frame."""
    return _line(frame_tokens, (256, 0.5), (4096, 1.15))


def qwen_line(frame_tokens: float) -> float:
    return _line(frame_tokens, (256, 0.5), (8192, 0.9))


def _line(x: float, few: tuple[float, float], many: tuple[float, float]) -> float:
    return few[1] + (many[1] - few[1]) * (x - few[0]) / (many[0] - few[0])


def _logistic_normal(u: Tensor, mean: float, std: float) -> Tensor:
    return torch.sigmoid(mean + std * torch.special.ndtri(u.clamp(_EDGE, 1 - _EDGE)))


def _mixture(u: Tensor, *parts: tuple[float, float, float]) -> Tensor:
    """The quantile function of a mixture of (share, mean, width) of logit(sigma), by bisection: its parts'
    are known, its own has no formula."""
    u = u.double().clamp(_EDGE, 1 - _EDGE)
    low = torch.full_like(u, min(mean - 6 * std for _, mean, std in parts))
    high = torch.full_like(u, max(mean + 6 * std for _, mean, std in parts))
    for _ in range(50):
        middle = (low + high) / 2
        below = sum(share * torch.special.ndtr((middle - mean) / std) for share, mean, std in parts) < u
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return torch.sigmoid((low + high) / 2)


# --- of a config --------------------------------------------------------------------------------------------


def parameters(name: str) -> list[str]:
    """What a sampler takes. Raises ConfigError for one that is not there."""
    function = SAMPLERS.find(name, key="flow.timestep_sampling")
    return [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]


def quantile_function(name: str, settings: Any, flavor: Flavor | None = None) -> Quantile:
    """The sampler `name` with its parameters from `settings` (a FlowConfig) and the latents of a `flavor`,
    cut to [min_sigma, max_sigma] or squeezed into it. Raises ConfigError."""
    keys = parameters(name)
    low, high = settings.min_sigma, settings.max_sigma
    if not 0 <= low < high <= 1:
        raise ConfigError(f"flow.min_sigma {low} and flow.max_sigma {high}: expected 0 <= min < max <= 1")
    by_tokens = flavor.shift_by_tokens if flavor is not None and settings.shift is None else None

    def value(key: str, shape: Sequence[int] | None) -> float:
        if key != "frame_tokens" and not (key == "shift" and by_tokens):
            return getattr(settings, key)
        if flavor is None or shape is None:
            raise ValueError(f"'{name}' depends on the latents' shape")
        if key == "shift" and by_tokens:
            return math.exp(_line(flavor.latent.n_tokens(shape), *by_tokens))
        return flavor.latent.n_tokens((flavor.latent.patch[0], *shape[-2:]))

    def plain(u: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        return SAMPLERS[name](u, **{key: value(key, shape) for key in keys})

    if (low, high) == (0.0, 1.0):
        return plain
    if settings.range == "squeeze":
        return lambda u, shape=None: (low + (high - low) * plain(u, shape)).clamp(low, high)
    cut = within(plain, low, high, what=f"flow.timestep_sampling '{name}'")
    if flavor is not None:  # what can be refused is refused now: at the flavor's own size
        d = flavor.defaults
        cut(
            torch.zeros(1, dtype=torch.float64),
            flavor.latent.shape(frames=d.frames, height=d.height, width=d.width)
        )
    elif "frame_tokens" not in keys:
        cut(torch.zeros(1, dtype=torch.float64))
    return cut


def within(quantile: Quantile, low: float, high: float, *, what: str = "flow.timestep_sampling") -> Quantile:
    """The quantile function of the part of a distribution that lies in [low, high]: its shape there is kept.

    Raises ConfigError, when it is called, if (almost) nothing of the distribution lies there.
    """

    @lru_cache(maxsize=256)  # a shape's bounds take 120 calls of the quantile function
    def bounds(shape: tuple[int, ...] | None) -> tuple[float, float]:
        ends = _inverse(quantile, low, shape), _inverse(quantile, high, shape)
        if ends[1] - ends[0] < 1e-6:
            raise ConfigError(f"{what} has nothing between flow.min_sigma {low} and flow.max_sigma {high}")
        return ends

    def part(u: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        first, last = bounds(None if shape is None else tuple(shape[-3:]))
        return quantile(first + (last - first) * u, shape).clamp(low, high)

    return part


def share_within(quantile: Quantile, low: float, high: float, shape: Sequence[int] | None = None) -> float:
    """How much of a distribution lies in [low, high)."""
    last = 1.0 if high >= 1 else _inverse(quantile, high, shape)
    return last - (0.0 if low <= 0 else _inverse(quantile, low, shape))


def _inverse(quantile: Quantile, sigma: float, shape: Sequence[int] | None = None) -> float:
    """The share of the distribution below sigma, by bisection (quantile functions do not decrease)."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        below = float(quantile(torch.tensor([middle], dtype=torch.float64), shape)[0]) < sigma
        low, high = (middle, high) if below else (low, middle)
    return (low + high) / 2


def stratified(n: int, *, seed: int, step: int, part: int, n_parts: int) -> Tensor:
    """[n] numbers in (0, 1): this part's share of n * n_parts equal strata, one number in each.

    A part is one rank's micro-step. All parts of a step share one shuffle of the strata, so the global batch
    covers the distribution evenly whatever the number of ranks.
    """
    total = n * n_parts
    order = torch.randperm(total, generator=generator(seed, step=step, stream="strata"))
    inside = torch.rand(total, generator=generator(seed, step=step, stream="timestep"), dtype=torch.float64)
    u = (order.double() + inside) / total
    return u[part * n : (part + 1) * n]
