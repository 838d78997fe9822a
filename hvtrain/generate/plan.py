"""What a generation will do: all that can be known, and refused, before any weights are read."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import torch

from hvtrain.adapters.attach import linear_shapes
from hvtrain.config import GenerateConfig, asset
from hvtrain.errors import ConfigError, DataError
from hvtrain.generate import spool
from hvtrain.generate.check import check_memory, check_outputs, check_parts, on_main
from hvtrain.generate.identity import Sources, sources_of
from hvtrain.generate.loras import open_loras
from hvtrain.generate.requests import Job, batches, plan_jobs
from hvtrain.generate.video import read_metadata
from hvtrain.lorafiles.files import LoraFile
from hvtrain.models.dit import DiT
from hvtrain.models.kernels import pick_kernel
from hvtrain.models.load import Identified, identify, whole_model
from hvtrain.models.spec import Flavor, ModelSpec
from hvtrain.parallel import xfuser_path
from hvtrain.parallel.context import ParallelContext, check_heads
from hvtrain.parallel.swap import swap_savings
from hvtrain.weights.containers import fingerprint


@dataclass(frozen=True)
class Lot:
    """Videos that are sampled together, from `step` on: 0, or where a run before was stopped, or all: only to be decoded."""

    jobs: list[Job]
    step: int

    @property
    def n_left(self) -> int:
        return self.jobs[0].request.steps - self.step


@dataclass(frozen=True)
class Plan:
    """What to make with what."""

    spec: ModelSpec
    flavor: Flavor
    jobs: list[Job]
    lots: list[Lot]  # what is left to do; each group of ranks takes every dp-th
    loras: list[tuple[LoraFile, float]]
    layers: dict[str, tuple[int, int]]  # [out, in] of every Linear
    sources: Sources


def make_plan(cfg: GenerateConfig, ctx: ParallelContext) -> Plan:
    """Reads the LoRA files, the headers of all other parts, and what a run before has left. Collective."""
    found = identify(asset(str(cfg.model.dit)), model=cfg.model.name, flavor=cfg.model.flavor)
    spec, flavor = found.spec, found.flavor
    if foreign := flavor.beyond_text:
        raise ConfigError(
            f"model.flavor: '{flavor.name}' also needs {', '.join(foreign)}, and generate takes only a prompt: "
            "choose a text-to-video flavor (`hvtrain models`)"
        )
    check_heads(flavor.n_heads, ctx.ulysses)
    jobs = plan_jobs(cfg, flavor)
    if len(jobs) < ctx.dp:
        raise ConfigError(
            f"parallel: {len(jobs)} video(s) for {ctx.dp} data-parallel groups of processes; let the processes share "
            f"a video with parallel.ulysses={ctx.world} or parallel.ring={ctx.world}"
        )
    model = _check_dit(found)
    layers = linear_shapes(model)
    _check_placing(cfg, model, ctx)
    size = min(cfg.batch_size, -(-len(jobs) // ctx.dp))  # no group without work
    grouped = batches(jobs, size)
    check_memory(grouped, flavor, layers, n_bytes=2 if cfg.precision == "bf16" else 4, ctx=ctx)
    loras = open_loras(cfg, layers, spec, quiet=not ctx.is_main)

    def look() -> Sources:
        prints = {"dit": fingerprint(found.weights), "flavor": flavor.name, **check_parts(cfg, spec, flavor)}
        return sources_of(cfg, loras, prints)

    sources = on_main(ctx, look)
    lots = on_main(ctx, lambda: remaining(grouped, sources, save_latents=cfg.save_latents))
    left = [job for lot in lots for job in lot.jobs]
    if left:
        sampled = sum(len(lot.jobs) for lot in lots if lot.n_left)
        check_outputs(left, flavor, n_sampled=sampled, decode=cfg.decode, size=size * ctx.dp, ctx=ctx)
    return Plan(spec, flavor, jobs, lots, loras, layers, sources)


def remaining(grouped: list[list[Job]], sources: Sources, *, save_latents: bool = False) -> list[Lot]:
    """What of the batches is still to do. Batches stay as they are, so that a video does not depend on how often the run was
    stopped; only what a run before has carried to other steps is apart."""
    lots = []
    for batch in grouped:
        steps = {}
        for job in batch:
            if _is_there(job, sources):
                spool.forget(job.output, save=save_latents)  # of a run that was killed after it had written the file
                continue
            kept = spool.find(job.output, sources.latents(job.request))
            steps[job.output] = kept.step if kept else 0
        left = sorted((job for job in batch if job.output in steps), key=lambda job: steps[job.output])
        lots += [Lot(list(group), step) for step, group in groupby(left, key=lambda job: steps[job.output])]
    return lots


def _is_there(job: Job, sources: Sources) -> bool:
    """Whether the file is what this run would make."""
    try:
        return job.output.is_file() and read_metadata(job.output).get("identity") == sources.video(job.request)
    except DataError:
        return False


def _check_dit(found: Identified) -> DiT:
    """The model without values, if the file's tensors fit it."""
    return whole_model(found).requires_grad_(False)


def _check_placing(cfg: GenerateConfig, model: DiT, ctx: ParallelContext) -> None:
    """Kernel and swap are refused here as they would be with the weights in memory."""
    if cfg.parallel.kernel == xfuser_path.NAME:
        xfuser_path.refuse(ctx, training=False)
    else:
        compute = torch.bfloat16 if cfg.precision == "bf16" else torch.float32
        pick_kernel(cfg.parallel.kernel, device=ctx.device, dtype=compute, training=False)
    if cfg.blocks_to_swap:
        swap_savings(model.blocks, cfg.blocks_to_swap)
