"""Collectives with their true adjoints, for autograd.

Convention of the whole engine: the loss is the sum of what the ranks compute, so each rank's gradient of a
replicated value is a partial one and SUM over the sequence-parallel ranks is the whole. It holds only if
the backward of every collective is its mathematical transpose: all-gather <-> reduce-scatter with sum,
all-to-all <-> the inverse all-to-all.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from yunchang.comm.all_to_all import SeqAllToAll4D


def gather(x: Tensor, dim: int, group: dist.ProcessGroup | None) -> Tensor:
    """Concatenate every rank's equal-sized x along dim; the gradient is summed over ranks and cut back."""
    return x if group is None else _Gather.apply(x, dim, group)


def heads_to_ranks(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[B s N D], all heads of a part of the tokens -> [B s*P N/P D], part of the heads of all tokens."""
    return SeqAllToAll4D.apply(group, x, 2, 1)


def tokens_to_ranks(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[B s*P N/P D] -> [B s N D], the inverse of `heads_to_ranks`."""
    return SeqAllToAll4D.apply(group, x, 1, 2)


def _named(name: str, before: str) -> Callable[..., object]:
    """torch 2.13 gave the collectives new names, and warns of the old ones."""
    return getattr(dist, name, None) or getattr(dist, before)


def all_gather(out: Tensor, mine: Tensor, group: dist.ProcessGroup) -> None:
    """Every rank's `mine`, one after the other, into `out`; both contiguous."""
    _named("all_gather_single", "all_gather_into_tensor")(out, mine, group=group)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:  # type: ignore[override]
        ctx.dim, ctx.group = dim, group
        mine = x.transpose(0, dim).contiguous()
        n, *rest = mine.shape
        out = mine.new_empty(n * dist.get_world_size(group), *rest)
        all_gather(out, mine, group)
        return out.transpose(0, dim).contiguous()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        whole = grad.transpose(0, ctx.dim).contiguous()
        n, *rest = whole.shape
        mine = whole.new_empty(n // dist.get_world_size(ctx.group), *rest)
        _named("reduce_scatter_single", "reduce_scatter_tensor")(
            mine, whole, op=dist.ReduceOp.SUM, group=ctx.group
        )
        return mine.transpose(0, ctx.dim).contiguous(), None, None
