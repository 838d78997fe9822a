"""Turn a single-device model into this rank's part of a parallel one, without touching its code."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial

import torch

from hvtrain.models.attention import Kernel, local_attend, pick_kernel
from hvtrain.models.base import LOCAL, Attend, DiT
from hvtrain.parallel import xfuser_path
from hvtrain.parallel.context import ParallelContext
from hvtrain.parallel.recompute import pick_policy
from hvtrain.parallel.swap import BlockSwap

log = logging.getLogger(__name__)


def parallelize(
    model: DiT,
    ctx: ParallelContext,
    *,
    kernel: str | Kernel = "auto",
    recompute: str = "none",
    dtype: torch.dtype = torch.float32,
    training: bool = True,
    swap: BlockSwap | None = None,
    compiler: str | None = None,
) -> Kernel:
    """Set the model's token split, every block's attention and how blocks are run. `dtype` is what attention computes
    in (bfloat16 under autocast); `swap` holds weights of the blocks; `compiler` is a backend of torch.compile for each
    block. Returns the chosen kernel, whose name the run prints once."""
    other = kernel == xfuser_path.NAME
    if other:
        xfuser_path.refuse(ctx, training=training)
    if isinstance(kernel, Kernel):
        chosen = kernel
    else:
        chosen = pick_kernel("auto" if other else kernel, device=ctx.device, dtype=dtype, training=training)
    attend: Attend
    if other:
        from hvtrain.parallel.usp import ShardedSequence

        model.sequence, attend, chosen = ShardedSequence(ctx), xfuser_path.xfuser_attend(ctx), replace(chosen, name=str(kernel))
    elif ctx.sp > 1:
        from hvtrain.parallel.usp import ShardedSequence, usp_attend

        model.sequence = ShardedSequence(ctx)
        attend = partial(usp_attend, ctx=ctx, kernel=chosen)
    else:
        model.sequence = LOCAL
        attend = partial(local_attend, kernel=chosen)
    if compiler and (recompute == "selective" or ctx.ring > 1 or other):
        # What is kept between a block's two runs, and messages from rank to rank, cannot be traced: compiled around.
        attend = torch.compiler.disable(attend)
    for block in model.blocks:
        setattr(block, "attend", attend)  # noqa: B010 - nn.Module's annotations know only tensors and modules
        if compiler:
            block.compile(backend=compiler)
    run_block = pick_policy(recompute)
    model.run_block = run_block if swap is None else swap.wrap(model.blocks, run_block)
    if ctx.is_main:
        log.info("attention: %s kernel, ulysses %d x ring %d", chosen.name, ctx.ulysses, ctx.ring)
    return chosen
