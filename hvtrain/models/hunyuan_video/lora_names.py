"""What a LoRA that is not HunyuanVideo's may be, by the names of the layers that it adapts."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Patterns that must all occur among the layer names, dots written as underscores; the first entry that fits.
# Prefixes differ between programs (lora_unet_, diffusion_model_, transformer_, ...), so only the ends are anchored.
LORA_LOOKS_LIKE: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("HunyuanVideo 1.5", (r"double_blocks_\d+_(img|txt)_attn_[qkv]$",)),
    ("HunyuanVideo 1.5", (r"(^|_)double_blocks_(2\d|[345]\d)_(img|txt)_",)),
    ("Wan image to video", (r"(^|_)blocks_\d+_cross_attn_(k|v)_img$",)),
    ("Wan", (r"(^|_)blocks_\d+_(self|cross)_attn_[qkvo]$",)),
    ("Wan (diffusers)", (r"(^|_)blocks_\d+_attn[12]_to_[qkv]$", r"(^|_)blocks_\d+_ffn_net_")),
    ("Qwen-Image", (r"transformer_blocks_\d+_img_mlp_net_",)),
    ("Flux (diffusers)", (r"(^|_)transformer_blocks_\d+_ff_context_net_", r"single_transformer_blocks_\d+_proj_mlp$")),
    ("Stable Diffusion 3", (r"joint_blocks_\d+_(x|context)_block",)),
    ("LTX-Video or PixArt", (r"(^|_)transformer_blocks_\d+_attn[12]_to_[qkv]$",)),
    ("a text encoder's", (r"(^|_)(text_model_encoder|model)_layers_\d+_self_attn_",)),
    ("a Stable Diffusion UNet", (r"(^|_)(input|down|mid|middle|up|output)_blocks?_",)),
)


def lora_looks_like(layers: Iterable[str]) -> str | None:
    plain = [layer.replace(".", "_") for layer in layers]
    for label, patterns in LORA_LOOKS_LIKE:
        if all(any(re.search(pattern, name) for name in plain) for pattern in patterns):
            return label
    return None
