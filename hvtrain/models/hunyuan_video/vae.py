"""The video VAE: diffusers' AutoencoderKLHunyuanVideo behind a small class, read from any layout it ships in.

Outside this file latents are SCALED: multiplied by the scaling factor, as the DiT sees them. The library
tiles in time at 16 frames without being asked; every model built here has the official 64 frames or none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from hvtrain.config import VaeTilingConfig
from hvtrain.errors import CheckpointError, ConfigError, DataError
from hvtrain.models.hunyuan_video.vae_weights import (
    METADATA_KEY,
    constructor_arguments,
    find_config,
    linear_shape,
    official_names,
    resemblance,
)
from hvtrain.weights.containers import fingerprint, open_weights
from hvtrain.weights.keymap import Fused
from hvtrain.weights.source import Source, check, shapes_of
from shards.atomic import atomic_path

VaeTiling = VaeTilingConfig  # a direction of size 0 is never cut; the defaults are the official ones
OFF = VaeTiling(enabled=False)
OVERLAP = 0.25  # the official share of a tile that it has in common with the next one, in space and in time


def build_vae(config: Mapping[str, Any] | None = None) -> Any:
    """The library's class from constructor arguments (official spelling accepted); none: the official size.

    Meta-device friendly. Official tiling is in force: `apply_tiling` changes it.
    """
    from diffusers import AutoencoderKLHunyuanVideo

    arguments = constructor_arguments(config or {})
    try:
        model = AutoencoderKLHunyuanVideo(**arguments)
    except TypeError as e:
        raise CheckpointError(f"VAE config: {e}; expected the arguments of AutoencoderKLHunyuanVideo") from e
    apply_tiling(model, VaeTiling())
    return model


def apply_tiling(model: Any, tiling: VaeTiling) -> None:
    """Set the library's tiling state completely: nothing of its own defaults is left."""
    size, frames = tiling.spatial, tiling.temporal
    # A stride, three quarters of a tile, must be whole in latents (8 pixels, 4 frames), or tiles would shift.
    if size % 32 or size < 0 or frames % 16 or frames < 0:
        raise ConfigError(
            f"VAE tiles of {size} pixels and {frames} frames: use multiples of 32 and of 16; 0 is off"
        )
    model.use_slicing = tiling.slicing
    model.use_tiling = tiling.enabled and size > 0
    model.use_framewise_encoding = model.use_framewise_decoding = tiling.enabled and frames > 0
    model.tile_sample_min_height = model.tile_sample_min_width = size
    model.tile_sample_stride_height = model.tile_sample_stride_width = int(size * (1 - OVERLAP))
    model.tile_sample_min_num_frames = frames
    model.tile_sample_stride_num_frames = int(frames * (1 - OVERLAP))


class VideoVae:
    """Video in [-1, 1] to scaled latents and back, without gradients."""

    def __init__(self, model: Any, *, fingerprint: str = "", tiling: VaeTiling | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.fingerprint = fingerprint
        config = model.config
        self.channels: int = config.latent_channels
        spatial = config.spatial_compression_ratio
        self.stride: tuple[int, int, int] = (config.temporal_compression_ratio, spatial, spatial)
        self.scaling_factor: float = config.scaling_factor
        apply_tiling(model, tiling or VaeTiling())

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
    def encode(
        self, video: Tensor, *, generator: torch.Generator | Sequence[torch.Generator] | None = None
    ) -> Tensor:
        """[B 3 F H W] in [-1, 1] -> scaled latents [B C T H/8 W/8], float32; F = 4n+1 gives T = n+1.

        Without a generator the posterior's mode, else a sample drawn with that CPU generator, or with one
        generator per clip (then a clip's latents do not depend on the batch it was in).
        """
        self._check_video(video)
        posterior = self.model.encode(video.to(self.device, self.dtype)).latent_dist
        latents = posterior.mean.float()
        if generator is not None:
            latents = latents + posterior.std.float() * _noise(latents, generator)
        return latents * self.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor, *, clamp: bool = True) -> Tensor:
        """Scaled latents [B C T h w] -> video [B 3 4T-3 8h 8w] in [-1, 1], float32."""
        if latents.ndim != 5 or latents.shape[1] != self.channels:
            raise DataError(f"latents of shape {list(latents.shape)}: expected [B, {self.channels}, T, h, w]")
        z = latents.to(self.device, torch.float32) / self.scaling_factor
        video = self.model.decode(z.to(self.dtype)).sample.float()
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


def _noise(like: Tensor, generator: torch.Generator | Sequence[torch.Generator]) -> Tensor:
    if isinstance(generator, torch.Generator):
        noise = torch.randn(like.shape, generator=generator)
    else:
        noise = torch.stack([torch.randn(like.shape[1:], generator=g) for g in generator])
    return noise.to(like.device)


def open_vae(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float16,
    device: torch.device | str = "cpu",
    tiling: VaeTiling | None = None,
) -> VideoVae:
    """Read a VAE: our or an official file (safetensors, .pt), a library directory, or one with LDM names."""
    weights = open_weights(path)
    source = Source(weights, {name: Fused((there,)) for name, there in official_names(weights).items()})
    shapes = source.shapes
    with torch.device("meta"):
        model = build_vae(find_config(Path(path), weights.metadata, shapes))
    wanted = shapes_of(model)
    foreign = sum(name not in shapes for name in wanted) >= len(wanted) // 2
    check(
        path, wanted, {name: linear_shape(shape, wanted.get(name)) for name, shape in shapes.items()},
        what="not a VAE of this architecture", hint=f"; {resemblance(shapes)}" if foreign else "",
    )
    source.fill(model, dtype=dtype, device=device)
    return VideoVae(model, fingerprint=fingerprint(weights), tiling=tiling)


def save_vae(model: Any, path: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Write a VAE (VideoVae or the library's model) under official names, with its config in the metadata."""
    model = model.model if isinstance(model, VideoVae) else model
    config = {k: v for k, v in dict(model.config).items() if not k.startswith("_")}
    tensors = {k: v.detach().to("cpu", dtype).contiguous() for k, v in model.state_dict().items()}
    with atomic_path(Path(path)) as temporary:
        save_file(tensors, temporary, metadata={METADATA_KEY: json.dumps(config), "format": "pt"})
