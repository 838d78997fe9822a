"""`hvtrain train`: from a config to a trained LoRA or model."""

from __future__ import annotations

import torch

from hvtrain.config import TrainConfig
from hvtrain.parallel.context import ParallelContext, shutdown, start
from hvtrain.validate import check_train


def run(cfg: TrainConfig, ctx: ParallelContext | None = None) -> int:
    """Train; the exit code is 0 when finished and 75 when a signal asked to stop early (start again to continue)."""
    check_train(cfg)
    from hvtrain.plan.oom import explained, is_out_of_memory
    from hvtrain.train.session import Session
    from hvtrain.train.stop import REQUEUE

    own = ctx is None
    ctx = ctx or start(cfg.parallel.ulysses, cfg.parallel.ring)
    if ctx.device.type == "cpu":
        torch.set_flush_denormal(True)  # subnormal moments of a converged optimizer are slow on CPUs
    session = None
    try:
        session = Session(cfg, ctx)
        finished = session.train()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        flavor, latents = (session.subject.flavor, session.latents) if session else (None, ())
        raise explained(error, cfg, ctx, flavor, latents) from None
    if own:
        shutdown()
    return 0 if finished else REQUEUE
