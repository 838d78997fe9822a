"""The video VAE: diffusers' AutoencoderKLHunyuanVideo behind one small class, read from any layout it ships in.

Outside this file latents are SCALED: multiplied by the scaling factor, as the DiT sees them. The library tiles in
time at 16 frames without being asked to; every model built here gets the official 64 frames (or none) instead.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hvtrain.errors import CheckpointError, ConfigError, DataError

METADATA_KEY = "hvtrain.vae"  # safetensors metadata: the constructor arguments as JSON

# Names of the official config.json that the library's constructor spells differently.
_OFFICIAL_ARGUMENTS = {"time_compression_ratio": "temporal_compression_ratio"}
_OFFICIAL_BLOCKS = {
    "DownEncoderBlockCausal3D": "HunyuanVideoDownBlock3D",
    "UpDecoderBlockCausal3D": "HunyuanVideoUpBlock3D",
}
_NOT_ARGUMENTS = ("sample_size", "sample_tsize", "mid_block_causal_attn")  # tile sizes and a constant: see VaeTiling

# LDM names (ComfyUI's repack) -> official names; `up` blocks are numbered backwards there, see `_official_name`.
_LDM_RULES = (
    (r"^encoder\.down\.(\d+)\.block\.", r"encoder.down_blocks.\1.resnets."),
    (r"^encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
)
_LDM_UP = re.compile(r"^decoder\.up\.(\d+)\.(block|upsample)\.")


@dataclass(frozen=True)
class VaeTiling:
    """How a video is cut to bound memory. The defaults are the official ones; neither direction is exact."""

    spatial: bool = True
    """Cut frames larger than `size` pixels into overlapping squares."""
    temporal: bool = True
    """Cut clips longer than `frames` frames."""
    slicing: bool = False
    """Treat the samples of a batch one after another (exact)."""
    size: int = 256
    """Pixels of a tile's side, a multiple of 32."""
    overlap: float = 0.25
    """Share of a tile's side that it has in common with the next one."""
    frames: int = 64
    """Frames of a temporal tile (each tile holds one more, the first), a multiple of 16."""
    frame_overlap: float = 0.25
    """Share of a temporal tile that it has in common with the next one."""


OFF = VaeTiling(spatial=False, temporal=False)


def build_vae(config: Mapping[str, Any] | None = None) -> nn.Module:
    """The library's class from constructor arguments (official spelling accepted); no argument: the official size.

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


def constructor_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json, official or the library's, as constructor arguments."""
    arguments = {}
    for key, value in config.items():
        if key.startswith("_") or key in _NOT_ARGUMENTS:
            continue
        if isinstance(value, list | tuple):
            value = tuple(_OFFICIAL_BLOCKS.get(v, v) for v in value)
        arguments[_OFFICIAL_ARGUMENTS.get(key, key)] = value
    if widths := arguments.get("block_out_channels"):
        arguments.setdefault("down_block_types", ("HunyuanVideoDownBlock3D",) * len(widths))
        arguments.setdefault("up_block_types", ("HunyuanVideoUpBlock3D",) * len(widths))
    return arguments


def apply_tiling(model: Any, tiling: VaeTiling) -> None:
    """Set the library's tiling state completely: nothing of its own defaults is left."""
    if tiling.size % 32 or tiling.size <= 0 or tiling.frames % 16 or tiling.frames <= 0:
        raise ConfigError(
            f"VAE tiles of {tiling.size} pixels x {tiling.frames} frames: need multiples of 32 pixels and 16 frames"
        )
    # A stride must be whole in latents (8 pixels, 4 frames), or tiles would be blended with a shift.
    stride, frame_stride = _stride(tiling.size, tiling.overlap, 8), _stride(tiling.frames, tiling.frame_overlap, 4)
    model.use_tiling = tiling.spatial
    model.use_slicing = tiling.slicing
    model.use_framewise_encoding = model.use_framewise_decoding = tiling.temporal
    model.tile_sample_min_height = model.tile_sample_min_width = tiling.size
    model.tile_sample_stride_height = model.tile_sample_stride_width = stride
    model.tile_sample_min_num_frames = tiling.frames
    model.tile_sample_stride_num_frames = frame_stride


