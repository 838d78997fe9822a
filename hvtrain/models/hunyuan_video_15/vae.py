"""The video VAE behind the small class that everything here uses, read from any layout it ships in.

Tiled as officially: in space only, tiles of 256 pixels that share an eighth (or smaller ones that share a
quarter), blended linearly. In time nothing is cut: see vae_model.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hvtrain.config import VaeTilingConfig
from hvtrain.errors import CheckpointError, ConfigError
from hvtrain.models.foreign import looks_like
from hvtrain.models.hunyuan_video_15.vae_model import Vae15, VaeArch
from hvtrain.models.video_vae import VideoVae
from hvtrain.weights.containers import fingerprint, open_weights
from hvtrain.weights.keymap import Fused
from hvtrain.weights.source import Source, check, config_of, shapes_of

METADATA_KEY = "hvtrain.vae"  # safetensors metadata: the sizes as JSON
OFF = VaeTilingConfig(enabled=False)
Shapes = Mapping[str, tuple[int, ...]]


def build_vae(config: Mapping[str, Any] | None = None) -> Vae15:
    """From the official config.json (what is no size in it is left alone); none: the official
    size. Meta-device friendly."""
    known = {f.name for f in fields(VaeArch)}
    sizes: dict[str, Any] = {name: value for name, value in (config or {}).items() if name in known}
    if "block_out_channels" in sizes:
        sizes["block_out_channels"] = tuple(sizes["block_out_channels"])
    return Vae15(VaeArch(**sizes))


def vae_of(model: Vae15, *, fingerprint: str = "", tiling: VaeTilingConfig | None = None) -> VideoVae:
    """The network as the program uses it. Raises ConfigError for tiles that cannot be blended."""
    arch, tiling = model.arch, tiling or VaeTilingConfig()
    side, pixels = tiling.spatial if tiling.enabled else 0, arch.ffactor_spatial
    overlap = overlap_of(side)
    if side < 0 or (side // pixels * overlap) % 1 or side % pixels:
        raise ConfigError(
            f"vae_tiling.spatial is {side}, expected 0 (off), 64, 128, 192, or a multiple of 128 from 256 on"
        )

    def encode(video: Tensor) -> tuple[Tensor, Tensor]:
        def whole(x: Tensor) -> Tensor:
            return tiled(model.moments, x, side=side, made=side // pixels, overlap=overlap)

        mean, log_var = (
            _one_by_one(
                whole, video.to(model.encoder.conv_in.conv.weight.dtype), tiling.slicing
            ).float().chunk(2, 1)
        )
        return mean, log_var.clamp(-30, 20).mul(0.5).exp()

    def decode(z: Tensor) -> Tensor:
        def whole(x: Tensor) -> Tensor:
            return tiled(
                lambda z: vae.tile(model.frames, z), x, side=side // pixels, made=side, overlap=overlap
            )

        return _one_by_one(whole, z.to(model.decoder.conv_in.conv.weight.dtype), tiling.slicing).float()

    vae = VideoVae(
        model, encode, decode, channels=arch.latent_channels, stride=(arch.ffactor_temporal, pixels, pixels),
        scale=arch.scaling_factor, fingerprint=fingerprint,
    )
    return vae


def _one_by_one(make: Callable[[Tensor], Tensor], x: Tensor, slicing: bool) -> Tensor:
    return torch.cat([make(one) for one in x.split(1)]) if slicing else make(x)


# --- tiles --------------------------------------------------------------------------------------------------


def overlap_of(side: int) -> float:
    """The official share of a tile of `side` pixels that it has in common with the next one."""
    return 0.125 if side >= 256 else 0.25


def tiled(make: Callable[[Tensor], Tensor], x: Tensor, *, side: int, made: int, overlap: float) -> Tensor:
    """`make` of x [... H W], in tiles of `side` that become `made`, where x is
    larger than one; side 0: never."""
    if not side or max(x.shape[-2:]) <= side:
        return make(x)
    step, blend = int(side * (1 - overlap)), int(made * overlap)
    rows: list[list[Tensor]] = []
    for top in range(0, x.shape[-2], step):
        row: list[Tensor] = []
        for left in range(0, x.shape[-1], step):
            tile = make(x[..., top : top + side, left : left + side])
            if rows:
                tile = _blended(rows[-1][len(row)], tile, blend, dim=-2)
            if row:
                tile = _blended(row[-1], tile, blend, dim=-1)
            row.append(tile)
        rows.append(row)
    kept = made - blend
    return torch.cat([torch.cat([tile[..., :kept, :kept] for tile in row], dim=-1) for row in rows], dim=-2)


def _blended(before: Tensor, tile: Tensor, n: int, *, dim: int) -> Tensor:
    """The tile with its first n lines faded in over the last n of the one before."""
    n = min(n, before.shape[dim], tile.shape[dim])
    weight = (torch.arange(n, device=tile.device, dtype=tile.dtype) / n).view(-1, *[1] * (-dim - 1))
    end, begin = before.narrow(dim, before.shape[dim] - n, n), tile.narrow(dim, 0, n)
    rest = tile.narrow(dim, n, tile.shape[dim] - n)
    return torch.cat([end * (1 - weight) + begin * weight, rest], dim=dim)


# --- files --------------------------------------------------------------------------------------------------

# diffusers' names -> official ones.
_RULES = (
    (r"^(encoder|decoder)\.(down|up)_blocks\.(\d+)\.resnets\.", r"\1.\2.\3.block."),
    (r"^(encoder|decoder)\.(down|up)_blocks\.(\d+)\.(down|up)samplers\.0\.", r"\1.\2.\3.\4sample."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.(?:to_)?", ".mid.attn_1."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
)


def official_name(name: str) -> str:
    name = name.removeprefix("vae.")
    for pattern, replacement in _RULES:
        name = re.sub(pattern, replacement, name)
    return name


def open_vae(
    path: str | Path, *, dtype: torch.dtype = torch.float16, device: torch.device | str = "cpu",
    tiling: VaeTilingConfig | None = None,
) -> VideoVae:
    """Read a VAE: our, the official or ComfyUI's file (safetensors, .pt), the
    official or diffusers' directory."""
    weights = open_weights(path)
    source = Source(weights, {official_name(name): Fused((name,)) for name in weights})
    config = config_of(Path(path), weights.metadata, METADATA_KEY, mine=lambda c: "scaling_factor" in c)
    sizes = sizes_of(source.shapes, path)
    with torch.device("meta"):
        model = build_vae({**sizes, **({"scaling_factor": config["scaling_factor"]} if config else {})})
    check(path, shapes_of(model), source.shapes, what="not a VAE of this architecture")
    source.fill(model, dtype=dtype, device=device)
    return vae_of(model, fingerprint=fingerprint(weights), tiling=tiling)


