"""A decoder-only language model as a text encoder: transformers' class, without the layers that nobody reads.

A Hugging Face directory (language model alone or inside a larger one), or ComfyUI's single file, plain or
scaled float8. Prefixes differ between them and between transformers 4 and 5: the prefix is found, not listed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
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
SKIPPED_LAYERS = 2  # the DiTs read the third hidden state from the end: two layers and the norm are dropped


@dataclass(frozen=True)
class LoadedEncoder:
    model: Any
    fingerprint: str


@dataclass(frozen=True)
class LanguageModel:
    """A family of language models, and what shapes cannot tell of the official one."""

    what: str
    module: str  # of transformers; its classes' names begin with `classes`
    classes: tuple[str, str, str]  # configuration, model, rotary embedding
    types: tuple[str, ...]  # the `model_type` of configs that may describe one of these
    head_dim: int
    facts: Mapping[str, Any]


def load_language_model(
    path: str | Path, kind: LanguageModel, *, dtype: torch.dtype, device: torch.device | str = "cpu",
    fp8: bool = False
) -> LoadedEncoder:
    """The library's model without the last two layers and without its norm: its
    output is hidden_states[-3]."""
    source = anchored(path, {"embed_tokens.weight": OWN_NAMES}, what=kind.what)
    config = config_for(source, kind)
    module = import_module(kind.module)
    with torch.device("meta"):
        model = getattr(module, kind.classes[1])(config)
    model.norm = nn.Identity()
    used = re.compile(rf"layers\.({'|'.join(map(str, range(config.num_hidden_layers)))})\.")
    source.load(model, what=kind.what, dtype=dtype, device=device, fp8="fp8_rows" if fp8 else None, used=used)
    # Its buffer is computed, not stored.
    model.rotary_emb = getattr(module, kind.classes[2])(config=config).to(device)
    return LoadedEncoder(model.eval().requires_grad_(False), fingerprint(source.weights))


def given_config(
    source: Source, types: tuple[str, ...], *, section: str = "text_config"
) -> Mapping[str, Any]:
    """The encoder's own config, of a composite model's its section, without what is no size or fact."""

    # a single file among others: the config.json may not be its own
    def mine(config: Mapping[str, Any]) -> bool:
        return source.path.is_dir() or config.get("model_type") in types

    config = config_of(source.path, source.weights.metadata, METADATA_KEY, mine=mine)
    given = config.get(section, config)
    return {
        key: value for key,
        value in given.items() if key not in ("dtype", "torch_dtype", "architectures", "layer_types")
    }


def config_for(source: Source, kind: LanguageModel) -> Any:
    """Sizes from shapes (composite configs leave some out), the rest from the
    config or the official model."""
    vocabulary, hidden = source.shape("embed_tokens.weight")
    given = given_config(source, kind.types)
    n_layers = given.get("num_hidden_layers") or count(source.sources, r"layers\.(\d+)\.")
    if n_layers <= SKIPPED_LAYERS:
        raise CheckpointError(f"{source.path}: {n_layers} layers: need more than {SKIPPED_LAYERS}")
    heads = given.get("num_attention_heads") or heads_of(source, hidden, kind.head_dim)
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
    facts = {k: v for k, v in kind.facts.items() if not (k == "rope_theta" and "rope_parameters" in given)}
    # Without a padding id: it only zeroes an embedding row's gradient, and may lie past a trimmed vocabulary.
    return getattr(import_module(kind.module), kind.classes[0])(
        **{**facts, **given, **sizes, "pad_token_id": None}
    )


def heads_of(source: Source, hidden: int, head_dim: int) -> int:
    """The number of heads leaves no trace in shapes: the official head size, for large widths only."""
    if hidden % head_dim or hidden < 6 * head_dim:
        raise CheckpointError(
            f"{source.path}: cannot tell the number of heads of width {hidden}: "
            f"put the config.json beside the file or into its metadata ('{METADATA_KEY}')"
        )
    return hidden // head_dim
