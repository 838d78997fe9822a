"""The smaller video that super-resolution enlarges: a video file, or the latents that
a generation of it has kept."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from hvtrain.encode.media import probe, read_frames
from hvtrain.errors import ConfigError, DataError
from hvtrain.generate import spool
from hvtrain.generate.requests import Request
from hvtrain.models.spec import Flavor, ModelSpec, Vae

LATENTS = ".safetensors"


def check_low(path: str, request: Request, spec: ModelSpec, flavor: Flavor) -> None:
    """Raises ConfigError for one that the request does not enlarge, DataError for
    a file that cannot be read."""
    latent = flavor.latent
    if path.endswith(LATENTS):
        found, made = spool.read(Path(path))
        if made.get("model") != spec.name:
            raise ConfigError(
                f"video: {path} holds latents of {made.get('model')}, expected those of {spec.name}"
            )
        _, t, h, w = found.shape
        frames, height, width = (t - 1) * latent.stride_t + 1, h * latent.stride_h, w * latent.stride_w
        fits = frames == request.frames
    else:
        try:
            seen = probe(Path(path))
        except DataError as error:
            raise DataError(f"video: {str(error).split(';')[0]}; give another video") from None
        frames, height, width = seen.frames, seen.height, seen.width
        fits = frames >= request.frames
    if not fits:
        most = (frames - 1) // latent.stride_t * latent.stride_t + 1
        raise ConfigError(
            f"video: {path} has {frames} frames, but frames is {request.frames}: give frames={most}"
        )
    if width * height >= request.width * request.height:
        raise ConfigError(
            f"video: {path} is {width}x{height}, no smaller than the {request.width}x{request.height} that "
            f"'{flavor.name}' shall make of it: give a larger width and height, or a smaller video"
        )


def read_low(path: str, flavor: Flavor, vae: Vae, *, frames: int) -> Tensor:
    """Scaled latents [C T h w] on the CPU, of the first `frames`; of pixels the posterior's mode."""
    if path.endswith(LATENTS):
        return spool.read(Path(path))[0]
    seen, (unit_h, unit_w) = probe(Path(path)), flavor.latent.unit
    size = (max(unit_w, seen.width // unit_w * unit_w), max(unit_h, seen.height // unit_h * unit_h))
    pixels = torch.from_numpy(read_frames(Path(path), range(frames), size=size))  # [F H W 3]
    video = pixels.permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    return vae.encode(video.to(vae.dtype))[0].cpu()
