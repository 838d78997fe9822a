"""The latent upsamplers of super-resolution, official module names: a smooth enlargement,
corrected by causal convolutions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvtrain.errors import CheckpointError, ConfigError
from hvtrain.models.hunyuan_video_15.inputs import LOW_NOISE
from hvtrain.models.hunyuan_video_15.vae_model import CausalConv, Level, RmsNorm
from hvtrain.models.identify import count
from hvtrain.models.spec import Flavor, Parts
from hvtrain.weights.containers import fingerprint, open_weights
from hvtrain.weights.keymap import Fused
from hvtrain.weights.source import Source, check, config_of, shapes_of

Shapes = Mapping[str, tuple[int, ...]]


class Residual(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        act = nn.SiLU()
        self.block = nn.Sequential(CausalConv(dim, dim), act, CausalConv(dim, dim), act, CausalConv(dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


class To720p(nn.Module):
    """480p to 720p. `keep`: what goes in is added to what comes out."""

    def __init__(self, *, channels: int, hidden: int, n_blocks: int, keep: bool = False) -> None:
        super().__init__()
        self.keep = keep
        self.in_conv = CausalConv(channels, hidden)
        self.blocks = nn.ModuleList(Residual(hidden) for _ in range(n_blocks))
        self.out_conv = CausalConv(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B C T h w], of the size that is wanted."""
        h = self.in_conv(x)
        for block in self.blocks:
            h = block(h)
        return self.out_conv(h) + (x if self.keep else 0)


class To1080p(nn.Module):
    """720p to 1080p."""

    def __init__(self, *, channels: int, widths: tuple[int, ...], n_blocks: int) -> None:
        super().__init__()
        self.conv_in = CausalConv(channels, widths[0])
        self.up = nn.ModuleList(
            Level(before, width, n_blocks) for before, width in zip((widths[0], *widths), widths)
        )
        self.norm_out, self.conv_out = RmsNorm(widths[-1]), CausalConv(widths[-1], channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B C T h w], of the size that is wanted."""
        h = self.conv_in(x)
        h = h + x.repeat_interleave(h.shape[1] // x.shape[1], dim=1)
        for level in self.up:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


KINDS = {"sr-720p": To720p, "sr-1080p": To1080p}  # flavor -> its upsampler


class Upsampler:
    """Small latents to large ones."""

    def __init__(self, model: nn.Module, *, fingerprint: str = "") -> None:
        self.model, self.fingerprint = model.eval().requires_grad_(False), fingerprint

    @torch.no_grad()
    def __call__(self, latents: Tensor, size: tuple[int, int]) -> Tensor:
        """Scaled latents [B C T h w] -> [B C T *size], float32 as officially, on the model's device."""
        return self.model(resized(latents.to(next(self.model.parameters())), size))


def resized(latents: Tensor, size: tuple[int, int]) -> Tensor:
    """Each frame bilinearly: [B C T h w] -> [B C T *size]."""
    frames = latents.transpose(1, 2).flatten(0, 1)
    return F.interpolate(
        frames, size=size, mode="bilinear", align_corners=False
    ).unflatten(0, (len(latents), -1)).transpose(1, 2)


def build_upsampler(shapes: Shapes, config: Mapping[str, Any], path: str | Path) -> nn.Module:
    """Which of the two, and its sizes, from official names and shapes; only `global_residual` leaves no trace
    there. Raises CheckpointError."""

    def shape(name: str) -> tuple[int, ...]:
        if len(shapes.get(name, ())) != 5:
            raise CheckpointError(f"{path}: not a latent upsampler: no '{name}' in it")
        return shapes[name]

    if "in_conv.conv.weight" in shapes:
        hidden, channels = shape("in_conv.conv.weight")[:2]
        n_blocks = count(shapes, r"blocks\.(\d+)\.")
        return To720p(
            channels=channels, hidden=hidden, n_blocks=n_blocks, keep=bool(config.get("global_residual"))
        )
    channels = shape("conv_in.conv.weight")[1]
    widths = tuple(
        shape(f"up.{i}.block.0.conv1.conv.weight")[0] for i in range(count(shapes, r"up\.(\d+)\."))
    )
    if not widths:
        raise CheckpointError(f"{path}: not a latent upsampler: no 'up.0.block.0.conv1.conv.weight' in it")
    return To1080p(channels=channels, widths=widths, n_blocks=count(shapes, r"up\.0\.block\.(\d+)\."))


def open_upsampler(
    path: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Upsampler:
    """The official directory or file, or ComfyUI's."""
    weights = open_weights(path)
    source = Source(weights, {name: Fused((name,)) for name in weights})
    config = config_of(Path(path), weights.metadata, "", mine=lambda c: "global_residual" in c)
    with torch.device("meta"):
        model = build_upsampler(source.shapes, config, path)
    check(path, shapes_of(model), source.shapes)
    source.fill(model, dtype=dtype, device=device)
    return Upsampler(model, fingerprint=fingerprint(weights))


class NoisedEnlarger:
    """models.spec.Enlarger: upsampled, then noised, officially from another source
    than the video's own noise."""

    def __init__(self, upsampler: Upsampler) -> None:
        self.upsampler, self.fingerprint = upsampler, upsampler.fingerprint

    def __call__(
        self, latents: Tensor, shape: Sequence[int], *, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """-> "low_latents" [C T H W], at noise level LOW_NOISE."""
        large = self.upsampler(latents[None], (shape[-2], shape[-1]))[0].cpu()
        return {
            "low_latents": (1 - LOW_NOISE) * large + LOW_NOISE * torch.randn(large.shape, generator=generator)
        }


def open_enlarger(parts: Parts, flavor: Flavor, *, device: torch.device | str = "cpu") -> NoisedEnlarger:
    """Raises ConfigError where it is not given, CheckpointError for that of another flavor."""
    if "upsampler" not in parts:
        raise ConfigError(
            f"model.upsampler is not set; '{flavor.name}' begins with it (the upsampler of latents beside "
            "its DiT)"
        )
    found = open_upsampler(parts["upsampler"], device=device)
    wanted = KINDS.get(flavor.name)
    if wanted is not None and not isinstance(found.model, wanted):
        other = next(name for name, kind in KINDS.items() if isinstance(found.model, kind))
        raise CheckpointError(
            f"model.upsampler: {parts['upsampler']} is that of {other}, model.dit is {flavor.name}"
        )
    if (channels := next(found.model.parameters()).shape[1]) != flavor.latent.channels:
        raise CheckpointError(
            f"model.upsampler: {parts['upsampler']} takes latents of {channels} channels, {flavor.name}'s "
            f"have {flavor.latent.channels}"
        )
    return NoisedEnlarger(found)
