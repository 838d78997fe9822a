"""What two-stream transformers share: the block of two streams, and around the blocks the clock, the refiner
of the text and the last layer; their names in diffusers, and their first weights. Parameter names are those
of the official checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from hvtrain.models.attention import Attention
from hvtrain.models.dit import Attend, DiT, Joint, Tokens
from hvtrain.models.fused import gated, modulated_norm
from hvtrain.models.layers import Mlp, Modulation, RMSNorm, TimeEmbedder, modulate, plain_norm
from hvtrain.models.rope import rotate
from hvtrain.weights.keymap import Rule


class ClockEmbedder(TimeEmbedder):
    """A time or guidance to a vector. Of a near-tie in the frequency table, the released code's outputs
    (tests/oracles) tell that it has the other neighbour; on GPUs the last bit is as arbitrary."""

    def table(self, device: torch.device) -> Tensor:
        table = super().table(device)
        table[13] = 0.3924189805984497
        return table


class ContextEmbedder(nn.Module):
    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(dim, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class TwoStreamBlock(nn.Module):
    """Two streams with weights of their own and one attention. The parameters' names
    tell the stream: img_*, txt_*.

    `into`: the layers that make q, k and v, each of how many of them.
    """

    def __init__(self, width: int, into: Mapping[str, int], *, n_heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.attend: Attend = Attention()
        for stream in ("img", "txt"):
            self.add_module(f"{stream}_mod", Modulation(width, 6))
            for name, n in into.items():
                self.add_module(f"{stream}_attn_{name}", nn.Linear(width, n * width))
            self.add_module(f"{stream}_attn_q_norm", RMSNorm(width // n_heads))
            self.add_module(f"{stream}_attn_k_norm", RMSNorm(width // n_heads))
            self.add_module(f"{stream}_attn_proj", nn.Linear(width, width))
            self.add_module(f"{stream}_mlp", Mlp(width, mlp_dim, nn.GELU(approximate="tanh")))

    def forward(self, tokens: Tokens) -> Tokens:
        img_mod = self.img_modulation(tokens)
        txt_mod = self.get_submodule("txt_mod")(tokens.shared["vec"])[:, None].chunk(6, dim=-1)
        q, k, v = self.qkv("img", tokens.img, img_mod)
        q, k = rotate(q, tokens.rope), rotate(k, tokens.rope)
        joint = (Joint(*pair) for pair in zip((q, k, v), self.qkv("txt", tokens.txt, txt_mod), strict=True))
        out = self.attend.joint(*joint, txt_len=tokens.txt_len, n_img=tokens.n_img, sparse=tokens.sparse)
        txt = self.finish("txt", tokens.txt, out.txt, txt_mod)
        # last, so that its last product is not computed again
        img = self.finish("img", tokens.img, out.img, img_mod)
        return replace(tokens, img=img, txt=txt)

    def img_modulation(self, tokens: Tokens) -> Sequence[Tensor]:
        """Shift, scale and gate of attention, then of the MLP: six of [B 1 E], or
        [B S E] where tokens differ."""
        return self.get_submodule("img_mod")(tokens.shared["vec"])[:, None].chunk(6, dim=-1)

    def project(self, stream: str, x: Tensor) -> Sequence[Tensor]:
        """[B S E] -> q, k, v, each [B S N D]."""
        raise NotImplementedError

    def qkv(self, stream: str, x: Tensor, mod: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        part = self.get_submodule
        q, k, v = self.project(stream, modulated_norm(x, shift=mod[0], scale=mod[1]))
        return part(f"{stream}_attn_q_norm")(q).to(v), part(f"{stream}_attn_k_norm")(k).to(v), v

    def finish(self, stream: str, x: Tensor, attended: Tensor, mod: Sequence[Tensor]) -> Tensor:
        x = gated(x, self.get_submodule(f"{stream}_attn_proj")(attended.flatten(2)), mod[2])
        return gated(
            x, self.get_submodule(f"{stream}_mlp")(modulated_norm(x, shift=mod[3], scale=mod[4])), mod[5]
        )


def diffusers_block(here: str, there: str) -> Iterator[Rule]:
    """The names of such a block, but for q, k and v."""
    for stream, norm, ff, mod, proj in (
        ("img", "norm", "ff", "norm1", "to_out.0"),
        ("txt", "norm_added", "ff_context", "norm1_context", "to_add_out"),
    ):  # fmt: skip
        yield Rule(f"{here}.{stream}_mod.linear", (f"{there}.{mod}.linear",))
        for part in "qk":
            yield Rule(f"{here}.{stream}_attn_{part}_norm", (f"{there}.attn.{norm}_{part}",))
        yield Rule(f"{here}.{stream}_attn_proj", (f"{there}.attn.{proj}",))
        yield Rule(f"{here}.{stream}_mlp.fc1", (f"{there}.{ff}.net.0.proj",))
        yield Rule(f"{here}.{stream}_mlp.fc2", (f"{there}.{ff}.net.2",))


class RefinerBlock(nn.Module):
    """Self-attention of the text among itself; modulated by gates only. No q/k norm, no rotary embedding."""

    def __init__(self, width: int, n_heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.attend: Attend = Attention()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.self_attn_qkv = nn.Linear(width, 3 * width)
        self.self_attn_proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, mlp_dim, nn.SiLU())
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor, txt_len: tuple[int, ...]) -> Tensor:
        gate_attn, gate_mlp = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        q, k, v = (
            rearrange(self.self_attn_qkv(self.norm1(x)), "b l (k n d) -> k b l n d", k=3, n=self.n_heads)
        )
        # The official mask lets padding attend to token 0, which no valid token
        # ever sees: dropping it is equal.
        attended = self.attend.cross(q, k, v, lengths=txt_len).flatten(2)
        x = x + self.self_attn_proj(attended) * gate_attn
        return x + self.mlp(self.norm2(x)) * gate_mlp


class TokenRefiner(nn.Module):
    def __init__(self, width: int, *, n_heads: int, mlp_dim: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(RefinerBlock(width, n_heads, mlp_dim) for _ in range(depth))


class TextEmbedder(nn.Module):
    """A language model's states [B L dim] to the text stream [B L E], refined knowing t
    and the mean of the states."""

    def __init__(
        self, dim: int, width: int, *, n_heads: int, mlp_dim: int, depth: int,
        clock: type[TimeEmbedder] = ClockEmbedder
    ) -> None:
        super().__init__()
        self.input_embedder = nn.Linear(dim, width)
        self.t_embedder = clock(width)
        self.c_embedder = ContextEmbedder(dim, width)
        self.individual_token_refiner = TokenRefiner(width, n_heads=n_heads, mlp_dim=mlp_dim, depth=depth)

    def forward(self, text: Tensor, t: Tensor, txt_len: tuple[int, ...]) -> Tensor:
        n = torch.tensor(txt_len, device=text.device)
        valid = (torch.arange(text.shape[1], device=text.device) < n[:, None]).float()  # [B L]
        mean = (text * valid[..., None]).sum(1) / valid.sum(1, keepdim=True)
        c = self.t_embedder(t) + self.c_embedder(mean)
        x = self.input_embedder(text)
        for block in self.individual_token_refiner.blocks:
            x = block(x, c, txt_len)
        return x


class FinalLayer(nn.Module):
    def __init__(self, width: int, n_out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, n_out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)
        return self.linear(modulate(plain_norm(x), shift=shift, scale=scale))


def init_weights(model: DiT, generator: torch.Generator) -> None:
    """Weights for training from scratch, as in DiT (arXiv:2212.09748): every block starts as the identity and
    the velocity as zero, because modulation, gates and the last layer are zero."""
    zero = ("_mod.linear", "modulation.linear", "adaLN_modulation.1", "final_layer.linear")
    embedder = (
        "time_in.", "time_r_in.", "vector_in.", "guidance_in.", "txt_in.t_embedder.", "txt_in.c_embedder."
    )
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv3d):
            if name.endswith(zero):
                nn.init.zeros_(module.weight)
            elif name.startswith(embedder):
                nn.init.normal_(module.weight, std=0.02, generator=generator)
            else:
                nn.init.xavier_uniform_(module.weight.data.flatten(1), generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.zeros_(module.weight)
        elif isinstance(module, RMSNorm | nn.LayerNorm):
            nn.init.ones_(module.weight)
            if isinstance(module, nn.LayerNorm):
                nn.init.zeros_(module.bias)
