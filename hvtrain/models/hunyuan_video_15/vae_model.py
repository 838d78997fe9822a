"""The video VAE's network, 4 x 16 x 16, under the official module names: causal convolutions, and
attention that sees no later frame.

So a clip can pass through in pieces, one latent frame at a time, and come out the same: `Past` holds what
each layer must know of the frames before. Memory then grows with the picture and hardly with the length,
and no temporal tiles are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

# layer -> of the frames before: a convolution's last two, an attention's keys and values
Past = dict[nn.Module, Tensor]


@dataclass(frozen=True)
class VaeArch:
    """Sizes, by the official names."""

    block_out_channels: tuple[int, ...] = (128, 256, 512, 1024, 1024)
    layers_per_block: int = 2
    latent_channels: int = 32
    ffactor_spatial: int = 16
    ffactor_temporal: int = 4
    scaling_factor: float = 1.03682

    @property
    def strides(self) -> list[int]:
        """Of the encoder's steps down, each half in height and width: 2 where it halves the time
        too, which the last ones do."""
        spatial, temporal = (n.bit_length() - 1 for n in (self.ffactor_spatial, self.ffactor_temporal))
        return [1] * (spatial - temporal) + [2] * temporal


class RmsNorm(nn.Module):
    """Over channels, in float32."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x.float(), dim=1).to(x.dtype) * len(self.gamma) ** 0.5 * self.gamma


class CausalConv(nn.Module):
    """3x3x3. Edges are repeated, in time the first frame: a frame depends on itself and two before."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(n_in, n_out, 3)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        before = past[self] if past and self in past else x[:, :, :1].expand(-1, -1, 2, -1, -1)
        x = torch.cat([before, x], dim=2)
        if past is not None:
            past[self] = x[:, :, -2:].clone()
        return self.conv(F.pad(x, (1, 1, 1, 1, 0, 0), mode="replicate"))


class Attention(nn.Module):
    """One head; a frame's cells attend to those of its own and of earlier frames."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = RmsNorm(dim)
        self.q = nn.Conv3d(dim, dim, 1)
        self.k = nn.Conv3d(dim, dim, 1)
        self.v = nn.Conv3d(dim, dim, 1)
        self.proj_out = nn.Conv3d(dim, dim, 1)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        h, cells = self.norm(x), x.shape[3] * x.shape[4]
        q, k, v = (rearrange(f(h), "b c f h w -> b 1 (f h w) c") for f in (self.q, self.k, self.v))
        kv = torch.stack([k, v])
        if past is not None:
            kv = past[self] = torch.cat([past[self], kv], dim=3) if self in past else kv
        earlier = kv.shape[3] - q.shape[2]
        out = []
        for i, one in enumerate(q.split(cells, dim=2)):  # a mask would be quadratic in all cells
            seen = kv[..., : earlier + (i + 1) * cells, :]
            out.append(F.scaled_dot_product_attention(one, seen[0], seen[1]))
        joined = rearrange(torch.cat(out, dim=2), "b 1 (f h w) c -> b c f h w", h=x.shape[3], w=x.shape[4])
        return x + self.proj_out(joined)


class ResnetBlock(nn.Module):
    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = RmsNorm(n_in), CausalConv(n_in, n_out)
        self.norm2, self.conv2 = RmsNorm(n_out), CausalConv(n_out, n_out)
        self.nin_shortcut = nn.Conv3d(n_in, n_out, 1) if n_in != n_out else nn.Identity()

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)), past)
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)), past)


_DEPTH = "b c (f r) (h p) (w q) -> b (r p q c) f h w"  # cells of r x 2 x 2 into channels
_SPACE = "b (r p q c) f h w -> b c (f r) (h p) (w q)"


