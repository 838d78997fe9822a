"""A video VAE of the diffusers library behind the small class that everything here uses;
each architecture opens its own.

Latents outside are SCALED: (the library's - shift) * scale, as the DiT sees them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from hvtrain.errors import DataError
from shards.atomic import atomic_path

Make = Callable[[Tensor], Tensor]  # unscaled latents -> pixels
Tile = Callable[[Make, Tensor], Tensor]  # has one of the pieces made that a video is decoded in
Generators = torch.Generator | Sequence[torch.Generator]


class VideoVae:
    """models.spec.Vae around a library's model. `encode` makes mean and deviation of a video on the model's
    device (no deviation: always the mode is taken), `decode` a video of unscaled latents; `scale` and `shift`
    are numbers, or one for each channel [C 1 1 1]. What cuts large videos has `tile` make each piece."""

    def __init__(
        self, model: Any, encode: Callable[[Tensor], tuple[Tensor, Tensor | None]],
        decode: Callable[[Tensor], Tensor], *, channels: int, stride: tuple[int, int, int],
        scale: Tensor | float, shift: Tensor | float = 0.0, fingerprint: str = "",
    ) -> None:
        self.model, self._encode, self._decode = model.eval().requires_grad_(False), encode, decode
        self.channels, self.stride, self.fingerprint = channels, stride, fingerprint
        self.scale, self.shift = scale, shift
        self.tile: Tile = lambda make, z: make(z)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def to(self, device: torch.device | str) -> VideoVae:
        self.model.to(device)
        return self

    @torch.no_grad()
    def encode(self, video: Tensor, *, generator: Generators | None = None) -> Tensor:
        """[B 3 F H W] in [-1, 1] -> scaled latents [B C T h w], float32; F = n * stride + 1 gives T = n + 1.

        Without a generator the posterior's mode, else a sample drawn with that CPU generator, or with one
        generator per clip (then a clip's latents do not depend on the batch it was in).
        """
        self._check_video(video)
        latents, std = self._encode(video.to(self.device))
        if generator is not None and std is not None:
            latents = latents + std * _noise(latents, generator)
        return (latents - _on(latents, self.shift)) * _on(latents, self.scale)

    @torch.no_grad()
    def decode(self, latents: Tensor, *, clamp: bool = True) -> Tensor:
        """Scaled latents [B C T h w] -> video [B 3 F H W] in [-1, 1], float32."""
        if latents.ndim != 5 or latents.shape[1] != self.channels:
            raise DataError(f"latents of shape {list(latents.shape)}: expected [B, {self.channels}, T, h, w]")
        z = latents.to(self.device, torch.float32)
        z = z / _on(z, self.scale) + _on(z, self.shift)
        video = self._decode(z)
        return video.clamp(-1, 1) if clamp else video

    def _check_video(self, video: Tensor) -> None:
        st, sh, sw = self.stride
        if video.ndim != 5 or video.shape[1] != 3:
            raise DataError(f"video of shape {list(video.shape)}: expected [B, 3, F, H, W]")
        frames, height, width = video.shape[2:]
        if (frames - 1) % st:
            raise DataError(f"a clip of {frames} frames cannot be encoded: the frame count must be {st}n+1")
        if height % sh or width % sw:
            raise DataError(f"a clip of {width}x{height} pixels cannot be encoded: use multiples of {sh}")


def _on(x: Tensor, value: Tensor | float) -> Tensor | float:
    return value.to(x) if isinstance(value, Tensor) else value


def _noise(like: Tensor, generator: Generators) -> Tensor:
    if isinstance(generator, torch.Generator):
        noise = torch.randn(like.shape, generator=generator)
    else:
        noise = torch.stack([torch.randn(like.shape[1:], generator=g) for g in generator])
    return noise.to(like.device)


@torch.no_grad()
def rescale(
    into: Any, out_of: Any, mean: Tensor, std: Tensor, *, to_mean: Tensor | float = 0.0,
    to_std: Tensor | float = 1.0
) -> None:
    """Give latents of mean and deviation [C] others, by an exact change of the 1x1x1 convolutions `into`
    moments, whose first C channels are the mean, and `out_of` latents."""
    gain = to_std / std
    n = len(mean)
    out_of.bias += (out_of.weight[:, :, 0, 0, 0] * (mean - to_mean / gain)).sum(1)
    out_of.weight /= gain.view(1, -1, 1, 1, 1)
    into.weight[:n] *= gain.view(-1, 1, 1, 1, 1)
    into.bias[:n] = (into.bias[:n] - mean) * gain + to_mean
    into.bias[n:] += 2 * gain.log()  # the log-variance moves with the scale


def save_vae(model: Any, path: str | Path, *, key: str, dtype: torch.dtype | None = None) -> None:
    """Write a VAE (VideoVae or the library's model) under the library's names, with its
    config in the metadata as `key`."""
    model = model.model if isinstance(model, VideoVae) else model
    config = {k: v for k, v in dict(model.config).items() if not k.startswith("_")}
    tensors = {k: v.detach().to("cpu", dtype).contiguous() for k, v in model.state_dict().items()}
    with atomic_path(Path(path)) as temporary:
        save_file(tensors, temporary, metadata={key: json.dumps(config), "format": "pt"})
