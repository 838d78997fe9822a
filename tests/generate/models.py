"""A DiT of the tiny flavor with unit-scale random weights: with small ones attention is uniform and nothing shows."""

from __future__ import annotations

import math
from pathlib import Path

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


def random_dit() -> DiT:
    spec, flavor = spec_and_flavor()
    model = spec.build(flavor.arch)
    for name, p in model.named_parameters():
        scale = 1 / math.sqrt(p[0].numel()) if p.ndim > 1 else 0.2
        p.data.normal_(generator=generator(0, stream=name)).mul_(scale)
        if name.endswith("norm.weight"):
            p.data.add_(1.0)
    return model.eval().requires_grad_(False)


def write_dit(path: Path, flavor: str = "tiny") -> Path:
    spec, _ = spec_and_flavor()
    save_dit(random_dit(), path, spec=spec, flavor=spec.flavor(flavor))
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
