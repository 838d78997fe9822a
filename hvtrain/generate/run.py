"""From prompts to videos: text encoders, DiT, VAE. Each video is on the disk soon after it is sampled; its latents are before.

Text is encoded by rank 0 and sent to the others. Sequence-parallel ranks walk through one sampling together and end
with the same latents; data-parallel groups take different videos, and the first rank of each writes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from hvtrain.config import GenerateConfig
from hvtrain.config.rules import check_generate
from hvtrain.errors import ConfigError, HvtrainError
from hvtrain.generate.check import check_conds
from hvtrain.generate.plan import Plan, make_plan
from hvtrain.generate.sample import Cond, encode_prompts, sample_lots
from hvtrain.generate.stop import Stop, Stopped
from hvtrain.generate.write import Writer
from hvtrain.parallel.context import ParallelContext, shutdown, start


def run(cfg: GenerateConfig, ctx: ParallelContext | None = None) -> list[Path]:
    """Make the videos of a config that are not there yet; the files of all, in order. Collective: every rank calls it.

    Raises Stopped on every rank after a signal that `hvtrain.stopping.remember` has noted.
    """
    check_generate(cfg)
    if cfg.precision == "fp32" and cfg.model.dtype != "float32":
        raise ConfigError(f"precision fp32 needs model.dtype float32, it is {cfg.model.dtype}")
    own = ctx is None
    ctx = ctx or start(cfg.parallel.ulysses, cfg.parallel.ring)
    plan = make_plan(cfg, ctx)
    if ctx.is_main:
        _announce(plan)
    stop, stopped = Stop(ctx), False
    conds = _encode(cfg, plan, ctx)
    try:
        _make(cfg, plan, conds, ctx=ctx, stop=stop)
    except Stopped:
        stopped = True
    except torch.OutOfMemoryError as error:
        raise _out_of_memory(error, ctx) from None
    stop.wait_for_all()
    stopped = ctx.any(stopped)
    if own:
        shutdown()
    if stopped:
        if ctx.is_main:
            print("stopped on request; start again to continue", flush=True)
        raise Stopped
    return [job.output for job in plan.jobs]


def _make(cfg: GenerateConfig, plan: Plan, conds: dict[str, Cond], *, ctx: ParallelContext, stop: Stop) -> None:
    """This group's share. What a run before has sampled is decoded first."""
    mine = plan.lots[ctx.dp_rank :: ctx.dp]
    stop.check()
    writer = Writer(cfg, plan, ctx=ctx, stop=stop)
    for lot in mine:
        if not lot.n_left:
            writer.write(lot)
    beside, waiting = cfg.decode == "each", []
    for lot in sample_lots(cfg, plan, [lot for lot in mine if lot.n_left], conds, ctx=ctx, stop=stop):
        beside = beside and writer.write(lot, beside=True)
        if not beside:
            waiting.append(lot)
    for lot in waiting:  # the DiT is gone
        writer.write(lot)


def _encode(cfg: GenerateConfig, plan: Plan, ctx: ParallelContext) -> dict[str, Cond]:
    """The conditions of each text that is still to be sampled."""
    requests = [job.request for lot in plan.lots if lot.n_left for job in lot.jobs]
    texts = [r.prompt for r in requests] + [r.negative_prompt for r in requests if r.cfg_scale != 1]
    unique = list(dict.fromkeys(texts))
    if not unique:
        return {}
    conds = encode_prompts(cfg.model, plan.spec, plan.flavor, unique, ctx)
    check_conds(conds, plan.spec, plan.flavor)
    return dict(zip(unique, conds, strict=True))


def _announce(plan: Plan) -> None:
    """What a run before has left."""
    left = [job for lot in plan.lots for job in lot.jobs]
    there = [job.output for job in plan.jobs if job not in left]
    if there:
        print(f"{len(there)} of {len(plan.jobs)} are there already, made with these parameters: {_names(there)}", flush=True)
    decode = [job.output for lot in plan.lots if not lot.n_left for job in lot.jobs]
    if decode:
        print(f"{len(decode)} of {len(plan.jobs)} are sampled already and only decoded: {_names(decode)}", flush=True)
    for lot in plan.lots:
        if lot.step and lot.n_left:
            outputs = [job.output for job in lot.jobs]
            print(f"{_names(outputs)}: goes on after step {lot.step} of {lot.step + lot.n_left}", flush=True)
    if other := [job.output for job in left if job.output.exists()]:
        print(f"{_names(other)}: made with other parameters, and replaced when the new one is there", flush=True)


def _names(outputs: Sequence[Path]) -> str:
    shown = ", ".join(path.name for path in outputs[:4])
    return f"{shown}, ..." if len(outputs) > 4 else shown


def _out_of_memory(error: Exception, ctx: ParallelContext) -> HvtrainError:
    return HvtrainError(
        f"out of memory on {ctx.device}: share a video with parallel.ulysses, or use blocks_to_swap or "
        f"model.quantize=fp8_scaled (`hvtrain fit --generate` says what fits). {str(error).splitlines()[0][:200]}"
    )
