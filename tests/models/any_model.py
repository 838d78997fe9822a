"""A model of any architecture, small, with random weights, and something to feed it:
whatever its record declares."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from hvtrain.models.conditions import example
from hvtrain.models.dit import DiT, ModelInput
from hvtrain.models.spec import Flavor, ModelSpec
from hvtrain.rng import generator


def meta(spec: ModelSpec, flavor: Flavor) -> DiT:
    with torch.device("meta"):
        return spec.build(flavor.arch)


@cache
def _n_parameters(build: Callable[[Any], DiT], arch: Any) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build(arch).parameters())


def n_parameters(spec: ModelSpec, flavor: Flavor) -> int:
    return _n_parameters(spec.build, flavor.arch)


def smallest(spec: ModelSpec) -> Flavor:
    return min(spec.flavors.values(), key=lambda flavor: n_parameters(spec, flavor))


def random_model(spec: ModelSpec, flavor: Flavor | None = None) -> DiT:
    """Unit-scale weights: with small ones attention is uniform, and much that is broken would not show."""
    model, draw = spec.build((flavor or smallest(spec)).arch).eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=(p[0].numel() if p.ndim > 1 else 1) ** -0.5, generator=draw)
    return model


def batch(flavor: Flavor, device: str = "cpu", *, seed: int = 1) -> tuple[
    torch.Tensor, dict[str, torch.Tensor]
]:
    """Latents and the conditions that the flavor declares: two samples, ragged where a length is open."""
    latent = flavor.latent
    shape = latent.shape(frames=2 * latent.stride_t + 1, height=2 * latent.unit[0], width=3 * latent.unit[1])
    draw = generator(seed)
    cond = example(flavor, (2, *shape), lengths=(5, 3), optional=True, draw=draw)
    x = torch.randn(2, *shape, generator=draw)
    return x.to(device), {k: v if k.endswith("_len") else v.to(device) for k, v in cond.items()}


def an_input(spec: ModelSpec, flavor: Flavor, device: str = "cpu", *, seed: int = 1) -> ModelInput:
    x, cond = batch(flavor, device, seed=seed)
    sigma = torch.tensor([0.3, 0.9], device=device)
    return spec.make_input(x, sigma, cond, task=flavor.tasks[0], guidance=flavor.defaults.guidance)
