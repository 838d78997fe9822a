"""The video VAE: diffusers' AutoencoderKLHunyuanVideo behind a small class, read from any layout it ships in.

The library tiles in time at 16 frames without being asked; every model built here has
the official 64 frames or none.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hvtrain.config import VaeTilingConfig
from hvtrain.errors import CheckpointError, ConfigError
from hvtrain.models.hunyuan_video.vae_weights import (
    constructor_arguments,
    find_config,
    official_names,
    resemblance,
)
from hvtrain.models.video_vae import VideoVae
from hvtrain.weights.containers import fingerprint, open_weights
from hvtrain.weights.keymap import Fused
from hvtrain.weights.source import Source, check, shapes_of

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


def vae_of(model: Any, *, fingerprint: str = "", tiling: VaeTiling | None = None) -> VideoVae:
    """The library's model as the program uses it."""
    apply_tiling(model, tiling or VaeTiling())
    config, spatial = model.config, model.config.spatial_compression_ratio

    def encode(video: Tensor) -> tuple[Tensor, Tensor]:
        posterior = model.encode(video.to(model.dtype)).latent_dist
        return posterior.mean.float(), posterior.std.float()

    make = model.decoder.forward
    vae = VideoVae(
        model, encode, lambda z: model.decode(z.to(model.dtype)).sample.float(),
        channels=config.latent_channels, stride=(config.temporal_compression_ratio, spatial, spatial),
        scale=config.scaling_factor, fingerprint=fingerprint,
    )
    model.decoder.forward = lambda z: vae.tile(make, z)
    return vae


def open_vae(
    path: str | Path, *, dtype: torch.dtype = torch.float16, device: torch.device | str = "cpu",
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
    check(  # `ones`: LDM files keep the attention's linear layers as 1x1(x1) convolutions
        path, wanted, shapes, what="not a VAE of this architecture",
        hint=f"; {resemblance(shapes)}" if foreign else "", ones=True,
    )
    source.fill(model, dtype=dtype, device=device)
    return vae_of(model, fingerprint=fingerprint(weights), tiling=tiling)
