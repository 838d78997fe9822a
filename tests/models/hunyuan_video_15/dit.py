"""A small transformer of HunyuanVideo 1.5 with random weights, and what goes into it."""

from dataclasses import replace

import torch

from hvtrain.models import find
from hvtrain.models.hunyuan_video_15.inputs import Hunyuan15Input

SPEC = find("hunyuan-video-15")
WIDE = replace(SPEC.flavor("tiny").arch, hidden_size=128, double=4, rope_dims=(8, 12, 12), mlp_ratio=4.0)
ARCH = replace(
    WIDE, in_channels=9, out_channels=4, hidden_size=64, heads_num=2, double=2, text_dim=24, glyph_dim=20,
    vision_dim=28,
)  # fmt: skip
STEPS = replace(ARCH, meanflow=True)


def build(arch=ARCH):
    """Unit-scale weights: with small ones attention is uniform and much that is wrong would not show."""
    draw, model = torch.Generator().manual_seed(0), SPEC.build(arch).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=(p[0].numel() if p.ndim > 1 else 1) ** -0.5, generator=draw)
    return model


def an_input(arch=ARCH, text=(7, 5), glyph=(4, 0), vision=(6, 6)):
    """Random states, garbage beyond each sample's length."""
    draw, n = torch.Generator().manual_seed(3), len(text)
    lengths = {"text": text, "glyph": glyph, "vision": vision}
    dims = {"text": arch.text_dim, "glyph": arch.glyph_dim, "vision": arch.vision_dim}
    cond = {kind: torch.randn(n, max(own) + 2, dims[kind], generator=draw) for kind, own in lengths.items()}
    x = torch.randn(n, arch.in_channels, 3, 4, 6, generator=draw)
    t, until = (torch.rand(n, generator=draw) * 1000 for _ in range(2))
    return Hunyuan15Input(x=x, t=t, cond=cond, lengths=lengths, until=until if arch.meanflow else None)
