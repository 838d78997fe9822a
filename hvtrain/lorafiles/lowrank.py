"""Low-rank factors of a matrix or of a sum of pairs, with the error that cutting makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hvtrain.lorafiles.pairs import LoraPair

_EXACT = 1024  # up to this many rows or columns the full decomposition is affordable


@dataclass(frozen=True)
class Approximation:
    """A pair, and the share of the Frobenius norm that it leaves out."""

    pair: LoraPair
    error: float  # norm of what is missing / norm of the whole
    norm: float


def factor(matrix: Tensor, *, rank: int) -> Approximation:
    """The best pair of this rank for a matrix [out, in] (Eckart-Young), alpha = rank. Randomised above 1024
    rows and columns (Halko et al. 2011, arXiv 0909.4061), with oversampling and power iterations."""
    matrix = matrix.float()
    rank = min(rank, *matrix.shape)
    if min(matrix.shape) <= _EXACT:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        u, s, v = _low_rank(matrix, rank)
        vh = v.T
    total = torch.linalg.matrix_norm(matrix).item()
    return _cut(u, s, vh, rank=rank, total=total)


def _low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """torch.svd_lowrank with a generator of its own: it draws from the global one."""
    n = min(rank + max(8, rank // 2), *matrix.shape)
    draw = torch.Generator(matrix.device).manual_seed(0)
    q = torch.linalg.qr(matrix @ torch.randn(matrix.shape[1], n, generator=draw, device=matrix.device)).Q
    for _ in range(4):
        q = torch.linalg.qr(matrix.T @ q).Q
        q = torch.linalg.qr(matrix @ q).Q
    u, s, vh = torch.linalg.svd(q.T @ matrix, full_matrices=False)
    return q @ u, s, vh.T


def shrink(pairs: Sequence[tuple[LoraPair, float]], *, rank: int) -> Approximation:
    """The best pair of this rank for a weighted sum of pairs. Works on the factors: never makes [out, in]."""
    up = torch.cat([p.up.float() * (m * p.scale) for p, m in pairs], dim=1)  # [out, R]
    down = torch.cat([p.down.float() for p, _ in pairs])  # [R, in]
    qu, ru = torch.linalg.qr(up)
    qd, rd = torch.linalg.qr(down.T)
    u, s, vh = torch.linalg.svd(ru @ rd.T)
    total = torch.linalg.vector_norm(s).item()
    return _cut(qu @ u, s, vh @ qd.T, rank=min(rank, len(s)), total=total)


def rank_for(s: Tensor, share: float) -> int:
    """The smallest rank whose singular values hold this share of the squared norm."""
    energy = s.double().square().cumsum(0)
    if energy[-1] == 0:
        return 1
    return min(len(s), int((energy < share * energy[-1]).sum().item()) + 1)


def singular_values(pair: LoraPair) -> Tensor:
    """Of the pair's delta, largest first."""
    ru = torch.linalg.qr(pair.up.float() * pair.scale).R
    rd = torch.linalg.qr(pair.down.float().T).R
    return torch.linalg.svdvals(ru @ rd.T)


def squared_norm(pair: LoraPair) -> float:
    """Of the pair's delta, sum of its squared values: trace of (up' up) (down down'),
    no larger than rank x rank."""
    up, down = pair.up.double(), pair.down.double()
    return float(((up.T @ up) * (down @ down.T)).sum()) * pair.scale**2


def _cut(u: Tensor, s: Tensor, vh: Tensor, *, rank: int, total: float) -> Approximation:
    root = s[:rank].clamp_min(0).sqrt()
    pair = LoraPair((root[:, None] * vh[:rank]).contiguous(), (u[:, :rank] * root).contiguous(), float(rank))
    kept = s[:rank].double().square().sum().item()
    missing = max(0.0, total * total - kept) ** 0.5
    return Approximation(pair, missing / total if total else 0.0, total)
