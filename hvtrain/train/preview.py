"""Videos made while training, through the same sampler as `hvtrain generate`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hvtrain.config import ModelConfig, PreviewConfig, SparseConfig
from hvtrain.config.sampling import given
from hvtrain.errors import ConfigError
from hvtrain.generate.conditions import check_own_columns, encode_requests, free, read_image
from hvtrain.generate.requests import Request, ending, lacks, read_prompts
from hvtrain.generate.sample import Models, sample_latents
from hvtrain.generate.video import write_png, write_video
from hvtrain.generate.write import decode
from hvtrain.models.conditions import batch_of_one
from hvtrain.models.parts import open_text, open_vae
from hvtrain.models.precision import autocast
from hvtrain.models.spec import Flavor, ModelSpec, Vae
from hvtrain.parallel.context import ParallelContext
from shards import ShardSet

_COLUMNS, _HEIGHT = 6, 256  # of the picture of all previews: frames of a video, pixels of one at most


@dataclass(frozen=True)
class Preview:
    """A video to make again and again."""

    request: Request
    begins: Opening | None = None  # instead of an image


@dataclass(frozen=True)
class Opening:
    """One of a shard set's, whose own latents a video begins with."""

    found: ShardSet
    index: int

    def fields(self, flavor: Flavor, device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
        """What the flavor is conditioned on beside the text, without the batch,
        and its latents [1 C T H W]."""
        columns = tuple(c for c in flavor.columns if c in self.found.manifest.columns and c != "text")
        tensors = self.found.get(self.index, columns).tensors
        whole = {
            name: value.float() if value.is_floating_point() else value for name, value in tensors.items()
        }
        return (
            {name: whole[name] for name in flavor.beyond_text if name in whole},
            whole["latents"][None].to(device)
        )


def plan_previews(
    preview: PreviewConfig, model: ModelConfig, spec: ModelSpec, flavor: Flavor, *, guidance: float | None,
    sets: Sequence[ShardSet],
) -> list[Preview]:
    """What to make, refused before any weights are read. `sets`: where an image is taken from
    that a prompt does not give."""
    if not preview.wanted:
        return []
    plans = []
    if flavor.sees:
        open_text(spec, model, "meta", flavor)  # its vision tower may be missing
    for where, own in _prompts(preview):
        asked = {"guidance": guidance, **given(preview), **own}
        begins = None
        try:
            request = Request.of(flavor, **asked)
        except ConfigError as error:
            raise ConfigError(f"{where}{error}") from None
        if lacks(request, flavor):
            begins, size = _begin(sets, asked, where=where.rstrip(".: "))
            request = Request.of(flavor, **{**asked, **size, "image": None, "end_image": None})
        elif request.images:
            check_own_columns(spec, flavor, model)
            for path in request.images.values():
                read_image(path, width=request.width, height=request.height)
        plans.append(Preview(request, begins))
    return plans


def _prompts(preview: PreviewConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """(what an error begins with, values) of each. Those of a file have the seeds that
    `hvtrain generate` gives them."""
    for i, prompt in enumerate(preview.prompts):
        yield f"preview.prompts[{i}].", {"prompt": prompt.prompt, **given(prompt)}
    if preview.prompt_file is not None:
        for i, (where, values) in enumerate(read_prompts(Path(preview.prompt_file))):
            yield f"{where}: ", {"seed": (preview.seed or 0) + i, **values}


def _begin(sets: Sequence[ShardSet], asked: dict, *, where: str) -> tuple[Opening, dict[str, int]]:
    """The first sample of the size that is asked for, and all of its size."""
    seen = []
    for found in sets:
        for bucket, indices in found.groups().items():
            size = dict(zip(("frames", "height", "width"), map(int, bucket.split("x")), strict=True))
            if all(asked.get(name, n) == n for name, n in size.items()):
                return Opening(found, int(indices[0])), size
            seen.append(bucket)
    raise ConfigError(
        f"{where}: no sample of this size to begin with; give image=FILE, or frames, height and width of one "
        f"of {', '.join(dict.fromkeys(seen))}"
    )


class Previews:
    """Encodes its prompts once, at the start. Every rank samples every prompt: ZeRO-3 needs them all."""

    def __init__(
        self, plans: Sequence[Preview], model: ModelConfig, spec: ModelSpec, flavor: Flavor,
        ctx: ParallelContext, *, folder: Path, precision: str, ema: bool = False,
        sparse: SparseConfig | None = None,
    ) -> None:
        self.plans, self.model_cfg, self.spec, self.flavor, self.ctx = plans, model, spec, flavor, ctx
        self.folder, self.autocast, self.ema = folder, precision == "bf16", ema
        self.sparse = sparse or SparseConfig()
        self.vae: Vae | None = None
        pictures = {i: self._opening(p.begins) for i, p in enumerate(plans) if p.begins and flavor.sees}
        self.conds = (
            encode_requests([p.request for p in plans], spec, flavor, model, ctx, pictures=pictures)
            if plans else None
        )

    @torch.no_grad()
    def make(self, models: Models, step: int) -> Iterator[tuple[str, np.ndarray, int]]:
        """(name, uint8 frames [F H W 3], fps) of each prompt, on rank 0, and one picture with frames of all;
        the files are written too. Collective."""
        rows: list[np.ndarray] = []
        for i, plan in enumerate(self.plans):
            latents, request = self._sample(models, plan, i), plan.request
            if self.ctx.is_main:
                frames = decode(self._vae(), latents)[0]
                path = self.folder / f"step{step:08d}_{i}{ending(request)}"
                about = {**request.values, "step": step, **self._inexact()}
                write_video(path, frames, fps=request.fps, metadata=about)
                rows.append(_row(frames))
                yield f"preview/{i}", frames, request.fps
        if rows:
            sheet = _stacked(rows)
            write_png(self.folder / f"step{step:08d}.png", sheet, metadata={"step": step})
            yield "preview/all", sheet[None], 1
        if self.plans:
            free(self.ctx.device)  # what the VAE and long videos took is of no size that training asks for
        self.ctx.barrier()

    def _vae(self) -> Vae:
        self.vae = self.vae or open_vae(self.spec, self.model_cfg, self.ctx.device)
        return self.vae

    def _opening(self, begins: Opening) -> Tensor:
        """[3 H W]: what text encoders that see, on rank 0, are shown of a sample: its first frame."""
        if not self.ctx.is_main:
            return torch.empty(0)
        latents = begins.fields(self.flavor, self.ctx.device)[1]
        return self._vae().decode(latents[:, :, :1])[0, :, 0].cpu()

    def _sample(self, models: Models, plan: Preview, number: int) -> Tensor:
        assert self.conds is not None
        seen = number if plan.begins and self.flavor.sees else None
        fields, x0 = plan.begins.fields(self.flavor, self.ctx.device) if plan.begins else ({}, None)
        own, request = batch_of_one(fields, self.flavor.cond), plan.request
        with autocast(self.ctx.device.type, enabled=self.autocast):
            return sample_latents(
                models, self.spec, self.flavor, {**self.conds.of(request, seen), **own}, request=request,
                ctx=self.ctx, uncond={**self.conds.negative(request), **own} if request.guided else None,
                x0=x0, exact_steps=self.sparse.exact_steps,
            )

    def _inexact(self) -> dict[str, object]:
        return {"sparse": self.sparse.sampled} if self.sparse.sampled else {}


def _row(frames: np.ndarray) -> np.ndarray:
    """uint8 [F H W 3] -> [h w 3]: a few frames from the first to the last beside each other."""
    chosen = frames[np.unique(np.linspace(0, len(frames) - 1, _COLUMNS).round().astype(int))]
    less = -(-frames.shape[1] // _HEIGHT)  # every so many pixels
    return np.concatenate([frame[::less, ::less] for frame in chosen], axis=1)


def _stacked(rows: Sequence[np.ndarray]) -> np.ndarray:
    """One under the other, narrower ones with black beside them."""
    width = max(row.shape[1] for row in rows)
    return np.concatenate([np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0))) for row in rows])