class Downsample(nn.Module):
    """Cells into channels, beside a shortcut that averages groups of them. The clip's first frame has no
    partner in time: it is counted twice, in the shortcut once."""

    def __init__(self, n_in: int, n_out: int, stride_t: int) -> None:
        super().__init__()
        self.r, self.n_out = stride_t, n_out
        self.conv = CausalConv(n_in, n_out // (4 * stride_t))

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        alone = self.r == 2 and not (past and self.conv in past)
        h = self.conv(x, past)
        if not alone:
            return self._folded(h, self.r) + self._averaged(x, self.r)
        first = self._folded(h[:, :, :1], 1).repeat(1, 2, 1, 1, 1) + self._averaged(x[:, :, :1], 1)
        rest = self._folded(h[:, :, 1:], 2) + self._averaged(x[:, :, 1:], 2)
        return torch.cat([first, rest], dim=2)

    def _folded(self, x: Tensor, r: int) -> Tensor:
        return rearrange(x, _DEPTH, r=r, p=2, q=2)

    def _averaged(self, x: Tensor, r: int) -> Tensor:
        return self._folded(x, r).unflatten(1, (self.n_out, -1)).mean(dim=2)


class Upsample(nn.Module):
    """Channels into cells, beside a shortcut that repeats them. The clip's first
    frame becomes one, not two."""

    def __init__(self, n_in: int, n_out: int, stride_t: int) -> None:
        super().__init__()
        self.r, self.repeats = stride_t, 4 * stride_t * n_out // n_in
        self.conv = CausalConv(n_in, n_out * 4 * stride_t)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        alone = self.r == 2 and not (past and self.conv in past)
        h = self.conv(x, past)
        if self.r == 1:
            return self._spread(h, 1) + self._spread(x.repeat_interleave(self.repeats, dim=1), 1)
        rest = slice(1 if alone else 0, None)
        later = self._spread(h[:, :, rest], 2) + self._spread(x[:, :, rest], 2).repeat_interleave(
            self.repeats, dim=1
        )
        if not alone:
            return later
        # of the channels of each cell
        half = h[:, :, :1].unflatten(1, (4, -1)).chunk(2, dim=2)[0].flatten(1, 2)
        first = self._spread(half, 1) + self._spread(x[:, :, :1], 1).repeat_interleave(
            self.repeats // 2, dim=1
        )
        return torch.cat([first, later], dim=2)

    def _spread(self, x: Tensor, r: int) -> Tensor:
        return rearrange(x, _SPACE, r=r, p=2, q=2)


class Level(nn.Module):
    """Residual blocks of one width, then a change of size; the last level has none."""

    def __init__(self, n_in: int, n_out: int, n_blocks: int, **change: nn.Module) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(n_in if i == 0 else n_out, n_out) for i in range(n_blocks))
        for name, module in change.items():
            self.add_module(name, module)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        for block in self.block:
            x = block(x, past)
        for change in list(self.children())[1:]:
            x = change(x, past)
        return x


class Middle(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = ResnetBlock(dim, dim), Attention(dim), ResnetBlock(dim, dim)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x, past), past), past)


class Encoder(nn.Module):
    def __init__(self, a: VaeArch) -> None:
        super().__init__()
        widths, strides = a.block_out_channels, a.strides
        self.conv_in = CausalConv(3, widths[0])
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):  # a step down widens to the next level
            down = {"downsample": Downsample(width, widths[i + 1], strides[i])} if i < len(strides) else {}
            self.down.append(
                Level(width if i <= len(strides) else widths[i - 1], width, a.layers_per_block, **down)
            )
        self.mid, self.norm_out = Middle(widths[-1]), RmsNorm(widths[-1])
        self.conv_out = CausalConv(widths[-1], 2 * a.latent_channels)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        """[B 3 F H W] -> moments [B 2C T h w]; the first piece of a clip is 1 + 4n frames, others are 4n."""
        x = self.conv_in(x, past)
        for level in self.down:
            x = level(x, past)
        x = self.mid(x, past)
        h = self.conv_out(F.silu(self.norm_out(x)), past)
        return h + x.unflatten(1, (h.shape[1], -1)).mean(dim=2)


class Decoder(nn.Module):
    def __init__(self, a: VaeArch) -> None:
        super().__init__()
        widths, strides = a.block_out_channels[::-1], a.strides[::-1]
        self.conv_in = CausalConv(a.latent_channels, widths[0])
        self.mid = Middle(widths[0])
        self.up = nn.ModuleList()
        for i, width in enumerate(widths):
            up = {"upsample": Upsample(width, widths[i + 1], strides[i])} if i < len(strides) else {}
            self.up.append(
                Level(width if i <= len(strides) else widths[i - 1], width, a.layers_per_block + 1, **up)
            )
        self.norm_out, self.conv_out = RmsNorm(widths[-1]), CausalConv(widths[-1], 3)

    def forward(self, z: Tensor, past: Past | None = None) -> Tensor:
        """[B C T h w] -> [B 3 F H W]"""
        x = self.conv_in(z, past)
        x = x + z.repeat_interleave(x.shape[1] // z.shape[1], dim=1)
        x = self.mid(x, past)
        for level in self.up:
            x = level(x, past)
        return self.conv_out(F.silu(self.norm_out(x)), past)


class Vae15(nn.Module):
    """Encoder and decoder; unscaled latents."""

    def __init__(self, arch: VaeArch) -> None:
        super().__init__()
        self.arch, self.encoder, self.decoder = arch, Encoder(arch), Decoder(arch)

    @property
    def config(self) -> dict[str, Any]:
        """What `save_vae` writes beside the weights."""
        return asdict(self.arch)

    def moments(self, video: Tensor) -> Tensor:
        """[B 3 F H W] -> mean and log variance [B 2C T h w], F = 4n + 1, a latent frame at a time."""
        step = self.arch.ffactor_temporal
        return _in_pieces(
            self.encoder,
            [video[:, :, :1], *(video[:, :, 1:].split(step, dim=2) if video.shape[2] > 1 else ())]
        )

    def frames(self, latents: Tensor) -> Tensor:
        """[B C T h w] -> [B 3 F H W], a latent frame at a time."""
        return _in_pieces(self.decoder, latents.split(1, dim=2))


def _in_pieces(half: nn.Module, pieces: Sequence[Tensor]) -> Tensor:
    past: Past = {}
    return torch.cat([half(piece, past) for piece in pieces], dim=2)
