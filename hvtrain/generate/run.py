"""From prompts to videos: text encoders, DiT, VAE. Each video is on the disk soon after it is
sampled; its latents are before.

Text and images are encoded by rank 0 and sent to the others. Sequence-parallel ranks walk through one
sampling together and end with the same latents; data-parallel groups take different videos, and the
first rank of each writes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

import torch

from hvtrain.config import GenerateConfig
from hvtrain.config.rules import check_generate
from hvtrain.config.sampling import given
from hvtrain.errors import ConfigError, HvtrainError
from hvtrain.generate.check import check_memory, check_outputs, on_main
from hvtrain.generate.conditions import Conditions, encode_requests
from hvtrain.generate.loras import of_slices, open_loras
from hvtrain.generate.plan import (
    Compute,
    Plan,
    check_placing,
    find_sources,
    open_headers,
    pick_float8,
    remaining,
)
from hvtrain.generate.requests import Job, batches, prompt_jobs, single_job
from hvtrain.generate.sample import sample_lots
from hvtrain.generate.stop import Stop, Stopped
from hvtrain.generate.write import Writer
from hvtrain.models.spec import Flavor
from hvtrain.parallel.context import ParallelContext, check_heads, shutdown, start
from hvtrain.parallel.products import check_products
from hvtrain.weights.containers import fingerprint


def run(cfg: GenerateConfig, ctx: ParallelContext | None = None) -> list[Path]:
    """Make the videos of a config that are not there yet; the files of all, in order.
    Collective: every rank calls it.

    Raises Stopped on every rank after a signal that `hvtrain.stopping.remember` has noted.
    """
    check_generate(cfg)
    if cfg.precision == "fp32" and cfg.model.dtype != "float32":
        raise ConfigError(f"precision fp32 needs model.dtype float32, it is {cfg.model.dtype}")
    own = ctx is None
    ctx = ctx or start(cfg.parallel.ulysses, cfg.parallel.ring)
    plan = _plan(cfg, ctx)
    if ctx.is_main:
        _announce(plan)
    stop, stopped = Stop(ctx), False
    requests = [job.request for lot in plan.lots if lot.n_left for job in lot.jobs]
    conds = encode_requests(requests, plan.spec, plan.flavor, cfg.model, ctx)
    try:
        _make(plan, conds, decode=cfg.decode, save_latents=cfg.save_latents, ctx=ctx, stop=stop)
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


def _plan(cfg: GenerateConfig, ctx: ParallelContext) -> Plan:
    """Reads the LoRA files, the headers of all other parts, and what a run before has left. Collective."""
    model, compute = (
        cfg.model,
        Compute(cfg.precision, cfg.parallel.kernel, cfg.blocks_to_swap, cfg.shard_weights, cfg.sparse)
    )
    dits = open_headers(model)
    flavor = dits.flavor
    check_heads(flavor.n_heads, ctx.ulysses)
    jobs = jobs_of(cfg, flavor)
    if len(jobs) < ctx.dp:
        raise ConfigError(
            f"parallel: {len(jobs)} video(s) for {ctx.dp} data-parallel groups of processes; let the "
            f"processes share a video with parallel.ulysses={ctx.world} or parallel.ring={ctx.world}"
        )
    check_placing(compute, dits.empty, ctx)
    check_products(model.fp8_matmul, model.quantize, device=ctx.device, dtype=compute.dtype)
    size = min(cfg.batch_size, -(-len(jobs) // ctx.dp))  # no group without work
    grouped = batches(jobs, size)
    check_memory(grouped, flavor, dits.layers, n_bytes=compute.dtype.itemsize, ctx=ctx)
    wanted, names = list(cfg.lora), [expert.name for expert in flavor.experts]
    if cfg.slices is not None:
        wanted += of_slices(Path(cfg.slices), cfg.loraid, cfg.lora_multiplier, names)
    bases = {expert.name: fingerprint(dits.files[expert.part].weights) for expert in flavor.experts}
    loras = open_loras(wanted, dits.layers, dits.spec, flavor, quiet=not ctx.is_main, bases=bases)
    float8 = pick_float8(dits, model, jobs, size, ctx, dtype=compute.dtype)
    compute = replace(compute, float8=float8)
    sources = on_main(
        ctx, lambda: find_sources(
            dits, model, loras, jobs, precision=cfg.precision, sparse=cfg.sparse, float8=float8
        )
    )
    lots = on_main(ctx, lambda: remaining(grouped, sources, save_latents=cfg.save_latents))
    left = [job for lot in lots for job in lot.jobs]
    if left:
        # Between two experts, the latents of all wait on the disk.
        decode, sampled = (
            "last" if flavor.experts else cfg.decode, sum(len(lot.jobs) for lot in lots if lot.n_left)
        )
        check_outputs(left, flavor, n_sampled=sampled, decode=decode, size=size * ctx.dp, ctx=ctx)
    return Plan(model, dits, compute, loras, sources, jobs, lots)


def jobs_of(cfg: GenerateConfig, flavor: Flavor) -> list[Job]:
    """The videos that a config asks for, in order."""
    if cfg.prompt_file is not None:
        return prompt_jobs(flavor, given(cfg), prompt_file=cfg.prompt_file, output=cfg.output)
    loras = [asdict(lora) for lora in cfg.lora], cfg.slices, cfg.loraid, cfg.lora_multiplier
    also: tuple[object, ...] = (asdict(cfg.model), cfg.precision, *loras)
    also += (cfg.sparse.sampled,) if cfg.sparse.sampled else ()
    return [single_job(flavor, given(cfg), prompt=cfg.prompt or "", output=cfg.output, also=also)]


def _make(
    plan: Plan, conds: Conditions, *, decode: str, save_latents: bool, ctx: ParallelContext, stop: Stop
) -> None:
    """This group's share. What a run before has sampled is decoded first."""
    mine = plan.lots[ctx.dp_rank :: ctx.dp]
    stop.check()
    with closing(Writer(plan, ctx=ctx, stop=stop, save_latents=save_latents)) as writer:
        for lot in mine:
            if not lot.n_left:
                writer.write(lot)
        beside, waiting = decode == "each", []
        for lot in sample_lots(plan, [lot for lot in mine if lot.n_left], conds, ctx=ctx, stop=stop):
            beside = beside and writer.write(lot, beside=True)
            if not beside:
                waiting.append(lot)
        for lot in waiting:  # the DiT is gone
            writer.write(lot)


