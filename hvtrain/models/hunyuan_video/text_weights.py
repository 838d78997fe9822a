"""Weights of the text encoders, from the layouts in use into transformers' LlamaModel (see
models/language.py) and CLIPTextModel: a Hugging Face directory (language model alone, full LLaVA, whole
CLIP), or ComfyUI's single file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from hvtrain.models.identify import count
from hvtrain.models.language import LanguageModel, LoadedEncoder, given_config, heads_of
from hvtrain.weights.containers import fingerprint
from hvtrain.weights.keymap import OWN_NAMES
from hvtrain.weights.source import Source, anchored

LLAMA = LanguageModel(
    what="a Llama text encoder",
    module="transformers.models.llama.modeling_llama",
    classes=("LlamaConfig", "LlamaModel", "LlamaRotaryEmbedding"),
    types=("llama", "llava"),
    head_dim=128,
    facts={"rope_theta": 500000.0, "rms_norm_eps": 1e-5, "max_position_embeddings": 8192},
)
CLIP_TYPES = ("clip", "clip_text_model")
CLIP_FACTS = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
CLIP_HEAD_DIM = 64


def load_clip(path: str | Path, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> LoadedEncoder:
    from transformers import CLIPTextModel

    source = anchored(path, {"embeddings.token_embedding.weight": OWN_NAMES}, what="a CLIP text encoder")
    config = _clip_config(source)
    with torch.device("meta"):
        model = CLIPTextModel(config)
    used = re.compile(r"embeddings\.|encoder\.|final_layer_norm\.")
    source.load(model, what="a CLIP text encoder", dtype=dtype, device=device, used=used)
    positions = torch.arange(config.max_position_embeddings, device=device)[None]
    model.embeddings.register_buffer("position_ids", positions, persistent=False)  # computed, not stored
    return LoadedEncoder(model.eval().requires_grad_(False), fingerprint(source.weights))


def _clip_config(source: Source) -> Any:
    from transformers import CLIPTextConfig

    vocabulary, hidden = source.shape("embeddings.token_embedding.weight")
    given = given_config(source, CLIP_TYPES)
    sizes = {
        "vocab_size": vocabulary, "hidden_size": hidden,
        "max_position_embeddings": source.shape("embeddings.position_embedding.weight")[0],
        "num_hidden_layers": count(source.sources, r"encoder\.layers\.(\d+)\."),
        "intermediate_size": source.shape("encoder.layers.0.mlp.fc1.weight")[0],
        "num_attention_heads": given.get("num_attention_heads") or heads_of(source, hidden, CLIP_HEAD_DIM),
    }
    return CLIPTextConfig(**{**CLIP_FACTS, **given, **sizes})
