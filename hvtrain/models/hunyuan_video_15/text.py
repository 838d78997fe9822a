"""The text encoders: the language half of Qwen2.5-VL-7B for the whole prompt, and glyph.py for what it
quotes.

The language model is causal with padding on the right, so padding and its mask change nothing that is kept:
prompts are encoded one by one at their own length, which equals the official padded form and never depends on
the batch. The template, its crop and the lengths are the official code's; other programs differ in all three.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hvtrain.errors import CheckpointError
from hvtrain.models.hunyuan_video_15.flavors import TEXT_TOKENS
from hvtrain.models.hunyuan_video_15.glyph import GlyphEncoder, load_byt5
from hvtrain.models.language import LanguageModel, load_language_model
from hvtrain.models.spec import Parts
from hvtrain.models.tokens import check_vocabulary, open_tokenizer, tokenizer_folder
from hvtrain.weights.containers import fingerprint, open_weights

# Nine spaces before each item: a line that officially goes on in the next, indented, within the string.
ASPECTS = "".join(
    f"{' ' * 9}{item}"
    for item in (
        "1. The main content and theme of the video.",
        "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects.",
        "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects.",
        "4. background environment, light, style and atmosphere.",
        "5. camera angles, movements, and transitions used in the video.",
    )
)
TEMPLATE = (
    "<|im_start|>system\nYou are a helpful assistant. Describe the video by detailing the following aspects:"
    f"{ASPECTS}<|im_end|>\n<|im_start|>user\n{{}}<|im_end|>\n<|im_start|>assistant\n"
)
QWEN = LanguageModel(
    what="a Qwen2.5-VL text encoder",
    module="transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
    classes=("Qwen2_5_VLTextConfig", "Qwen2_5_VLTextModel", "Qwen2_5_VLRotaryEmbedding"),
    types=("qwen2_5_vl", "qwen2_5_vl_text"),
    head_dim=128,
    facts={"rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "max_position_embeddings": 128000},
)


@dataclass(frozen=True)
class LlmTokenizer:
    """Prompt -> ids of the whole template; the first `crop` states belong to its head and are dropped."""

    tokenizer: Any
    crop: int

    def __call__(self, prompt: str) -> list[int]:
        head, tail = TEMPLATE.split("{}")
        return self.tokenizer.encode(head + (prompt or " ") + tail).ids[: self.crop + TEXT_TOKENS]


class QwenAndGlyph:
    """Prompts to what the DiT reads. `.llm` is the library's model; gradients never flow."""

    def __init__(
        self, llm: nn.Module, glyph: GlyphEncoder, *, tokenizer: LlmTokenizer, fingerprint: str = ""
    ) -> None:
        self.llm, self.glyph, self.tokenizer, self.fingerprint = llm, glyph, tokenizer, fingerprint

    def to(self, device: torch.device | str) -> QwenAndGlyph:
        self.llm.to(device)
        self.glyph.to(device)
        return self

    def encode(self, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
        """Per prompt, float32 on the CPU: "text" [n E], and "glyph" [m G], no
        rows where it quotes nothing."""
        return [{"text": self.encode_llm(prompt), "glyph": self.glyph.encode(prompt)} for prompt in prompts]

    @torch.no_grad()
    def encode_llm(self, prompt: str) -> Tensor:
        device = next(self.llm.parameters()).device
        ids = torch.tensor([self.tokenizer(prompt)], device=device)
        states = self.llm(input_ids=ids, use_cache=False).last_hidden_state[0]
        return states[self.tokenizer.crop :].float().cpu()


def open_text(
    parts: Parts, *, dtype: torch.dtype = torch.float16, device: torch.device | str = "cpu", fp8: bool = False
) -> QwenAndGlyph:
    """Read both encoders, each from a Hugging Face directory or a single file.

    A tokenizer that is not given is looked for in the directory of the LLM. `fp8` stores the LLM's linear
    layers as float8 (half the memory; states differ by a few percent) and multiplies in `dtype`.
    """
    tokenizer = open_llm_tokenizer(tokenizer_folder(parts, "llm"))
    glyph = load_byt5(parts["byt5"], device=device)
    llm = load_language_model(parts["llm"], QWEN, dtype=dtype, device=device, fp8=fp8)
    check_vocabulary(parts["llm"], tokenizer.tokenizer, llm.model.config.vocab_size)
    return QwenAndGlyph(
        llm.model, glyph, tokenizer=tokenizer,
        fingerprint=_joined(llm.fingerprint, glyph.fingerprint, fp8, tokenizer.crop)
    )


def text_fingerprints(parts: Parts) -> tuple[str, ...]:
    """Those of the encoders that `open_text` would make of these files, plain and in
    float8. Reads headers and samples."""
    crop = open_llm_tokenizer(tokenizer_folder(parts, "llm")).crop
    prints = fingerprint(open_weights(parts["llm"])), fingerprint(open_weights(parts["byt5"]))
    return tuple(_joined(*prints, fp8, crop) for fp8 in (False, True))


def _joined(llm: str, byt5: str, fp8: bool, crop: int) -> str:
    return hashlib.sha256("/".join([llm, byt5, "fp8" if fp8 else "", str(crop)]).encode()).hexdigest()


def open_llm_tokenizer(folder: str | Path) -> LlmTokenizer:
    """tokenizer.json, or Qwen's vocab.json, merges.txt and tokenizer_config.json. 108
    tokens of its head are cropped."""
    folder = Path(folder)
    if (folder / "tokenizer.json").is_file() or not (folder / "tokenizer_config.json").is_file():
        tokenizer = open_tokenizer(folder)
    else:
        from transformers import Qwen2Tokenizer

        tokenizer = Qwen2Tokenizer.from_pretrained(str(folder), local_files_only=True).backend_tokenizer
    if any(tokenizer.token_to_id(mark) is None for mark in ("<|im_start|>", "<|im_end|>")):
        raise CheckpointError(f"{folder}: not a Qwen tokenizer: it has no <|im_start|> or <|im_end|> token")
    return LlmTokenizer(tokenizer, crop=len(tokenizer.encode(TEMPLATE.split("{}")[0]).ids))