def _stride(size: int, overlap: float, unit: int) -> int:
    if not 0 <= overlap < 1:
        raise ConfigError(f"VAE tile overlap {overlap}: expected a share from 0 up to, not including, 1")
    return max(unit, int(size * (1 - overlap)) // unit * unit)


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

        Without a generator the posterior's mode, else a sample drawn with that CPU generator, or with one generator
        per clip (then a clip's latents do not depend on the batch it was in).
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
            raise DataError(f"a clip of {width}x{height} pixels cannot be encoded: use multiples of {sw}x{sh}")


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
    """Read a VAE: our or an official safetensors, the official pytorch_model.pt, a library directory, LDM names."""
    from hvtrain.models.weights import fingerprint, open_weights

    weights = open_weights(path)
    sources = _official_names(weights.keys())
    config = _find_config(Path(path), weights.metadata, {k: tuple(weights.shape(s)) for k, s in sources.items()})
    with torch.device("meta"):
        model = build_vae(config)
    wanted = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    found = {k: _linear_shape(tuple(weights.shape(s)), wanted.get(k)) for k, s in sources.items()}
    _check(path, wanted, found)
    # One tensor at a time out of the memory map: the peak is one converted copy.
    state = {k: weights.get(sources[k]).reshape(wanted[k]).to(device=device, dtype=dtype) for k in wanted}
    model.load_state_dict(state, assign=True)
    return VideoVae(model, fingerprint=fingerprint(weights), tiling=tiling)


def save_vae(model: Any, path: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Write a VAE (VideoVae or the library's model) under its official names, with its config in the metadata."""
    from safetensors.torch import save_file
    from shards.atomic import atomic_path

    model = model.model if isinstance(model, VideoVae) else model
    config = {k: v for k, v in dict(model.config).items() if not k.startswith("_")}
    tensors = {k: v.detach().to("cpu", dtype).contiguous() for k, v in model.state_dict().items()}
    with atomic_path(Path(path)) as temporary:
        save_file(tensors, temporary, metadata={METADATA_KEY: json.dumps(config), "format": "pt"})


def _official_names(keys: Iterable[str]) -> dict[str, str]:
    """Official name -> name in the file."""
    keys = list(keys)
    plain = [k.removeprefix("vae.") for k in keys]
    n_up = 1 + max((int(m[1]) for m in map(_LDM_UP.match, plain) if m), default=-1)
    return {_official_name(p, n_up): k for p, k in zip(plain, keys)}


def _official_name(name: str, n_up: int) -> str:
    def turn(match: re.Match[str]) -> str:
        index = n_up - 1 - int(match[1])
        return f"decoder.up_blocks.{index}." + ("resnets." if match[2] == "block" else "upsamplers.0.")

    name = _LDM_UP.sub(turn, name)
    for pattern, replacement in _LDM_RULES:
        name = re.sub(pattern, replacement, name)
    return name


def _linear_shape(found: tuple[int, ...], wanted: tuple[int, ...] | None) -> tuple[int, ...]:
    """LDM files keep the attention's linear layers as 1x1(x1) convolutions."""
    if wanted is not None and len(wanted) == 2 and found[:2] == wanted and set(found[2:]) <= {1}:
        return wanted
    return found


def _find_config(
    path: Path, metadata: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """Constructor arguments: from the file's metadata, the config.json beside it, or the shapes."""
    if METADATA_KEY in metadata:
        return json.loads(metadata[METADATA_KEY])
    beside = (path if path.is_dir() else path.parent) / "config.json"
    if beside.is_file():
        config = json.loads(beside.read_text())
        # A file may lie in a folder with another model's config.json: the class name says whose it is.
        if str(config.get("_class_name", "")).startswith("AutoencoderK") and "block_out_channels" in config:
            return config
    return infer_config(shapes, path)


def infer_config(shapes: Mapping[str, tuple[int, ...]], path: str | Path) -> dict[str, Any]:
    """Constructor arguments from shapes; the group count leaves no trace there, so only the official 32 is assumed."""
    widths, blocks = [], 0
    while (shape := shapes.get(f"encoder.down_blocks.{blocks}.resnets.0.conv1.conv.weight")) is not None:
        widths.append(shape[0])
        blocks += 1
    if not widths or "post_quant_conv.weight" not in shapes:
        raise CheckpointError(f"{path}: not a VAE of this architecture: {_resemblance(shapes)}")
    if any(w % 32 for w in widths):
        raise CheckpointError(
            f"{path}: block widths {widths} need a config (metadata '{METADATA_KEY}' or a config.json beside the file)"
        )
    layers = sum(f"encoder.down_blocks.0.resnets.{j}.conv1.conv.weight" in shapes for j in range(16))
    return {
        "in_channels": shapes["encoder.conv_in.conv.weight"][1] if "encoder.conv_in.conv.weight" in shapes else 3,
        "out_channels": shapes["decoder.conv_out.conv.weight"][0] if "decoder.conv_out.conv.weight" in shapes else 3,
        "latent_channels": shapes["post_quant_conv.weight"][0],
        "block_out_channels": tuple(widths),
        "layers_per_block": layers,
        "mid_block_add_attention": any(".mid_block.attentions." in k for k in shapes),
    }


def _resemblance(names: Iterable[str]) -> str:
    """What a file that is not this VAE seems to be."""
    names = list(names)
    for part, what in (
        ("double_blocks.", "it looks like a video DiT"),
        ("transformer_blocks.", "it looks like a DiT in the library's layout"),
        ("decoder.upsamples.", "it looks like the VAE of another architecture"),
        ("decoder.middle.", "it looks like the VAE of another architecture"),
        ("encoder.norm_out.gamma", "it looks like the VAE of another architecture"),
        ("lora_", "it looks like a LoRA"),
        ("self_attn.", "it looks like a text encoder"),
        ("encoder.down_blocks.", "it looks like an image VAE"),
    ):
        if any(part in n for n in names):
            return what
    return "its first keys are " + ", ".join(names[:3]) if names else "it holds no tensors"


def _check(path: str | Path, wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a file whose names or shapes differ, naming the first differences."""
    problems = []
    missing, extra = [k for k in wanted if k not in found], [k for k in found if k not in wanted]
    shapes = [k for k in wanted if k in found and found[k] != wanted[k]]
    if missing:
        problems.append(f"{len(missing)} missing (first: {', '.join(missing[:3])})")
    if extra:
        problems.append(f"{len(extra)} unexpected (first: {', '.join(extra[:3])})")
    if shapes:
        first = shapes[0]
        problems.append(f"{len(shapes)} of wrong shape ({first}: {list(found[first])}, expected {list(wanted[first])})")
    if problems:
        what = "" if len(missing) < len(wanted) // 2 else f"; {_resemblance(found)}"
        raise CheckpointError(f"{path}: not a VAE of this architecture: {'; '.join(problems)}{what}")
