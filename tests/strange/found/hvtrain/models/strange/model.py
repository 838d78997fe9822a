"""A strange transformer: image tokens attend to themselves, then across to words,
letters and what an image looks like.

Every token has a noise level of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from hvtrain.models.attention import Attention
from hvtrain.models.dit import Attend, DiT, Grid, Joint, ModelInput, Tokens
from hvtrain.models.layers import Mlp, RMSNorm, TimeEmbedder, modulate, plain_norm
from hvtrain.models.rope import grid_rope, rotate
from hvtrain.models.strange.arch import CHANNELS, PATCH, SIGHT_TOKENS, StrangeArch


@dataclass(frozen=True)
class StrangeInput(ModelInput):
    clean_first: bool = False  # the first latent frame is given: its tokens have the noise level 0


@dataclass(frozen=True)
class StrangeTokens(Tokens):
    # of each context in `shared`, by sample
    lengths: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


class Block(nn.Module):
    def __init__(self, arch: StrangeArch, contexts: Sequence[str]) -> None:
        super().__init__()
        dim, head = arch.dim, arch.head_dim
        self.n_heads, self.contexts = arch.num_heads, tuple(contexts)
        self.attend: Attend = Attention()
        self.mod = nn.Parameter(torch.empty(6, dim))
        self.self_qkv, self.self_out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.self_q_norm, self.self_k_norm = RMSNorm(head), RMSNorm(head)
        self.cross_q, self.cross_out = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.cross_q_norm = RMSNorm(head)
        for name in contexts:
            self.add_module(f"{name}_kv", nn.Linear(dim, 2 * dim))
        self.ffn = Mlp(dim, arch.ffn_dim, nn.GELU(approximate="tanh"))

    def forward(self, tokens: StrangeTokens) -> StrangeTokens:
        mod = (self.mod + tokens.per_token["mod"]).unbind(2)  # six of [B S E]
        x = tokens.img
        x = x + self._alone(modulate(plain_norm(x), shift=mod[0], scale=mod[1]), tokens) * mod[2]
        x = x + self._across(plain_norm(x), tokens)
        x = x + self.ffn(modulate(plain_norm(x), shift=mod[3], scale=mod[4])) * mod[5]
        return replace(tokens, img=x)

    def _alone(self, x: Tensor, tokens: StrangeTokens) -> Tensor:
        q, k, v = rearrange(self.self_qkv(x), "b s (k n d) -> k b s n d", k=3, n=self.n_heads)
        q, k = rotate(self.self_q_norm(q).to(v), tokens.rope), rotate(self.self_k_norm(k).to(v), tokens.rope)
        nothing = v[:, :0]
        joint = (Joint(part, nothing) for part in (q, k, v))
        return self.self_out(
            self.attend.joint(*joint, txt_len=tokens.txt_len, n_img=tokens.n_img).img.flatten(2)
        )

    def _across(self, x: Tensor, tokens: StrangeTokens) -> Tensor:
        q = rearrange(self.cross_q(x), "b s (n d) -> b s n d", n=self.n_heads)
        q = self.cross_q_norm(q).to(x)
        found = torch.zeros_like(q)
        for name in self.contexts:
            both = self.get_submodule(f"{name}_kv")(tokens.shared[name])
            k, v = rearrange(both, "b l (k n d) -> k b l n d", k=2, n=self.n_heads)
            found = found + self.attend.cross(q.to(k), k, v, lengths=tokens.lengths[name])
        return self.cross_out(found.flatten(2))


class Strange(DiT):
    arch: StrangeArch

    def __init__(self, arch: StrangeArch) -> None:
        super().__init__()
        self.arch = arch
        self.strange_patch = nn.Linear(arch.in_channels * 4, arch.dim)
        self.words_in = nn.Linear(arch.words_dim, arch.dim)
        self.letters_in = nn.Linear(arch.letters_dim, arch.dim)
        contexts = ["words", "letters"]
        if arch.sight_dim is not None:
            self.sight_in = nn.Linear(arch.sight_dim, arch.dim)
            contexts.append("sight")
        self.time_in = TimeEmbedder(arch.dim, frequencies=64)
        self.time_mod = nn.Linear(arch.dim, 6 * arch.dim)
        blocks = nn.ModuleList(Block(arch, contexts) for _ in range(arch.num_layers))
        self.blocks = blocks  # type: ignore[assignment]
        self.head_mod = nn.Linear(arch.dim, 2 * arch.dim)
        self.head_out = nn.Linear(arch.dim, CHANNELS * 4)
        self.contexts = tuple(contexts)

    def embed(self, inp: StrangeInput) -> StrangeTokens:
        pt, ph, pw = PATCH
        patches = rearrange(inp.x, "b c (t pt) (h ph) (w pw) -> b t h w (c pt ph pw)", pt=pt, ph=ph, pw=pw)
        grid = Grid(*patches.shape[1:4])
        n_img, n_samples = grid.t * grid.h * grid.w, len(inp.x)
        t = inp.t[:, None].expand(-1, n_img)  # [B S]
        if inp.clean_first:
            t = t * (torch.arange(n_img, device=t.device) >= grid.h * grid.w)
        time = self.time_in(t.flatten()).unflatten(0, t.shape)
        lengths = {**inp.lengths, "sight": (SIGHT_TOKENS,) * n_samples}
        contexts = {
            name: self.get_submodule(f"{name}_in")(inp.cond[name][:, : max(lengths[name])])
            for name in self.contexts
        }
        return StrangeTokens(
            img=self.strange_patch(patches.flatten(1, 3)),
            rope=grid_rope(grid, self.arch.rope_dims, theta=10000.0, device=inp.x.device),
            n_img=n_img,
            grid=grid,
            txt=patches.new_zeros(n_samples, 0, self.arch.dim),
            txt_len=(0,) * n_samples,
            shared=contexts,
            per_token={"mod": self.time_mod(F.silu(time)).unflatten(-1, (6, -1)), "time": time},
            lengths={name: lengths[name] for name in self.contexts},
        )

    def to_patches(self, tokens: Tokens) -> Tensor:
        shift, scale = self.head_mod(F.silu(tokens.per_token["time"])).chunk(2, dim=-1)
        return self.head_out(modulate(plain_norm(tokens.img), shift=shift, scale=scale))

    def unpatchify(self, patches: Tensor, grid: Grid) -> Tensor:
        pt, ph, pw = PATCH
        pattern = "b (t h w) (c pt ph pw) -> b c (t pt) (h ph) (w pw)"
        return rearrange(patches, pattern, t=grid.t, h=grid.h, w=grid.w, pt=pt, ph=ph, pw=pw)


def init_weights(model: DiT, generator: torch.Generator) -> None:
    """Every block starts as the identity of its image tokens, the velocity as zero."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            if name.endswith(("time_mod", "head_out", "cross_out")):
                nn.init.zeros_(module.weight)
            else:
                nn.init.xavier_uniform_(module.weight, generator=generator)
            nn.init.zeros_(module.bias)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, Block):
            nn.init.zeros_(module.mod)
