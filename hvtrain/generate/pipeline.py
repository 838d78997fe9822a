"""From prompts to videos in three stages, one model in memory at a time: text encoders, DiT, VAE.

Text is encoded by rank 0 and sent to the others. Sequence-parallel ranks walk through one sampling together and end
with the same latents; data-parallel groups take different videos, and the first rank of each writes them.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvtrain import __version__
from hvtrain.adapters.files import LoraFile
from hvtrain.adapters.lora import linear_shapes, merging
from hvtrain.config import GenerateConfig, ModelConfig, asset
from hvtrain.errors import ConfigError
from hvtrain.flow.guidance import classifier_free
from hvtrain.flow.schedule import sigmas
from hvtrain.flow.solvers import Velocity, euler
from hvtrain.generate.loras import open_loras
from hvtrain.generate.progress import Sampling
from hvtrain.generate.requests import Job, Request, batches, plan_jobs
from hvtrain.generate.video import write_mp4
from hvtrain.models.base import DiT, Flavor, ModelSpec
from hvtrain.models.fp8 import use_matmul
from hvtrain.models.load import check, identify, load_dit
from hvtrain.parallel.apply import parallelize
from hvtrain.parallel.context import ParallelContext, check_heads, shutdown, start
from hvtrain.parallel.swap import BlockSwap
from hvtrain.precision import autocast
from hvtrain.rng import generator
from hvtrain.validate import check_generate

Cond = Mapping[str, Tensor]  # "text" [B L E], "text_len" [B], "pooled" [B P]


@dataclass(frozen=True)
class Plan:
    """All that can be known, and refused, before any weights are read."""

    spec: ModelSpec
    flavor: Flavor
    jobs: list[list[Job]]  # batches, all of them; this rank's group takes every dp-th
    loras: list[tuple[LoraFile, float]]
    layers: dict[str, tuple[int, int]]  # [out, in] of every Linear


def run(cfg: GenerateConfig, ctx: ParallelContext | None = None) -> list[Path]:
    """Make the videos of a config; their files, in order. Collective: every rank calls it."""
    check_generate(cfg)
    if cfg.precision == "fp32" and cfg.model.dtype != "float32":
        raise ConfigError(f"precision fp32 needs model.dtype float32, it is {cfg.model.dtype}")
    own = ctx is None
    ctx = ctx or start(cfg.parallel.ulysses, cfg.parallel.ring)
    plan = make_plan(cfg, ctx)
    requests = [job.request for batch in plan.jobs for job in batch]
    texts = [r.prompt for r in requests] + [r.negative_prompt for r in requests if r.cfg_scale != 1]
    unique = list(dict.fromkeys(texts))
    conds = dict(zip(unique, encode_prompts(cfg.model, plan.spec, unique, ctx), strict=True))
    mine = plan.jobs[ctx.dp_rank :: ctx.dp]
    latents = _sample_all(cfg, plan, mine, conds, ctx)
    if ctx.sp_rank == 0:
        _write_all(cfg, plan, mine, latents, ctx)
    ctx.barrier()
    if own:
        shutdown()
    return [job.output for batch in plan.jobs for job in batch]


def make_plan(cfg: GenerateConfig, ctx: ParallelContext) -> Plan:
    """Reads the header of the DiT and the LoRA files."""
    found = identify(asset(str(cfg.model.dit)), model=cfg.model.name, flavor=cfg.model.flavor)
    spec, flavor = found.spec, found.flavor
    if foreign := [field.name for field in flavor.cond if field.column != "text"]:
        raise ConfigError(
            f"model.flavor: '{flavor.name}' also needs {', '.join(foreign)}, and generate takes only a prompt: "
            "choose a text-to-video flavor (`hvtrain models`)"
        )
    check_heads(flavor.arch.heads_num, ctx.ulysses)
    jobs = plan_jobs(cfg, flavor)
    if len(jobs) < ctx.dp:
        raise ConfigError(
            f"parallel: {len(jobs)} video(s) for {ctx.dp} data-parallel groups of processes; let the processes share "
            f"a video with parallel.ulysses={ctx.world} or parallel.ring={ctx.world}"
        )
    with torch.device("meta"):
        model = spec.build(found.arch)
    held = {name: source.shape(found.weights.shapes) for name, source in found.sources.items()}
    check(found.path, {name: tuple(t.shape) for name, t in model.state_dict().items()}, held)
    layers = linear_shapes(model)
    loras = open_loras(cfg, layers, spec, quiet=not ctx.is_main)
    size = min(cfg.batch_size, -(-len(jobs) // ctx.dp))  # no group without work
    return Plan(spec, flavor, batches(jobs, size), loras, layers)


def encode_prompts(
    model: ModelConfig, spec: ModelSpec, prompts: Sequence[str], ctx: ParallelContext
) -> list[dict[str, Tensor]]:
    """Each prompt's conditions as a batch of one, on the CPU. The encoders live on rank 0 only, and not for long."""
    found: list[dict[str, Tensor]] = []
    if ctx.is_main:
        encoders = spec.open_text(
            asset(str(model.llm)),
            None if model.llm_tokenizer is None else asset(model.llm_tokenizer),
            asset(str(model.clip)),
            None if model.clip_tokenizer is None else asset(model.clip_tokenizer),
            dtype=getattr(torch, model.dtype),
            device=ctx.device,
            fp8=model.fp8_llm,
        )
        found = encoders.encode(list(prompts))
        del encoders
        _free(ctx)
    return [
        {name: value[None] for name, value in sample.items()} | {"text_len": torch.tensor([len(sample["text"])])}
        for sample in ctx.gather_objects(found)[0]
    ]


