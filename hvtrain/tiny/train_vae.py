"""The recipe of the tiny VAE: `python -m hvtrain.tiny.train_vae configs/tiny/vae.yaml`.

The official class at small widths, trained on synthetic clips and crops of a real clip. First on single
frames (cheap: one frame costs a ninth of a clip), then on clips, so that only the temporal layers start late.
"""

from __future__ import annotations

import random
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hvtrain.config import load
from hvtrain.models.spec import TinyVae
from hvtrain.rng import generator
from hvtrain.tiny import clips
from hvtrain.tiny.parts import DEFAULT, embedded_parts
from hvtrain.train.muon import Muon


@dataclass(frozen=True)
class VaeRecipe:
    """Everything that decides the result."""

    model: str = DEFAULT
    """Architecture whose VAE is trained"""
    real_clip: str = "tests/data/bigbuckbunny.mp4"
    """The real clip that crops are taken from"""
    real_every: int = 3
    """Every so manyth clip is such a crop; 0: none, and the real clip is only measured"""
    output: str = "vae.safetensors"
    """File to write"""
    channels: tuple[int, ...] = (16, 32, 48, 64)
    """Widths of the levels"""
    latent_channels: int = 16
    """As the official VAE"""
    norm_groups: int = 4
    """Groups of the group norms, where it has such"""
    image_steps: int = 500
    """Steps on single frames"""
    video_steps: int = 1400
    """Steps on clips"""
    decoder_steps: int = 600
    """Steps of the decoder alone"""
    image_batch: int = 12
    """Frames a step"""
    video_batch: int = 6
    """Clips a step"""
    frames: int = 9
    """Frames of a clip"""
    size: int = 64
    """Height and width in pixels"""
    crop: int = 0
    """What stills and clips are cut to, at random: as many pixels high and wide; 0 leaves them whole"""
    lr: float = 1.5e-3
    """AdamW's learning rate; Muon's is ten times as high"""
    color_weight: float = 1.0
    """How much larger an error is taken to be where it is one of colour, not of brightness"""
    kl_weight: float = 2e-6
    """Weight of the KL divergence"""
    seed: int = 0
    """Seed"""


