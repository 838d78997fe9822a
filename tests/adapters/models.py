"""A small model with random weights, and LoRAs for it."""

from __future__ import annotations

from dataclasses import replace

import torch

from hvtrain.adapters.attach import adapted_layers, inject
from hvtrain.models import find
from hvtrain.models.dit import DiT
from hvtrain.models.hunyuan_video.inputs import HunyuanInput

SPEC = find("hunyuan-video")
TINY = SPEC.flavors["tiny"].arch
ARCH = replace(
    TINY, hidden_size=48, heads_num=2, double=2, single=2, rope_dims=(8, 8, 8), text_dim=20, pooled_dim=12
)


def build(seed: int = 0) -> DiT:
    """Unit-scale weights: with small ones attention is uniform and a wrong mapping would not show."""
    torch.manual_seed(seed)
    model = SPEC.build(ARCH).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            parameter.normal_(std=fan_in**-0.5)
    return model


def adapted(seed: int = 0, *, rank: int = 4, alpha: float = 2.0, lora_seed: int = 7) -> DiT:
    """The same model with adapters on all its targets, as after training: the up-projections are not zero."""
    model = build(seed)
    inject(model, SPEC.lora_targets(model), rank=rank, alpha=alpha, seed=lora_seed)
    draw = torch.Generator().manual_seed(lora_seed)
    with torch.no_grad():
        for layer in adapted_layers(model):
            layer.lora_up.weight.normal_(std=0.5, generator=draw)
    return model


def lora_tensors(model: DiT) -> dict[str, torch.Tensor]:
    """What the training loop hands to save_lora."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".lora_" in name}


def an_input() -> HunyuanInput:
    """Two samples with ragged text."""
    draw = torch.Generator().manual_seed(3)
    return HunyuanInput(
        x=torch.randn(2, ARCH.in_channels, 3, 4, 6, generator=draw),
        t=torch.tensor([900.0, 300.0]),
        cond={
            "text": torch.randn(2, 5, ARCH.text_dim, generator=draw),
            "pooled": torch.randn(2, ARCH.pooled_dim, generator=draw),
            "guidance": torch.tensor([6000.0, 1000.0]),
        },
        lengths={"text": (5, 3)},
    )
