"""HunyuanVideo's transformer (arXiv:2412.03603), parameter names and numerics of the official implementation.

Two streams (image, text) with joint attention in the double blocks, one in the single blocks, where image
comes first. Run it in float32, or under bfloat16 autocast: then norms and modulation are fp32 and the
residual stream is bf16, as in the official inference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from hvtrain.errors import DataError
from hvtrain.models.attention import Attention
from hvtrain.models.dit import Attend, DiT, Grid, Joint, Tokens
from hvtrain.models.fused import gated, modulated_norm
from hvtrain.models.hunyuan_video.arch import HunyuanVideoArch
from hvtrain.models.hunyuan_video.inputs import HunyuanInput
from hvtrain.models.layers import Modulation, PatchConv, RMSNorm
from hvtrain.models.rope import grid_rope, rotate
from hvtrain.models.two_stream import ClockEmbedder, FinalLayer, TextEmbedder, TwoStreamBlock


class PatchEmbed(nn.Module):
    def __init__(self, arch: HunyuanVideoArch) -> None:
        super().__init__()
        self.proj = PatchConv(arch.in_channels, arch.hidden_size, kernel_size=arch.patch, stride=arch.patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class PooledEmbedder(nn.Module):
    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(dim, width)
        self.out_layer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class DoubleBlock(TwoStreamBlock):
    def __init__(self, arch: HunyuanVideoArch) -> None:
        super().__init__(arch.hidden_size, {"qkv": 3}, n_heads=arch.heads_num, mlp_dim=arch.mlp_dim)

    def img_modulation(self, tokens: Tokens) -> Sequence[Tensor]:
        return per_token(self.get_submodule("img_mod"), tokens, 6)

    def project(self, stream: str, x: Tensor) -> Sequence[Tensor]:
        return rearrange(
            self.get_submodule(f"{stream}_attn_qkv")(x), "b s (k n d) -> k b s n d", k=3, n=self.n_heads
        ).unbind()


class SingleBlock(nn.Module):
    """Attention and MLP in parallel: linear1 makes q, k, v and the MLP's inside, linear2 closes both."""

    def __init__(self, arch: HunyuanVideoArch) -> None:
        super().__init__()
        width = arch.hidden_size
        self.n_heads = arch.heads_num
        self.sizes = (3 * width, arch.mlp_dim)
        self.attend: Attend = Attention()
        self.linear1 = nn.Linear(width, sum(self.sizes))
        self.linear2 = nn.Linear(width + arch.mlp_dim, width)
        self.q_norm = RMSNorm(arch.head_dim)
        self.k_norm = RMSNorm(arch.head_dim)
        self.modulation = Modulation(width, 3)

    def forward(self, tokens: Tokens) -> Tokens:
        shift, scale, gate = per_token(self.modulation, tokens, 3)
        txt_shift, txt_scale, txt_gate = self.modulation(tokens.shared["vec"])[:, None].chunk(3, dim=-1)
        img = modulated_norm(tokens.img, shift=shift, scale=scale)
        txt = modulated_norm(tokens.txt, shift=txt_shift, scale=txt_scale)
        fused, inside = self.linear1(torch.cat([img, txt], dim=1)).split(self.sizes, dim=-1)
        q, k, v = rearrange(fused, "b s (k n d) -> k b s n d", k=3, n=self.n_heads)
        sizes = [img.shape[1], txt.shape[1]]
        q, k, v = (Joint(*x.split(sizes, dim=1)) for x in (self.q_norm(q).to(v), self.k_norm(k).to(v), v))
        q, k = (Joint(rotate(x.img, tokens.rope), x.txt) for x in (q, k))
        out = self.attend.joint(q, k, v, txt_len=tokens.txt_len, n_img=tokens.n_img, sparse=tokens.sparse)
        attended = torch.cat([out.img, out.txt], dim=1).flatten(2)
        out = self.linear2(torch.cat([attended, F.gelu(inside, approximate="tanh")], dim=-1))
        out_img, out_txt = out.split(sizes, dim=1)
        return replace(tokens, img=gated(tokens.img, out_img, gate), txt=gated(tokens.txt, out_txt, txt_gate))


