"""Wan's transformer (arXiv:2503.20314), versions 2.1 and 2.2: parameter names and numerics
of the official implementation.

Video tokens attend to one another, then cross-attend the prompt. Run it in float32, or under bfloat16
autocast: then all that the time touches (embeddings, modulation, the head) and the residual stream are fp32
whatever the weights' dtype, as in the official inference.
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
from hvtrain.models.layers import PatchConv, RMSNorm, modulate, plain_norm
from hvtrain.models.precision import without_autocast
from hvtrain.models.rope import grid_rope, rotate
from hvtrain.models.wan.arch import WanArch
from hvtrain.models.wan.inputs import WanInput

THETA = 10000.0


class WideLinear(nn.Linear):
    """A Linear in fp32 even where its weights are bf16 and autocast is on: the
    path of the time, and the head."""

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x.device.type):
            return F.linear(x.float(), self.weight.float(), self.bias.float())


class WideNorm(nn.LayerNorm):
    """A LayerNorm with parameters, in fp32 on every device; what comes out has the dtype that went in."""

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x.device.type):
            out = F.layer_norm(
                x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps
            )
        return out.to(x.dtype)


class SelfAttention(nn.Module):
    """q and k are normalised over all heads together, so before a sequence-parallel
    `attend` spreads the heads."""

    def __init__(self, arch: WanArch) -> None:
        super().__init__()
        self.n_heads = arch.n_heads
        self.attend: Attend = Attention()
        self.q = nn.Linear(arch.dim, arch.dim)
        self.k = nn.Linear(arch.dim, arch.dim)
        self.v = nn.Linear(arch.dim, arch.dim)
        self.o = nn.Linear(arch.dim, arch.dim)
        self.norm_q = RMSNorm(arch.dim)
        self.norm_k = RMSNorm(arch.dim)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n_heads, -1))  # [B S E] -> [B S N D]

    def forward(self, x: Tensor, tokens: Tokens) -> Tensor:
        v = self.heads(self.v(x))
        q = rotate(self.heads(self.norm_q(self.q(x))), tokens.rope).to(v.dtype)
        k = rotate(self.heads(self.norm_k(self.k(x))), tokens.rope).to(v.dtype)
        none = v[:, :0]  # no text takes part
        joint = (Joint(one, none) for one in (q, k, v))
        return self.o(
            self.attend.joint(
                *joint, txt_len=tokens.txt_len, n_img=tokens.n_img, sparse=tokens.sparse
            ).img.flatten(2)
        )


class CrossAttention(SelfAttention):
    """To the prompt with its padding, and with a softmax of its own to the tokens of a
    picture; the two are added."""

    def __init__(self, arch: WanArch) -> None:
        super().__init__(arch)
        if arch.clip_dim:
            self.k_img = nn.Linear(arch.dim, arch.dim)
            self.v_img = nn.Linear(arch.dim, arch.dim)
            self.norm_k_img = RMSNorm(arch.dim)

    def forward(self, x: Tensor, tokens: Tokens) -> Tensor:
        text, picture = tokens.shared["text"], tokens.shared.get("picture")
        q = self.heads(self.norm_q(self.q(x)))
        out = self.attended(q, self.norm_k(self.k(text)), self.v(text))
        if picture is not None:
            out = out + self.attended(q, self.norm_k_img(self.k_img(picture)), self.v_img(picture))
        return self.o(out.flatten(2))

    def attended(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        lengths = (k.shape[1],) * len(k)
        return self.attend.cross(q.to(v.dtype), self.heads(k).to(v.dtype), self.heads(v), lengths=lengths)


class Block(nn.Module):
    def __init__(self, arch: WanArch) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.zeros(1, 6, arch.dim))
        self.self_attn = SelfAttention(arch)
        self.norm3 = WideNorm(arch.dim, eps=1e-6)
        self.cross_attn = CrossAttention(arch)
        self.ffn = nn.Sequential(
            nn.Linear(arch.dim, arch.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(arch.ffn_dim, arch.dim)
        )

    def forward(self, tokens: Tokens) -> Tokens:
        mod = Modulated(tokens, self.modulation, "e0")
        x = tokens.img.float()  # from here on the residual stream stays fp32
        x = x + mod.gate(self.self_attn(mod.shift_scale(plain_norm(x), 0), tokens), 2)
        x = x + self.cross_attn(self.norm3(x), tokens)
        x = x + mod.gate(self.ffn(mod.shift_scale(plain_norm(x), 3)), 5)
        return replace(tokens, img=x)


class Modulated:
    """Shifts, scales and gates of one block. Where tokens of a clean frame differ, both
    results are made and each token takes one: vectors are [B 1 E] at all times, and no [B S
    E] of them is kept for the backward."""

    def __init__(self, tokens: Tokens, own: Tensor, name: str) -> None:
        """`own` [1 n E]; the time's share is shared[name] [B n E], and of clean
        tokens shared[name + "_clean"]."""
        self.clean = tokens.per_token.get("clean")  # [1 S] or [B S] bool
        names = (name,) if self.clean is None else (name, f"{name}_clean")
        self.vectors = [(own.float() + tokens.shared[each]).split(1, dim=1) for each in names]

    def choose(self, results: Sequence[Tensor]) -> Tensor:
        return (
            results[0] if self.clean is None else torch.where(self.clean[..., None], results[1], results[0])
        )

    def shift_scale(self, x: Tensor, n: int) -> Tensor:
        return self.choose([modulate(x, shift=v[n], scale=v[n + 1]) for v in self.vectors])

    def gate(self, x: Tensor, n: int) -> Tensor:
        return self.choose([x * v[n] for v in self.vectors])


class Head(nn.Module):
    def __init__(self, arch: WanArch) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.zeros(1, 2, arch.dim))
        self.head = WideLinear(arch.dim, arch.out_channels * arch.patch_size)

    def forward(self, tokens: Tokens) -> Tensor:
        return self.head(Modulated(tokens, self.modulation, "e").shift_scale(plain_norm(tokens.img), 0))


class PictureEmbedder(nn.Module):
    """CLIP's tokens [B n clip_dim] -> [B n E]. First and last frame together are told
    apart by a learnt embedding."""

    def __init__(self, arch: WanArch) -> None:
        super().__init__()
        if arch.n_clip:
            self.emb_pos = nn.Parameter(torch.zeros(1, arch.n_clip, arch.clip_dim))
        self.proj = nn.Sequential(
            WideNorm(arch.clip_dim), nn.Linear(arch.clip_dim, arch.clip_dim), nn.GELU(),
            nn.Linear(arch.clip_dim, arch.dim), WideNorm(arch.dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x + self.emb_pos if hasattr(self, "emb_pos") else x)


class Wan(DiT):
    arch: WanArch
    may_be_sparse = True
    blocks: nn.ModuleList  # type: ignore[assignment]

    def __init__(self, arch: WanArch) -> None:
        super().__init__()
        self.arch = arch
        dim = arch.dim
        self.patch_embedding = PatchConv(arch.in_channels, dim, kernel_size=arch.patch, stride=arch.patch)
        self.text_embedding = nn.Sequential(
            nn.Linear(arch.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(WideLinear(arch.freq_dim, dim), nn.SiLU(), WideLinear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), WideLinear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(arch) for _ in range(arch.n_layers))  # type: ignore[assignment]
        self.head = Head(arch)
        if arch.clip_dim:
            self.img_emb = PictureEmbedder(arch)

    def embed(self, inp: WanInput) -> Tokens:
        grid = self.grid(inp.x)
        shared = {"text": self.context(inp.cond["text"]), **self.times(inp.t)}
        if self.arch.clip_dim:
            shared["picture"] = self.img_emb(inp.cond["clip"])
        per_token = {}
        if inp.clean is not None:
            shared |= {
                f"{name}_clean": vector for name, vector in self.times(torch.zeros_like(inp.t)).items()
            }
            per_token["clean"] = inp.clean[:, :: self.arch.patch[0]].repeat_interleave(grid.h * grid.w, dim=1)
        img = self.patch_embedding(inp.x)
        dims = self.arch.rope_dims
        return Tokens(
            img=img,
            txt=img[:, :0],
            txt_len=(0,) * len(img),
            shared=shared,
            per_token=per_token,
            rope=grid_rope(grid, dims, theta=THETA, device=inp.x.device, dtype=torch.float64),
            n_img=img.shape[1],
            grid=grid,
        )

    def context(self, text: Tensor) -> Tensor:
        """[B L text_dim], zero beyond each prompt -> [B text_len E]. What padding
        becomes is attended like words."""
        missing = self.arch.text_len - text.shape[1]
        if missing < 0:
            raise DataError(
                f"a prompt of {text.shape[1]} tokens, at most {self.arch.text_len}; encode the text anew"
            )
        return self.text_embedding(F.pad(text, (0, 0, 0, missing)))

    def times(self, t: Tensor) -> dict[str, Tensor]:
        """[B] -> "e" [B 1 E] for the head, "e0" [B 6 E] for the blocks; fp32."""
        e = self.time_embedding(sinusoid(t, self.arch.freq_dim))
        return {"e": e[:, None], "e0": self.time_projection(e).unflatten(1, (6, -1))}

    def grid(self, x: Tensor) -> Grid:
        patch = self.arch.patch
        if any(n % p for n, p in zip(x.shape[2:], patch, strict=True)):
            raise DataError(
                f"latents of T H W = {tuple(x.shape[2:])} cannot be cut into patches of {patch}; encode "
                "videos of other sizes"
            )
        return Grid(*(n // p for n, p in zip(x.shape[2:], patch, strict=True)))

    def to_patches(self, tokens: Tokens) -> Tensor:
        return self.head(tokens)

    def unpatchify(self, patches: Tensor, grid: Grid) -> Tensor:
        pt, ph, pw = self.arch.patch
        pattern = "b (t h w) (pt ph pw c) -> b c (t pt) (h ph) (w pw)"
        return rearrange(patches, pattern, t=grid.t, h=grid.h, w=grid.w, pt=pt, ph=ph, pw=pw)


def sinusoid(t: Tensor, dim: int) -> Tensor:
    """[B] -> [B dim] fp32, computed in fp64, cosines first."""
    half = dim // 2
    rates = THETA ** -(torch.arange(half, dtype=torch.float64, device=t.device) / half)
    angles = t.double()[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float()


def init_weights(model: DiT, generator: torch.Generator) -> None:
    """Weights for training from scratch, as the official class draws them: the velocity starts as zero."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv3d):
            if name == "head.head":
                nn.init.zeros_(module.weight)
            elif name.startswith(("text_embedding.", "time_embedding.")):
                nn.init.normal_(module.weight, std=0.02, generator=generator)
            else:
                nn.init.xavier_uniform_(module.weight.data.flatten(1), generator=generator)
            nn.init.zeros_(module.bias) if module.bias is not None else None
        elif isinstance(module, RMSNorm | nn.LayerNorm):
            nn.init.ones_(module.weight)
            if isinstance(module, nn.LayerNorm):
                nn.init.zeros_(module.bias)
        elif isinstance(module, Block | Head):
            nn.init.normal_(module.modulation, std=module.modulation.shape[-1] ** -0.5, generator=generator)
        elif isinstance(module, PictureEmbedder) and hasattr(module, "emb_pos"):
            nn.init.zeros_(module.emb_pos)