def stack(conds: Sequence[Cond]) -> dict[str, Tensor]:
    """Several conditions as one batch; text is padded with zeros to the longest."""
    longest = max(cond["text"].shape[1] for cond in conds)
    padded = [{**cond, "text": F.pad(cond["text"], (0, 0, 0, longest - cond["text"].shape[1]))} for cond in conds]
    return {name: torch.cat([cond[name] for cond in padded]) for name in padded[0]}


@torch.no_grad()
def sample_latents(
    model: nn.Module,
    spec: ModelSpec,
    flavor: Flavor,
    cond: Cond,
    *,
    request: Request,
    ctx: ParallelContext,
    uncond: Cond | None = None,
    seeds: Sequence[int] = (),
) -> Tensor:
    """Scaled latents [B C T H W], float32, the same on every sequence-parallel rank. Collective among them.

    One video per entry of cond; all take the request's size and schedule, and its seed unless `seeds` has one for
    each. `uncond` holds the negative prompts, as many. The caller chooses autocast.
    """
    seeds = seeds or [request.seed]
    if len(seeds) != len(cond["text_len"]):
        raise ValueError(f"{len(seeds)} seeds for {len(cond['text_len'])} prompts")
    if uncond is None and request.cfg_scale != 1:
        raise ConfigError(f"cfg_scale {request.cfg_scale} needs a negative prompt's conditions; set it to 1 without")

    def velocity_under(condition: Cond) -> Velocity:
        here = {name: value.to(ctx.device) for name, value in condition.items()}

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            return model(spec.make_input(x, sigma, here, task=flavor.tasks[0], guidance=request.guidance))

        return velocity

    velocity = velocity_under(cond)
    if uncond is not None and request.cfg_scale != 1:
        velocity = classifier_free(velocity, velocity_under(uncond), request.cfg_scale)
    shape = flavor.latent.shape(frames=request.frames, height=request.height, width=request.width)
    # On the CPU whatever the device, and per video: neither the machine nor the batch changes a seed's video.
    noise = torch.stack([torch.randn(shape, generator=generator(seed, stream="video")) for seed in seeds])
    return euler(velocity, noise.to(ctx.device), sigmas(request.steps, shift=request.shift))


def open_decoder(model: ModelConfig, spec: ModelSpec, ctx: ParallelContext) -> Any:
    return spec.open_vae(
        asset(str(model.vae)), dtype=getattr(torch, model.vae_dtype), device=ctx.device, tiling=model.vae_tiling
    )


