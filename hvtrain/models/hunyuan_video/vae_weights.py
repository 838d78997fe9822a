"""The layouts that the VAE's weights come in: names, configs and the check of both.

Official and library names are the same; ComfyUI's repack may have LDM names. The architecture's arguments
come from our metadata, a config.json (official or the library's spelling), or the shapes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hvtrain.errors import CheckpointError
from hvtrain.weights.source import config_of

METADATA_KEY = "hvtrain.vae"  # safetensors metadata: the constructor arguments as JSON
Shapes = Mapping[str, tuple[int, ...]]

# Names of the official config.json that the library's constructor spells differently.
_OFFICIAL_ARGUMENTS = {"time_compression_ratio": "temporal_compression_ratio"}
_OFFICIAL_BLOCKS = {
    "DownEncoderBlockCausal3D": "HunyuanVideoDownBlock3D",
    "UpDecoderBlockCausal3D": "HunyuanVideoUpBlock3D",
}
_NOT_ARGUMENTS = ("sample_size", "sample_tsize", "mid_block_causal_attn")  # tile sizes and a constant

# LDM names -> official names; `up` blocks are numbered backwards there, see `_official_name`.
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


def official_names(keys: Iterable[str]) -> dict[str, str]:
    """Official name -> name in the file."""
    keys = list(keys)
    plain = [k.removeprefix("vae.") for k in keys]
    n_up = 1 + max((int(m[1]) for m in map(_LDM_UP.match, plain) if m), default=-1)
    return {_official_name(p, n_up): k for p, k in zip(plain, keys, strict=True)}


def _official_name(name: str, n_up: int) -> str:
    def turn(match: re.Match[str]) -> str:
        index = n_up - 1 - int(match[1])
        return f"decoder.up_blocks.{index}." + ("resnets." if match[2] == "block" else "upsamplers.0.")

    name = _LDM_UP.sub(turn, name)
    for pattern, replacement in _LDM_RULES:
        name = re.sub(pattern, replacement, name)
    return name


def find_config(path: Path, metadata: Mapping[str, str], shapes: Shapes) -> dict[str, Any]:
    """Constructor arguments: from the file's metadata, the config.json beside it, or the shapes."""
    return config_of(path, metadata, METADATA_KEY, mine=_is_own) or infer_config(shapes, path)


def _is_own(config: Mapping[str, Any]) -> bool:
    """A file may lie in a folder with another model's config.json: the class name says whose it is."""
    return str(config.get("_class_name", "")).startswith("AutoencoderK") and "block_out_channels" in config


def infer_config(shapes: Shapes, path: str | Path) -> dict[str, Any]:
    """Constructor arguments from shapes; the group count leaves no trace: the official 32 is assumed."""
    widths, blocks = [], 0
    while (shape := shapes.get(f"encoder.down_blocks.{blocks}.resnets.0.conv1.conv.weight")) is not None:
        widths.append(shape[0])
        blocks += 1
    if not widths or "post_quant_conv.weight" not in shapes:
        raise CheckpointError(f"{path}: not a VAE of this architecture: {resemblance(shapes)}")
    if any(w % 32 for w in widths):
        raise CheckpointError(
            f"{path}: block widths {widths} need a config.json beside it or metadata '{METADATA_KEY}'"
        )
    layers = sum(f"encoder.down_blocks.0.resnets.{j}.conv1.conv.weight" in shapes for j in range(16))
    return {
        "latent_channels": shapes["post_quant_conv.weight"][0],
        "block_out_channels": tuple(widths),
        "layers_per_block": layers,
        "mid_block_add_attention": any(".mid_block.attentions." in k for k in shapes),
    }


def resemblance(names: Iterable[str]) -> str:
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
