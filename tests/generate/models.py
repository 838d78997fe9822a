"""A DiT of the tiny flavor with unit-scale random weights: with small ones attention
is uniform and nothing shows."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hvtrain.models import find
from hvtrain.models.dit import DiT
from hvtrain.models.load import save_dit
from hvtrain.models.spec import Flavor, ModelSpec
from hvtrain.rng import generator

# 3 x 3 x 5 = 45 image tokens: two ranks cannot share them equally.
SIZE = {"width": 80, "height": 48, "frames": 9}


def spec_and_flavor() -> tuple[ModelSpec, Flavor]:
    spec = find("hunyuan-video")
    return spec, spec.flavor("tiny")


def random_dit(arch: Any = None, *, seed: int = 0) -> DiT:
    spec, flavor = spec_and_flavor()
    model = spec.build(arch or flavor.arch)
    for name, p in model.named_parameters():
        scale = 1 / math.sqrt(p[0].numel()) if p.ndim > 1 else 0.2
        p.data.normal_(generator=generator(seed, stream=name)).mul_(scale)
        if name.endswith("norm.weight"):
            p.data.add_(1.0)
    return model.eval().requires_grad_(False)


def write_dit(path: Path, flavor: str = "tiny", *, seed: int = 0) -> Path:
    """Of any flavor, at the tiny one's sizes."""
    spec, tiny = spec_and_flavor()
    own = spec.flavor(flavor).arch
    arch = replace(tiny.arch, in_channels=own.in_channels, token_replace=own.token_replace)
    save_dit(random_dit(arch, seed=seed), path, spec=spec, flavor=spec.fitted(spec.flavor(flavor), arch))
    return path


def random_cond(*lengths: int, seed: int = 5) -> dict[str, torch.Tensor]:
    """Conditions of a batch with these text lengths, padded with zeros."""
    _, flavor = spec_and_flavor()
    g = torch.Generator().manual_seed(seed)
    text = torch.randn(len(lengths), max(lengths), flavor.arch.text_dim, generator=g)
    for row, n in zip(text, lengths, strict=True):
        row[n:] = 0
    pooled = torch.randn(len(lengths), flavor.arch.pooled_dim, generator=g)
    return {"text": text, "text_len": torch.tensor(lengths), "pooled": pooled}