def _announce(plan: Plan) -> None:
    """What a run before has left."""
    left = [job for lot in plan.lots for job in lot.jobs]
    there = [job.output for job in plan.jobs if job not in left]
    if there:
        print(
            f"{len(there)} of {len(plan.jobs)} are there already, made with these parameters: "
            f"{_names(there)}", flush=True
        )
    decode = [job.output for lot in plan.lots if not lot.n_left for job in lot.jobs]
    if decode:
        print(
            f"{len(decode)} of {len(plan.jobs)} are sampled already and only decoded: {_names(decode)}",
            flush=True
        )
    for lot in plan.lots:
        if lot.step and lot.n_left:
            outputs = [job.output for job in lot.jobs]
            print(f"{_names(outputs)}: goes on after step {lot.step} of {lot.step + lot.n_left}", flush=True)
    if other := [job.output for job in left if job.output.exists()]:
        print(
            f"{_names(other)}: made with other parameters, and replaced when the new one is there", flush=True
        )


def _names(outputs: Sequence[Path]) -> str:
    shown = ", ".join(path.name for path in outputs[:4])
    return f"{shown}, ..." if len(outputs) > 4 else shown


def _out_of_memory(error: Exception, ctx: ParallelContext) -> HvtrainError:
    return HvtrainError(
        f"out of memory on {ctx.device}: share a video with parallel.ulysses (and shard_weights=true), or "
        "use blocks_to_swap or model.quantize=fp8_scaled (`hvtrain fit --generate` says what fits). "
        f"{str(error).splitlines()[0][:200]}"
    )
