"""The primitives that diffusion transformers share. Parameter names are those of the official checkpoints."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from hvtrain.models.fused import root_norm


class RMSNorm(nn.Module):
    """Over the last axis: normalise in fp32, cast back, then multiply (the order
    decides the last bf16 digit)."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return root_norm(x, self.weight, self.eps)


class PatchConv(nn.Conv3d):
    """A Conv3d whose kernel is its stride, computed as the linear map that it is
    (bf16 Conv3d is slow on GPUs)."""

    def forward(self, x: Tensor) -> Tensor:
        pt, ph, pw = self.kernel_size
        patches = rearrange(x, "b c (t pt) (h ph) (w pw) -> b (t h w) (c pt ph pw)", pt=pt, ph=ph, pw=pw)
        return F.linear(patches, self.weight.flatten(1), self.bias)


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int, activation: nn.Module) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = activation
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


def frequencies(half: int, *, max_period: float, device: torch.device) -> Tensor:
    """max_period^(-i/half), fp32: the exponent in fp32 as officially, but its exp in
    fp64, so that all machines agree.

    torch's fp32 exp differs in the last bit between CPUs, and one bit moves the angle of a guidance of 6000
    so far that the model's output changes by 1e-5.
    """
    exponent = -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=device) / half
    return exponent.double().exp().float()


class TimeEmbedder(nn.Module):
    """A scalar per sample (time, guidance) to a vector: sinusoid in fp32, then two linears."""

    def __init__(self, width: int, frequencies: int = 256) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        first = self.mlp[0]
        assert isinstance(first, nn.Linear)
        angles = t.float()[:, None] * self.table(t.device)
        # Cosines first, as in DiT, not as in the transformer's paper.
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(first.weight.dtype))

    def table(self, device: torch.device) -> Tensor:
        """[frequencies / 2], fp32."""
        return frequencies(self.frequencies // 2, max_period=10000.0, device=device)


class Modulation(nn.Module):
    """vec [B E] -> [B n*E], split by the caller into shifts, scales and gates."""

    def __init__(self, width: int, n: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, n * width)

    def forward(self, vec: Tensor) -> Tensor:
        return self.linear(F.silu(vec))


def modulate(x: Tensor, *, shift: Tensor, scale: Tensor) -> Tensor:
    """x [B S E]; shift and scale [B 1 E] or per token [B S E]."""
    return x * (1 + scale) + shift


def plain_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm without parameters, in and to fp32: what CUDA's autocast does, here on every device."""
    return F.layer_norm(x.float(), x.shape[-1:], eps=eps)
