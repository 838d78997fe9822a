"""`hvtrain train`: from a config to a trained LoRA or model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from hvtrain.config import TrainConfig
from hvtrain.config.rules import check_train
from hvtrain.parallel.context import ParallelContext, shutdown, start
from hvtrain.train.runlock import Busy, RunLock

if TYPE_CHECKING:
    from hvtrain.train.prepare import Prepared


def run(cfg: TrainConfig, ctx: ParallelContext | None = None) -> int:
    """Train; the exit code is 0 when finished and 75 when a signal asked to stop early (start again to continue)."""
    check_train(cfg)
    from hvtrain.train.calibration import leave_calibration
    from hvtrain.train.checkpoint import step_of
    from hvtrain.train.files import is_finished
    from hvtrain.train.prepare import on_all, prepare, take
    from hvtrain.train.stop import REQUEUE

    own = ctx is None
    ctx = ctx or start(cfg.parallel.ulysses, cfg.parallel.ring)
    prepared = prepare(cfg, ctx)
    cfg = prepared.cfg
    try:
        lock, found = take(cfg, ctx, prepared)
    except Busy as error:
        if not ctx.requeues:
            raise
        # Slurm started this job again while its first life goes on (on a node that was lost): it ends, and then we may.
        if ctx.is_main:
            print(f"{error}; asking Slurm to start this job again later", file=sys.stderr, flush=True)
        return REQUEUE
    with lock:
        over = found is not None and on_all(ctx, lambda: ctx.is_main and is_finished(cfg, found, steps=prepared.steps))
        if over and found is not None and ctx.is_main:
            print(f"nothing to do: {cfg.run.output_dir} is at step {step_of(found)} of {prepared.steps}", flush=True)
        finished = ctx.any(over)
        if not finished:
            torch.set_flush_denormal(ctx.device.type == "cpu")  # subnormal moments of a converged optimizer are slow there
            try:
                finished = _train(cfg, ctx, prepared, lock, found)
            finally:
                torch.set_flush_denormal(False)  # of the whole process, which may have other work after this
        if finished and ctx.is_main and cfg.adapter.type != "none":
            leave_calibration(Path(cfg.run.output_dir), prepared.sets, cfg.data.calibration)
    if own:
        shutdown()
    return 0 if finished else REQUEUE


def _train(cfg: TrainConfig, ctx: ParallelContext, prepared: Prepared, lock: RunLock, found: Path | None) -> bool:
    from hvtrain.fit.oom import explained, is_out_of_memory
    from hvtrain.train.session import Session

    session = None
    try:
        session = Session(cfg, ctx, prepared, lock, found)
        return session.train()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        latents = session.latents if session else ()
        raise explained(error, cfg, ctx, prepared.flavor if session else None, latents) from None
