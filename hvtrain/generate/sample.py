"""From prompts to latents: text encoders, DiT and solver, on all ranks that share a video."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvtrain.adapters.lora import merging
from hvtrain.config import GenerateConfig, ModelConfig, asset
from hvtrain.errors import ConfigError
from hvtrain.flow.guidance import classifier_free
from hvtrain.flow.schedule import sigmas
from hvtrain.flow.solvers import Velocity, euler
from hvtrain.generate.plan import Plan
from hvtrain.generate.progress import Sampling
from hvtrain.generate.requests import Job, Request
from hvtrain.models.base import DiT, Flavor, ModelSpec
from hvtrain.models.fp8 import use_matmul
from hvtrain.models.load import load_dit
from hvtrain.parallel.apply import parallelize
from hvtrain.parallel.context import ParallelContext
from hvtrain.parallel.swap import BlockSwap
from hvtrain.precision import autocast
from hvtrain.rng import generator

Cond = Mapping[str, Tensor]  # "text" [B L E], "text_len" [B], "pooled" [B P]


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
        free(ctx)
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


def sample_all(
    cfg: GenerateConfig, plan: Plan, mine: Sequence[list[Job]], conds: Mapping[str, Cond], ctx: ParallelContext
) -> list[Tensor]:
    """The latents of each batch, on the CPU; the DiT lives in here."""
    model = open_dit(cfg, plan, ctx)
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
    free(ctx)
    return results


def open_dit(cfg: GenerateConfig, plan: Plan, ctx: ParallelContext) -> DiT:
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
        print(f"Ulysses {ctx.ulysses} x ring {ctx.ring}, {kernel.name} attention{swapped}", flush=True)
    return model


def free(ctx: ParallelContext) -> None:
    gc.collect()
    if ctx.device.type == "cuda":
        torch.cuda.empty_cache()
