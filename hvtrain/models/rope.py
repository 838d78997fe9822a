"""Rotary position embedding of a video's token grid (RoFormer, arXiv:2104.09864; one
share of the head per axis)."""

from __future__ import annotations

import torch
from torch import Tensor

from hvtrain.models.dit import Grid, Rope
from hvtrain.models.fused import turned


def grid_rope(
    grid: Grid, dims: tuple[int, int, int], *, theta: float, device: torch.device,
    dtype: torch.dtype = torch.float32
) -> Rope:
    """Tables for the tokens of a grid in t, h, w order. Integer positions from 0; fp32 at least: bf16 cannot
    tell neighbouring positions apart from 256 on."""
    angles = []
    for axis, (n, dim) in enumerate(zip(grid, dims, strict=True)):
        frequencies = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=dtype, device=device) / dim)
        along = torch.outer(torch.arange(n, dtype=dtype, device=device), frequencies)  # [n dim/2]
        shape = [1, 1, 1, dim // 2]
        shape[axis] = n
        angles.append(along.view(shape).expand(*grid, dim // 2))
    table = torch.cat(angles, dim=-1).flatten(0, 2).repeat_interleave(2, dim=-1)  # [S D]
    return Rope(table.cos(), table.sin())


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Turn the pairs (x0, x1), (x2, x3), ... of x [B S N D] by each token's angles,
    in the dtype of the tables."""
    return turned(x, rope.cos, rope.sin)
