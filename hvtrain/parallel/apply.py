"""Turn a single-device model into this rank's part of a parallel one, without touching its code."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from copy import copy
from dataclasses import replace

import torch
from torch import nn

from hvtrain.config import SparseConfig
from hvtrain.models.attention import Attention
from hvtrain.models.dit import LOCAL, Attend, DiT
from hvtrain.models.kernels import Kernel, pick_kernel
from hvtrain.models.measure import LONG, Workload
from hvtrain.models.sparse import PatternOrder, check_sparse, pick_sparse
from hvtrain.models.spec import Flavor
from hvtrain.parallel import xfuser_path
from hvtrain.parallel.context import ParallelContext
from hvtrain.parallel.recompute import pick_policy
from hvtrain.parallel.swap import BlockVisits

EXACT = SparseConfig()
log = logging.getLogger(__name__)


def parallelize(
    model: DiT,
    ctx: ParallelContext,
    *,
    kernel: str | Kernel = "auto",
    recompute: str = "none",
    dtype: torch.dtype = torch.float32,
    training: bool = True,
    visits: BlockVisits | None = None,
    compiler: str | None = None,
    sparse: SparseConfig = EXACT,
    work: Workload = LONG,
) -> Kernel:
    """Set the model's token split, every block's attention and how blocks are run. `dtype` is what attention
    computes in (bfloat16 under autocast); `visits` has their weights in place; `compiler` is a backend of
    torch.compile for each block; `sparse` leaves pairs of tokens out; `work`: what "auto" is to be fast at.
    Returns the chosen kernel, whose name the run prints once."""
    check_sparse(sparse, model, ring=ctx.ring, kernel=kernel if isinstance(kernel, str) else kernel.name)
    other = kernel == xfuser_path.NAME
    if other:
        xfuser_path.refuse(ctx, training=training)
    if isinstance(kernel, Kernel):
        chosen = kernel
    else:
        work = work._replace(learns=training)
        chosen = pick_kernel(
            "auto" if other else kernel, device=ctx.device, dtype=dtype, training=training, work=work
        )
    attend: Attention
    if other:
        from hvtrain.parallel.usp import ShardedSequence

        chosen = replace(chosen, name=str(kernel))
        model.sequence, attend = ShardedSequence(ctx), xfuser_path.XfuserAttention(ctx, chosen)
    elif ctx.sp > 1:
        from hvtrain.parallel.usp import ShardedSequence, UspAttention

        model.sequence = ShardedSequence(ctx)
        attend = UspAttention(chosen, ctx=ctx)
    else:
        model.sequence = LOCAL
        attend = Attention(chosen)
    if compiler and other:
        attend = _uncompiled(attend)  # what it sends from rank to rank cannot be traced: compiled around
    _set_attend(model, attend)
    fewer = pick_sparse(sparse, dense=chosen, device=ctx.device, dtype=dtype, training=training)
    model.order = None if fewer is None else PatternOrder(fewer.pattern)
    if fewer is not None:
        for block in model.blocks[fewer.exact_layers :]:
            _set_attend(block, replace(attend, sparse=fewer))
        chosen = replace(chosen, name=f"{fewer.describe()}, else {chosen.name}")
    run_block = pick_policy(recompute)
    for block in model.blocks if compiler else ():
        block.compile(backend=compiler)
    model.run_block = run_block if visits is None else visits.wrap(model.blocks, run_block)
    if ctx.is_main:
        log.info("attention: %s kernel, ulysses %d x ring %d", chosen.name, ctx.ulysses, ctx.ring)
    return chosen


def largest_work(flavor: Flavor, n_tokens: Iterable[int], ctx: ParallelContext) -> Workload:
    """One rank's share of attention in the longest of these clips: a ring shares
    the tokens, Ulysses the heads."""
    longest = max(n_tokens, default=LONG.tokens)
    return Workload(
        -(-longest // ctx.ring), max(1, flavor.n_heads // ctx.ulysses), flavor.arch.head_dim, learns=True
    )


def _set_attend(module: nn.Module, attend: Attend) -> None:
    """To all in it that attend."""
    for part in module.modules():
        if hasattr(part, "attend"):
            # nn.Module's annotations know only tensors and modules
            setattr(part, "attend", attend)  # noqa: B010


def _uncompiled(attend: Attention) -> Attention:
    """The same, that torch.compile does not look into."""
    apart = copy(attend)
    apart.joint = torch.compiler.disable(attend.joint)  # type: ignore[method-assign]
    apart.cross = torch.compiler.disable(attend.cross)  # type: ignore[method-assign]
    return apart