def sizes_of(shapes: Shapes, path: str | Path) -> dict[str, Any]:
    """Of a file under official names: all of them are in the shapes. Raises CheckpointError."""

    def shape(name: str) -> tuple[int, ...]:
        if len(shapes.get(name, ())) != 5:
            like = looks_like(shapes)
            raise CheckpointError(
                f"{path}: not a VAE of this architecture: no '{name}'"
                + (f"; it looks like {like}" if like else "")
            )
        return shapes[name]

    widths, steps = [shape("encoder.conv_in.conv.weight")[0]], list[int]()
    while (down := f"encoder.down.{len(steps)}.downsample.conv.conv.weight") in shapes:
        widths.append(shape(f"encoder.down.{len(widths)}.block.0.conv1.conv.weight")[0])
        steps.append(widths[-1] // shape(down)[0])  # cells of 2 x 2, or of 2 x 2 x 2, into channels
    while (more := f"encoder.down.{len(widths)}.block.0.conv1.conv.weight") in shapes:
        widths.append(shape(more)[0])
    return {
        "block_out_channels": tuple(widths), "latent_channels": shape("decoder.conv_in.conv.weight")[1],
        "layers_per_block": sum(f"encoder.down.0.block.{i}.conv1.conv.weight" in shapes for i in range(16)),
        "ffactor_spatial": 2 ** len(steps), "ffactor_temporal": 2 ** steps.count(8),
    }
