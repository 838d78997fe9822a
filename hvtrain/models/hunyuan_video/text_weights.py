"""Weights of the text encoders, from the layouts in use into transformers' LlamaModel and CLIPTextModel.

A Hugging Face directory (language model alone, full LLaVA, whole CLIP), or ComfyUI's single file, plain or
scaled float8. Prefixes differ between them and between transformers 4 and 5: the prefix is found, not listed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hvtrain.errors import CheckpointError
from hvtrain.models.identify import count
from hvtrain.weights.containers import fingerprint
from hvtrain.weights.keymap import OWN_NAMES
from hvtrain.weights.source import Source, anchored, config_of

METADATA_KEY = "hvtrain.config"  # safetensors metadata of a single file: the encoder's config.json
SKIPPED_LAYERS = 2  # the DiT reads the third hidden state from the end: two layers and the norm are dropped
MODEL_TYPES = ("llama", "llava", "clip", "clip_text_model")  # whose config.json may describe one of these

# What shapes cannot tell, of the official models.
LLAMA_FACTS = {"rope_theta": 500000.0, "rms_norm_eps": 1e-5, "max_position_embeddings": 8192}
LLAMA_HEAD_DIM = 128
CLIP_FACTS = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
CLIP_HEAD_DIM = 64


@dataclass(frozen=True)
class LoadedEncoder:
    model: Any
    fingerprint: str


def load_llm(
    path: str | Path, *, dtype: torch.dtype, device: torch.device | str = "cpu", fp8: bool = False
) -> LoadedEncoder:
    """A LlamaModel without the last two layers and without its norm: its output is hidden_states[-3]."""
    from transformers import LlamaModel
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    source = anchored(path, {"embed_tokens.weight": OWN_NAMES}, what="a Llama text encoder")
    config = _llama_config(source)
    with torch.device("meta"):
        model = LlamaModel(config)
    model.norm = nn.Identity()  # type: ignore[assignment]
    used = re.compile(rf"layers\.({'|'.join(map(str, range(config.num_hidden_layers)))})\.")
    source.load(model, what="a Llama text encoder", dtype=dtype, device=device, fp8="fp8_rows" if fp8 else None, used=used)
    model.rotary_emb = LlamaRotaryEmbedding(config=config).to(device)  # its buffer is computed, not stored
    return LoadedEncoder(model.eval().requires_grad_(False), fingerprint(source.weights))


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


def _config(source: Source) -> Mapping[str, Any]:
    """The encoder's own config, of a composite model's its text section, without what is no size or fact."""

    def mine(config: Mapping[str, Any]) -> bool:  # a single file among others: the config.json may not be its own
        return source.path.is_dir() or config.get("model_type") in MODEL_TYPES

    config = config_of(source.path, source.weights.metadata, METADATA_KEY, mine=mine)
    given = config.get("text_config", config)
    return {key: value for key, value in given.items() if key not in ("dtype", "torch_dtype", "architectures")}


def _llama_config(source: Source) -> Any:
    """Sizes from shapes (a LLaVA config leaves some out), the rest from the config or the official model."""
    from transformers import LlamaConfig

    vocabulary, hidden = source.shape("embed_tokens.weight")
    given = _config(source)
    n_layers = given.get("num_hidden_layers") or count(source.sources, r"layers\.(\d+)\.")
    if n_layers <= SKIPPED_LAYERS:
        raise CheckpointError(f"{source.path}: {n_layers} layers: need more than {SKIPPED_LAYERS}")
    heads = given.get("num_attention_heads") or heads_of(source, hidden, LLAMA_HEAD_DIM)
    head_dim = source.shape("layers.0.self_attn.q_proj.weight")[0] // heads
    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": n_layers - SKIPPED_LAYERS,
        "intermediate_size": source.shape("layers.0.mlp.gate_proj.weight")[0],
        "num_attention_heads": heads,
        "num_key_value_heads": source.shape("layers.0.self_attn.k_proj.weight")[0] // head_dim,
        "head_dim": head_dim,
    }
    facts = {k: v for k, v in LLAMA_FACTS.items() if not (k == "rope_theta" and "rope_parameters" in given)}
    # Without a padding id: it only zeroes an embedding row's gradient, and may lie past a trimmed vocabulary.
    return LlamaConfig(**{**facts, **given, **sizes, "pad_token_id": None})


def _clip_config(source: Source) -> Any:
    from transformers import CLIPTextConfig

    vocabulary, hidden = source.shape("embeddings.token_embedding.weight")
    given = _config(source)
    sizes = {
        "vocab_size": vocabulary, "hidden_size": hidden,
        "max_position_embeddings": source.shape("embeddings.position_embedding.weight")[0],
        "num_hidden_layers": count(source.sources, r"encoder\.layers\.(\d+)\."),
        "intermediate_size": source.shape("encoder.layers.0.mlp.fc1.weight")[0],
        "num_attention_heads": given.get("num_attention_heads") or heads_of(source, hidden, CLIP_HEAD_DIM),
    }
    return CLIPTextConfig(**{**CLIP_FACTS, **given, **sizes})


def heads_of(source: Source, hidden: int, head_dim: int) -> int:
    """The number of heads leaves no trace in shapes: the official head size, for large widths only."""
    if hidden % head_dim or hidden < 6 * head_dim:
        raise CheckpointError(
            f"{source.path}: cannot tell the number of heads of width {hidden}: "
            f"put the config.json beside the file or into its metadata ('{METADATA_KEY}')"
        )
    return hidden // head_dim
