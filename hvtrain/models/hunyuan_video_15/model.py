"""HunyuanVideo 1.5's transformer (arXiv:2511.18870), parameter names and numerics
of the official implementation.

Two streams with joint attention in every block: the video, and beside it what it is told by, in this order:
what a picture looks like, letters to be written, the prompt. Run it in float32, or under bfloat16 autocast:
then norms and modulation are fp32 and the residual stream is bf16, as in the official inference.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from hvtrain.models.dit import DiT, Grid, Tokens
from hvtrain.models.hunyuan_video_15.arch import HunyuanVideo15Arch
from hvtrain.models.hunyuan_video_15.inputs import Hunyuan15Input
from hvtrain.models.layers import PatchConv, TimeEmbedder
from hvtrain.models.precision import under_autocast
from hvtrain.models.rope import grid_rope
from hvtrain.models.two_stream import FinalLayer, TextEmbedder, TwoStreamBlock

KINDS = ("text", "glyph", "vision")  # in the order of the embedding's rows


class Clock(TimeEmbedder):
    """A time to a vector. Of a near-tie in the frequency table the released code's outputs
    (tests/oracles) have the other neighbour, on the machine where most of them were made; on GPUs
    the last bit is as arbitrary."""

    def table(self, device: torch.device) -> Tensor:
        table = super().table(device)
        table[12] = 0.4216965138912201
        return table


class PatchEmbed(nn.Module):
    def __init__(self, arch: HunyuanVideo15Arch) -> None:
        super().__init__()
        self.proj = PatchConv(arch.in_channels, arch.hidden_size, kernel_size=(1, 1, 1), stride=(1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Norm(nn.LayerNorm):
    """Under autocast in and to fp32, whatever the weights' dtype: what CUDA's does, here on every device."""

    def forward(self, x: Tensor) -> Tensor:
        if not under_autocast(x.device.type):
            return super().forward(x)
        return F.layer_norm(
            x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps
        )


class GlyphEmbedder(nn.Module):
    """ByT5's states [B L glyph_dim] -> [B L E]."""

    def __init__(self, arch: HunyuanVideo15Arch) -> None:
        super().__init__()
        self.layernorm = Norm(arch.glyph_dim)
        self.fc1 = nn.Linear(arch.glyph_dim, arch.glyph_hidden)
        self.fc2 = nn.Linear(arch.glyph_hidden, arch.glyph_hidden)
        self.fc3 = nn.Linear(arch.glyph_hidden, arch.hidden_size)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.act(self.fc2(self.act(self.fc1(self.layernorm(x))))))


class VisionEmbedder(nn.Module):
    """SigLIP's tokens [B L vision_dim] -> [B L E]."""

    def __init__(self, arch: HunyuanVideo15Arch) -> None:
        super().__init__()
        dim, width = arch.vision_dim, arch.hidden_size
        self.proj = nn.Sequential(
            Norm(dim), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, width), Norm(width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class DoubleBlock(TwoStreamBlock):
    def __init__(self, arch: HunyuanVideo15Arch) -> None:
        super().__init__(
            arch.hidden_size, dict.fromkeys("qkv", 1), n_heads=arch.heads_num, mlp_dim=arch.mlp_dim
        )

    def project(self, stream: str, x: Tensor) -> Sequence[Tensor]:
        return [
            self.get_submodule(f"{stream}_attn_{part}")(x).unflatten(-1, (self.n_heads, -1)) for part in "qkv"
        ]


class HunyuanVideo15(DiT):
    arch: HunyuanVideo15Arch
    may_be_sparse = True

    def __init__(self, arch: HunyuanVideo15Arch) -> None:
        super().__init__()
        self.arch = arch
        width = arch.hidden_size
        self.img_in = PatchEmbed(arch)
        self.txt_in = TextEmbedder(
            arch.text_dim, width, n_heads=arch.heads_num, mlp_dim=arch.mlp_dim, depth=arch.refiner_depth,
            clock=Clock
        )
        self.byt5_in = GlyphEmbedder(arch)
        self.vision_in = VisionEmbedder(arch)
        self.cond_type_embedding = nn.Embedding(len(KINDS), width)
        self.time_in = Clock(width)
        if arch.meanflow:
            self.time_r_in = Clock(width)
        self.double_blocks = nn.ModuleList(DoubleBlock(arch) for _ in range(arch.double))
        self.final_layer = FinalLayer(width, arch.out_channels)

    @property
    def blocks(self) -> Sequence[nn.Module]:  # type: ignore[override]  # by their official name
        return self.double_blocks  # type: ignore[return-value]

    def embed(self, inp: Hunyuan15Input) -> Tokens:
        grid = Grid(*inp.x.shape[2:])
        vec = self.time_in(inp.t)
        if self.arch.meanflow:
            vec = vec + self.time_r_in(inp.t if inp.until is None else inp.until)
        txt, txt_len = self.told(inp)
        return Tokens(
            img=self.img_in(inp.x),
            txt=txt,
            txt_len=txt_len,
            shared={"vec": vec},
            rope=grid_rope(grid, self.arch.rope_dims, theta=self.arch.rope_theta, device=inp.x.device),
            n_img=grid.t * grid.h * grid.w,
            grid=grid,
        )

    def told(self, inp: Hunyuan15Input) -> tuple[Tensor, tuple[int, ...]]:
        """[B L E] and each sample's length: its picture, its letters and its prompt without gaps, then zeros.

        A sample without a picture or letters is told nothing in their place. Their layers run all the same:
        with gradients of zero, ranks with such samples do not keep others waiting.
        """
        rows = self.cond_type_embedding(torch.arange(len(KINDS), device=inp.x.device))
        n, made = len(inp.x), {}
        lengths = {kind: inp.lengths.get(kind, (0,) * n) for kind in KINDS}
        for kind, row in zip(KINDS, rows, strict=True):
            if kind == "text":
                made[kind] = row + self.txt_in(inp.cond[kind][:, : max(lengths[kind])], inp.t, lengths[kind])
                continue
            states = inp.cond[kind] if kind in inp.cond else inp.x.new_zeros(n, 0, self.arch.vision_dim)
            embed = self.byt5_in if kind == "glyph" else self.vision_in
            made[kind] = row + embed(states[:, : max(lengths[kind])])
        samples = [
            torch.cat([made[kind][i, : lengths[kind][i]] for kind in reversed(KINDS)]) for i in range(n)
        ]
        return pad_sequence(samples, batch_first=True), tuple(len(sample) for sample in samples)

    def to_patches(self, tokens: Tokens) -> Tensor:
        # What the last block makes of the prompt is not read. As zeros it is, so that its
        # layers get gradients, of zero.
        img = tokens.img + 0 * tokens.txt[:, :1]
        return self.final_layer(img, tokens.shared["vec"])

    def unpatchify(self, patches: Tensor, grid: Grid) -> Tensor:
        return rearrange(patches, "b (t h w) c -> b c t h w", t=grid.t, h=grid.h, w=grid.w)
