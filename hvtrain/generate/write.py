"""From latents to files: the VAE and the parameters that go into a file."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hvtrain import __version__
from hvtrain.config import GenerateConfig, ModelConfig, asset
from hvtrain.generate.plan import Plan
from hvtrain.generate.requests import Job, Request
from hvtrain.generate.video import write_mp4
from hvtrain.models.base import ModelSpec
from hvtrain.parallel.context import ParallelContext


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


def write_all(
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
