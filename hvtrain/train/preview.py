"""Videos made while training, through the same sampler as `hvtrain generate`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from hvtrain.config import TrainConfig
from hvtrain.generate.requests import Request
from hvtrain.generate.sample import encode_prompts, sample_latents
from hvtrain.generate.video import write_mp4
from hvtrain.generate.write import decode
from hvtrain.models.parts import open_vae
from hvtrain.models.precision import autocast
from hvtrain.models.spec import Vae
from hvtrain.parallel.context import ParallelContext
from hvtrain.train.setup import Subject


class Previews:
    """Encodes its prompts once, at the start. Every rank samples every prompt: ZeRO-3 needs them all."""

    def __init__(self, cfg: TrainConfig, subject: Subject, ctx: ParallelContext) -> None:
        self.subject, self.ctx, self.folder = subject, ctx, Path(cfg.run.output_dir) / "previews"
        self.model_cfg, self.autocast = cfg.model, cfg.run.precision == "bf16"
        prompts = cfg.preview.prompts if cfg.preview.every_steps else ()
        self.requests = [
            Request.of(
                subject.flavor, prompt=p.prompt, width=p.width, height=p.height, frames=p.frames, steps=p.steps,
                seed=p.seed, shift=cfg.preview.shift, guidance=cfg.flow.guidance,
            )
            for p in prompts
        ]
        # A negative prompt for each, used by models that are sampled with true guidance.
        texts = [r.prompt for r in self.requests] + [r.negative_prompt for r in self.requests]
        encoded = encode_prompts(cfg.model, subject.spec, subject.flavor, texts, ctx) if prompts else []
        self.conds, self.unconds = encoded[: len(prompts)], encoded[len(prompts) :]
        self.vae: Vae | None = None

    @torch.no_grad()
    def make(self, model: nn.Module, step: int) -> Iterator[tuple[str, np.ndarray, int]]:
        """(name, uint8 frames [F H W 3], fps) of each prompt, on rank 0; the files are written too. Collective."""
        training = model.training
        model.eval()
        for i, (request, cond, uncond) in enumerate(zip(self.requests, self.conds, self.unconds)):
            with autocast(self.ctx.device.type, enabled=self.autocast):
                latents = sample_latents(
                    model, self.subject.spec, self.subject.flavor, cond, request=request, ctx=self.ctx, uncond=uncond
                )
            if self.ctx.is_main:
                self.vae = self.vae or open_vae(self.subject.spec, self.model_cfg, self.ctx.device)
                frames = decode(self.vae, latents)[0]
                self.folder.mkdir(parents=True, exist_ok=True)
                write_mp4(
                    self.folder / f"step{step:08d}_{i}.mp4", frames, fps=request.fps,
                    metadata={"prompt": request.prompt, "seed": request.seed, "step": step},
                )
                yield f"preview/{i}", frames, request.fps
        model.train(training)
        self.ctx.barrier()