class Pictures:
    """Training clips: synthetic ones, every so manyth a crop of the real clip. Values in [-1, 1]."""

    def __init__(self, real: np.ndarray, *, every: int, seed: int) -> None:
        self.real, self.every = real, every  # uint8 [F H W 3]
        self.rng = random.Random(seed)

    def synthetic(self, frames: int, size: int) -> np.ndarray:
        rng = self.rng
        clip = clips.Drawing(
            rng.choice(list(clips.COLORS)), rng.choice([*clips.SHAPES, clips.CONCEPT]),
            rng.choice(list(clips.MOTIONS)), rng.choice(list(clips.BACKGROUNDS)), seed=rng.getrandbits(40),
        )
        video = clips.render(clip, frames=max(frames, 2), height=size, width=size)[:frames]
        if rng.random() < 0.3:  # colours beyond the captioned ones
            video = video[..., rng.sample(range(3), 3)]
            video = (video * np.array([rng.uniform(0.5, 1.0) for _ in range(3)])).astype(np.uint8)
        return video

    def crop(self, frames: int, size: int) -> np.ndarray:
        rng, (n, h, w, _) = self.rng, self.real.shape
        f, y, x = rng.randrange(n - frames + 1), rng.randrange(h - size + 1), rng.randrange(w - size + 1)
        video = self.real[f : f + frames, y : y + size, x : x + size]
        return video[:, :, ::-1] if rng.random() < 0.5 else video

    def batch(self, n: int, *, frames: int, size: int, cut: int = 0) -> Tensor:
        """[n 3 frames size size], or as many pixels as `cut` says of it"""
        real = [self.every > 0 and i % self.every == 0 for i in range(n)]
        made = [self.crop(frames, size) if one else self.synthetic(frames, size) for one in real]
        if cut:
            places = [(self.rng.randrange(size - cut + 1), self.rng.randrange(size - cut + 1)) for _ in made]
            made = [video[:, y : y + cut, x : x + cut] for video, (y, x) in zip(made, places)]
        return torch.from_numpy(np.stack(made)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def read_real(path: str | Path, *, height: int = 128, width: int = 224) -> np.ndarray:
    """Decode a clip, scaled and centre-cropped: uint8 [F height width 3]."""
    import av

    frames = []
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            scale = max(width / frame.width, height / frame.height)
            image = frame.to_image().resize((round(frame.width * scale), round(frame.height * scale)))
            left, top = (image.width - width) // 2, (image.height - height) // 2
            frames.append(np.asarray(image.crop((left, top, left + width, top + height))))
    return np.stack(frames)


@torch.no_grad()
def psnr(tiny: TinyVae, vae: Any, video: np.ndarray) -> float:
    """Mean over the clip of the reconstruction's PSNR in dB; peak 255, posterior mean, no tiling."""
    x = torch.from_numpy(video).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    y = tiny.decode(vae, tiny.moments(vae, x)[0]).clamp(-1, 1)
    return float(-10 * torch.log10(((x - y) / 2).pow(2).mean()))


def held_out_psnr(tiny: TinyVae, vae: Any, *, frames: int, size: int) -> float:
    """PSNR over 24 synthetic clips that training never draws: one of each held-out combination."""
    _, held = clips.combinations()
    names = list(clips.BACKGROUNDS)
    made = [clips.Drawing(*c, names[i % 3], seed=i) for i, c in enumerate(held)]
    return float(
        np.mean([psnr(tiny, vae, clips.render(c, frames=frames, height=size, width=size)) for c in made])
    )


@torch.no_grad()
def whiten(tiny: TinyVae, vae: Any, pictures: Pictures, recipe: VaeRecipe) -> None:
    """Give scaled latents zero mean and unit variance per channel."""
    means = [
        tiny.moments(vae, pictures.batch(4, frames=recipe.frames, size=recipe.size))[0] for _ in range(32)
    ]
    z = torch.cat(means).transpose(0, 1).flatten(1)
    tiny.whiten(vae, z.mean(1), z.std(1))


def build(tiny: TinyVae, recipe: VaeRecipe) -> Any:
    """The untrained model, close to linear: every residual branch starts at zero and the
    posterior nearly without noise."""
    torch.manual_seed(recipe.seed)  # weight initialisation inside the library
    vae = tiny.build(
        channels=recipe.channels, norm_groups=recipe.norm_groups, latent_channels=recipe.latent_channels
    )
    for name, parameter in vae.named_parameters():
        if parameter.ndim == 5:
            parameter.data = parameter.data.to(memory_format=torch.channels_last_3d)
        if re.search(tiny.branches, name):
            nn.init.zeros_(parameter)
    return vae


def optimizers(vae: Any, recipe: VaeRecipe) -> list[torch.optim.Optimizer]:
    """Muon for the inner kernels, AdamW for the first and last layer, the norms and the biases: in 250 steps
    the tiny VAE is where AdamW alone brings it in some 1,500."""
    moving = [(n, p) for n, p in vae.named_parameters() if p.requires_grad]
    inner = [p for n, p in moving if p[0].numel() > 1 and "conv_in" not in n and "conv_out" not in n]
    chosen = {id(p) for p in inner}
    rest = [p for _, p in moving if id(p) not in chosen]
    return [
        Muon(inner, 10 * recipe.lr),
        torch.optim.AdamW(rest, recipe.lr, betas=(0.9, 0.95), weight_decay=0.0)
    ]


@dataclass(frozen=True)
class Stage:
    """A stretch of training: what is seen (`cut` as in Pictures.batch), what moves, and the learning rate
    as a share of the recipe's."""

    name: str
    steps: int
    batch: int
    frames: int
    start: float
    end: float
    cut: int = 0
    frozen_encoder: bool = False


def stages(recipe: VaeRecipe) -> list[Stage]:
    """Stills, then clips, then the decoder alone: the latents are final before the last stage."""
    r = recipe
    return [
        Stage("stills", r.image_steps, r.image_batch, 1, 1.0, 0.85, r.crop),
        Stage("clips", r.video_steps, r.video_batch, r.frames, 0.85, 0.0, r.crop),
        Stage("decoder", r.decoder_steps, r.video_batch, r.frames, 0.5, 0.0, frozen_encoder=True),
    ]


def train(recipe: VaeRecipe) -> None:
    """Run the recipe; the file is written at the end of each stage. Latents are
    whitened before the last one."""
    tiny = embedded_parts(recipe.model).vae
    vae = build(tiny, recipe)
    pictures = Pictures(read_real(recipe.real_clip), every=recipe.real_every, seed=recipe.seed)
    for stage in stages(recipe):
        if stage.frozen_encoder:
            whiten(tiny, vae, pictures, recipe)
        run_stage(tiny, vae, pictures, recipe, stage)
        report(tiny, vae, pictures.real, recipe)
        tiny.save(vae, recipe.output)


def run_stage(tiny: TinyVae, vae: Any, pictures: Pictures, recipe: VaeRecipe, stage: Stage) -> None:
    """40 steps up, then linearly from `start` to `end`."""
    for name, parameter in vae.named_parameters():
        parameter.requires_grad_(not (stage.frozen_encoder and re.search(tiny.encoder, name)))
    steppers = optimizers(vae, recipe)
    bases = [o.param_groups[0]["lr"] for o in steppers]
    started, mean_error = time.monotonic(), 0.0
    for step in range(stage.steps):
        factor = min((step + 1) / 40, stage.start + (stage.end - stage.start) * step / stage.steps)
        for o, base in zip(steppers, bases):
            o.param_groups[0]["lr"] = base * factor
        x = pictures.batch(stage.batch, frames=stage.frames, size=recipe.size, cut=stage.cut)
        x = x.to(memory_format=torch.channels_last_3d)
        error, kl = _forward(tiny, vae, x, generator(recipe.seed, step=step, stream=f"vae-{stage.name}"))
        gray = error.mean(1, keepdim=True)
        counted = gray + recipe.color_weight * (error - gray)
        loss = counted.abs().mean() + 2 * counted.pow(2).mean() + recipe.kl_weight * kl
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in vae.parameters() if p.requires_grad], 1.0)
        for o in steppers:
            o.step()
            o.zero_grad(set_to_none=True)
        mean_error += (float(error.detach().pow(2).mean()) - mean_error) / min(step + 1, 50)
        if (step + 1) % 50 == 0:
            db = -10 * np.log10(mean_error / 4)
            passed = time.monotonic() - started
            print(
                f"{stage.name} {step + 1}/{stage.steps}  train PSNR {db:.2f} dB  {passed:.0f} s", flush=True
            )
        if (step + 1) % 500 == 0:
            report(tiny, vae, pictures.real, recipe)


def _forward(tiny: TinyVae, vae: Any, x: Tensor, noise: torch.Generator) -> tuple[Tensor, Tensor]:
    """(reconstruction error, KL divergence) of one batch [B 3 F H W]."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mean, log_var = (moment.float() for moment in tiny.moments(vae, x))
        log_var = log_var.clamp(-30, 20)
        z = mean + torch.randn(mean.shape, generator=noise) * (0.5 * log_var).exp()
        y = tiny.decode(vae, z)
    kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum((1, 2, 3)).mean()
    return y.float() - x, kl


def report(tiny: TinyVae, vae: Any, real: np.ndarray, recipe: VaeRecipe) -> None:
    """Print the two figures that docs/tiny.md quotes."""
    held = held_out_psnr(tiny, vae, frames=recipe.frames, size=recipe.size)
    print(
        f"PSNR held-out synthetic {held:.2f} dB, real clip 128x224 {psnr(tiny, vae, real[:33]):.2f} dB",
        flush=True
    )


if __name__ == "__main__":
    train(load(VaeRecipe, sys.argv[1], sys.argv[2:]))