def decode(vae: Any, latents: Tensor) -> list[np.ndarray]:
    """Each video's frames, uint8 [F H W 3]; one video at a time goes through the VAE."""
    videos = []
    for one in latents.split(1):
        pixels = (vae.decode(one)[0] * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)  # [3 F H W]
        videos.append(pixels.permute(1, 2, 3, 0).cpu().numpy())
    return videos


def _sample_all(
    cfg: GenerateConfig, plan: Plan, mine: Sequence[list[Job]], conds: Mapping[str, Cond], ctx: ParallelContext
) -> list[Tensor]:
    """The latents of each batch, on the CPU; the DiT lives in here."""
    model = _open_dit(cfg, plan, ctx)
    results = []
    total = sum(batch[0].request.steps for batch in mine)
    with Sampling(total, show=ctx.is_main) as progress:
        model.register_forward_hook(progress.step)
        for batch in mine:
            first = batch[0].request
            guided = first.cfg_scale != 1
            progress.start(first.steps * (2 if guided else 1), steps=first.steps)
            with autocast(ctx.device.type, enabled=cfg.precision == "bf16"):
                latents = sample_latents(
                    model,
                    plan.spec,
                    plan.flavor,
                    stack([conds[job.request.prompt] for job in batch]),
                    request=first,
                    ctx=ctx,
                    uncond=stack([conds[job.request.negative_prompt] for job in batch]) if guided else None,
                    seeds=[job.request.seed for job in batch],
                )
            results.append(latents.cpu())
    del model
    _free(ctx)
    return results


def _open_dit(cfg: GenerateConfig, plan: Plan, ctx: ParallelContext) -> DiT:
    use_matmul(cfg.model.fp8_matmul)
    loaded = load_dit(
        asset(str(cfg.model.dit)),
        model=cfg.model.name,
        flavor=cfg.model.flavor,
        dtype=getattr(torch, cfg.model.dtype),
        device="cpu" if cfg.blocks_to_swap else ctx.device,  # what is to be swapped must not fill the device first
        quantize_to=cfg.model.quantize,
        edit=merging(plan.layers, plan.loras),
    )
    model = loaded.model.eval().requires_grad_(False)
    swap = BlockSwap(model.blocks, cfg.blocks_to_swap, ctx.device) if cfg.blocks_to_swap else None
    model.to(ctx.device)
    compute = torch.bfloat16 if cfg.precision == "bf16" else torch.float32
    kernel = parallelize(model, ctx, kernel=cfg.parallel.kernel, dtype=compute, training=False, swap=swap)
    if ctx.is_main:
        swapped = f", {swap.describe()}" if swap else ""
        print(f"{ctx.device_name}, Ulysses {ctx.ulysses} x ring {ctx.ring}, {kernel.name} attention{swapped}", flush=True)
    return model


def _write_all(
    cfg: GenerateConfig, plan: Plan, mine: Sequence[list[Job]], latents: Sequence[Tensor], ctx: ParallelContext
) -> None:
    started = time.monotonic()
    vae = open_decoder(cfg.model, plan.spec, ctx)
    for batch, values in zip(mine, latents, strict=True):
        for job, frames in zip(batch, decode(vae, values), strict=True):
            write_mp4(job.output, frames, fps=job.request.fps, metadata=parameters(cfg, plan, job.request))
            print(f"{job.output}", flush=True)
    if ctx.is_main:
        print(f"decoded and written in {time.monotonic() - started:.1f} s", flush=True)


def parameters(cfg: GenerateConfig, plan: Plan, request: Request) -> dict[str, Any]:
    """What goes into a video file: enough to make the same video again."""
    return {
        **asdict(request),
        "model": plan.spec.name,
        "flavor": plan.flavor.name,
        "dit": Path(str(cfg.model.dit)).name,
        "lora": [{"file": Path(lora.path).name, "multiplier": factor} for lora, factor in plan.loras],
        "precision": cfg.precision,
        "hvtrain": __version__,
    }


def _free(ctx: ParallelContext) -> None:
    gc.collect()
    if ctx.device.type == "cuda":
        torch.cuda.empty_cache()
