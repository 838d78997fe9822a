"""All parts of a tiny HunyuanVideo 1.5 with random weights, as files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Qwen2_5_VLTextConfig, SiglipVisionConfig, SiglipVisionModel, T5Config, T5EncoderModel
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

from hvtrain.models import find
from hvtrain.models.hunyuan_video_15.upsample import To720p
from hvtrain.models.hunyuan_video_15.vae import METADATA_KEY, build_vae
from hvtrain.models.load import save_dit
from hvtrain.models.video_vae import save_vae
from tests.models.any_model import random_model

TOKENIZER = Path(__file__).parents[2] / "data" / "qwen25_tokenizer"
VAE = {"block_out_channels": (8, 16, 32, 64, 64), "layers_per_block": 1}


def write_dit(path: Path, flavor: str) -> Path:
    """Of any flavor, at the tiny one's sizes."""
    spec = find("hunyuan-video-15")
    own, tiny = spec.flavor(flavor), spec.flavor("tiny").arch
    arch = replace(tiny, in_channels=own.arch.in_channels, meanflow=own.arch.meanflow)
    fitted = spec.fitted(own, arch)
    save_dit(random_model(spec, fitted), path, spec=spec, flavor=fitted)
    return path


def write_parts(folder: Path) -> dict[str, str]:
    """Keys under `model:` of everything but the DiT."""
    torch.manual_seed(0)
    arch = find("hunyuan-video-15").flavor("tiny").arch
    text = {
        "vocab_size": 152064, "hidden_size": arch.text_dim, "intermediate_size": 48, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    }
    llm = Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(**text)).to(torch.bfloat16)
    state = {f"model.{name}": value for name, value in llm.state_dict().items()}
    save_file(state, folder / "llm.safetensors", metadata={"hvtrain.config": json.dumps(text)})
    glyph = {
        "vocab_size": 1510, "d_model": arch.glyph_dim, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 3
    }
    T5EncoderModel(T5Config(**glyph, feed_forward_proj="gated-gelu")).save_pretrained(folder / "byt5")
    vision = SiglipVisionConfig(
        hidden_size=arch.vision_dim, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        image_size=30, patch_size=14,
    )
    SiglipVisionModel(vision).save_pretrained(folder / "siglip" / "image_encoder")
    save_vae(build_vae(VAE), folder / "vae.safetensors", key=METADATA_KEY)
    save_file(To720p(channels=32, hidden=16, n_blocks=1).state_dict(), folder / "upsampler.safetensors")
    names = {"vae": "vae.safetensors", "llm": "llm.safetensors", "byt5": "byt5", "siglip": "siglip",
             "upsampler": "upsampler.safetensors"}  # fmt: skip
    return {name: str(folder / file) for name, file in names.items()} | {"llm_tokenizer": str(TOKENIZER)}