def per_token(mod: nn.Module, tokens: Tokens, n: int) -> Sequence[Tensor]:
    """The image stream's n modulation vectors [B 1 E]; with a clean first frame [B S
    E], its tokens taking vec0's."""
    main = mod(tokens.shared["vec"])[:, None].chunk(n, dim=-1)
    if "clean" not in tokens.per_token:
        return main
    clean = mod(tokens.shared["vec0"])[:, None].chunk(n, dim=-1)
    chosen = tokens.per_token["clean"][..., None]
    return [torch.where(chosen, a, b) for a, b in zip(clean, main, strict=True)]


class HunyuanVideo(DiT):
    arch: HunyuanVideoArch
    may_be_sparse = True

    def __init__(self, arch: HunyuanVideoArch) -> None:
        super().__init__()
        self.arch = arch
        self.img_in = PatchEmbed(arch)
        width, text = arch.hidden_size, arch.text_dim
        self.txt_in = TextEmbedder(
            text, width, n_heads=arch.heads_num, mlp_dim=arch.mlp_dim, depth=arch.refiner_depth
        )
        self.time_in = ClockEmbedder(arch.hidden_size)
        self.vector_in = PooledEmbedder(arch.pooled_dim, arch.hidden_size)
        if arch.guidance_embed:
            self.guidance_in = ClockEmbedder(arch.hidden_size)
        self.double_blocks = nn.ModuleList(DoubleBlock(arch) for _ in range(arch.double))
        self.single_blocks = nn.ModuleList(SingleBlock(arch) for _ in range(arch.single))
        self.final_layer = FinalLayer(arch.hidden_size, arch.out_channels * arch.patch_size)

    @property
    def blocks(self) -> Sequence[nn.Module]:  # type: ignore[override]  # two lists by their official names
        return [*self.double_blocks, *self.single_blocks]

    def embed(self, inp: HunyuanInput) -> Tokens:
        grid = self.grid(inp.x)
        n_img, n_txt = grid.t * grid.h * grid.w, max(inp.lengths["text"])
        pooled = self.vector_in(inp.cond["pooled"])
        vec = self.time_in(inp.t) + pooled
        if self.arch.guidance_embed:
            vec = vec + self.guidance_in(inp.cond["guidance"])
        tokens = Tokens(
            img=self.img_in(inp.x),
            txt=self.txt_in(inp.cond["text"][:, :n_txt], inp.t, inp.lengths["text"]),
            txt_len=inp.lengths["text"],
            shared={"vec": vec},
            rope=grid_rope(grid, self.arch.rope_dims, theta=self.arch.rope_theta, device=inp.x.device),
            n_img=n_img,
            grid=grid,
        )
        if not inp.token_replace:
            return tokens
        # The clean frame is modulated as at t = 0, and officially without the guidance term.
        clean = torch.arange(n_img, device=inp.x.device)[None] < grid.h * grid.w
        vec0 = self.time_in(torch.zeros_like(inp.t)) + pooled
        return replace(tokens, per_token={"clean": clean}, shared={"vec": vec, "vec0": vec0})

    def grid(self, x: Tensor) -> Grid:
        patch = self.arch.patch
        if any(n % p for n, p in zip(x.shape[2:], patch, strict=True)):
            raise DataError(
                f"latents of T H W = {tuple(x.shape[2:])} cannot be cut into patches of {patch}; encode "
                "videos whose height and width are multiples of 16"
            )
        return Grid(*(n // p for n, p in zip(x.shape[2:], patch, strict=True)))

    def to_patches(self, tokens: Tokens) -> Tensor:
        return self.final_layer(tokens.img, tokens.shared["vec"])

    def unpatchify(self, patches: Tensor, grid: Grid) -> Tensor:
        pt, ph, pw = self.arch.patch
        pattern = "b (t h w) (c pt ph pw) -> b c (t pt) (h ph) (w pw)"
        return rearrange(patches, pattern, t=grid.t, h=grid.h, w=grid.w, pt=pt, ph=ph, pw=pw)
