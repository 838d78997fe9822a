"""What a video shall show in letters: the spans that a prompt quotes, through
ByT5-small as Glyph-SDXL v2 trained it.

It reads bytes, so it needs no tokenizer files. Padding is masked out in there: a prompt is encoded alone at
its own length. Always fp32, as officially: it is small.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hvtrain.errors import CheckpointError
from hvtrain.models.hunyuan_video_15.flavors import GLYPH_TOKENS
from hvtrain.models.identify import count
from hvtrain.models.precision import without_autocast
from hvtrain.weights.containers import Weights, fingerprint, open_weights
from hvtrain.weights.keymap import Fused
from hvtrain.weights.source import Source

QUOTED = re.compile('"(.*?)"|\u201c(.*?)\u201d')  # straight, or opening and closing; within a line
END, FIRST_BYTE = 1, 3  # token ids: of the end, and of byte 0
FACTS: dict[str, Any] = {
    "feed_forward_proj": "gated-gelu", "layer_norm_epsilon": 1e-6, "relative_attention_max_distance": 128
}


def quoted(prompt: str) -> list[str]:
    """The spans between quotation marks, each once, in order."""
    return list(dict.fromkeys(match[1] or match[2] or "" for match in QUOTED.finditer(prompt)))


def glyph_ids(prompt: str) -> list[int]:
    """Token ids of what is quoted, as bytes; none where nothing is."""
    text = "".join(f'Text "{span}". ' for span in quoted(prompt))
    return [*(FIRST_BYTE + byte for byte in text.encode()[: GLYPH_TOKENS - 1]), END] if text else []


class GlyphEncoder:
    """`.model` is the library's T5 encoder."""

    def __init__(self, model: Any, *, fingerprint: str = "") -> None:
        self.model, self.fingerprint = model, fingerprint

    def to(self, device: torch.device | str) -> GlyphEncoder:
        self.model.to(device)
        return self

    @torch.no_grad()
    def encode(self, prompt: str) -> Tensor:
        """[m G] float32 on the CPU, no rows where the prompt quotes nothing."""
        weight = self.model.embed_tokens.weight
        if not (ids := glyph_ids(prompt)):
            return torch.zeros(0, weight.shape[1])
        with without_autocast(weight.device.type):
            return self.model(
                input_ids=torch.tensor([ids], device=weight.device)
            ).last_hidden_state[0].float().cpu()


def load_byt5(path: str | Path, *, device: torch.device | str = "cpu") -> GlyphEncoder:
    """The encoder of Glyph's byt5_model.pt, of a transformers directory or of ComfyUI's single file."""
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5Stack

    source = _encoder_of(open_weights(path))
    bias = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    vocabulary, dim = source.shape("embed_tokens.weight")
    n_buckets, n_heads = source.shape(bias)
    config = T5Config(
        vocab_size=vocabulary, d_model=dim,
        d_kv=source.shape("block.0.layer.0.SelfAttention.q.weight")[0] // n_heads,
        d_ff=source.shape("block.0.layer.1.DenseReluDense.wi_0.weight")[0],
        num_layers=count(source.sources, r"block\.(\d+)\."), num_heads=n_heads,
        relative_attention_num_buckets=n_buckets, is_encoder_decoder=False, use_cache=False, **FACTS,
    )
    if vocabulary < FIRST_BYTE + 256:
        raise CheckpointError(
            f"{path}: its vocabulary has {vocabulary} tokens, ByT5's has 384 and more: not a ByT5 encoder"
        )
    with torch.device("meta"):
        model = T5Stack(config)
    source.load(model, what="a ByT5 text encoder", dtype=torch.float32, device=device)
    return GlyphEncoder(model, fingerprint=fingerprint(source.weights))


def _encoder_of(weights: Weights) -> Source:
    """Under whatever prefix; the embedding is also called `shared`, outside the encoder."""
    last = "final_layer_norm.weight"
    ends = (
        [name for name in weights if name.endswith(f"encoder.{last}")]
        or [name for name in weights if name == last]
    )
    if not ends:
        raise CheckpointError(f"{weights.path}: not a ByT5 text encoder: no 'encoder.{last}' in it")
    prefix = ends[0].removesuffix(last)
    sources = {name.removeprefix(prefix): Fused((name,)) for name in weights if name.startswith(prefix)}
    outside = prefix.removesuffix("encoder.") + "shared.weight"
    if outside in weights:
        sources.setdefault("embed_tokens.weight", Fused((outside,)))
    return Source(weights, sources)
