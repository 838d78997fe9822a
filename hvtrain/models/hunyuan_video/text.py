"""The text encoders: the text part of LLaVA-Llama-3-8B (per-token states) and CLIP-L (one pooled vector).

Both are causal with padding on the right, so padding and its mask change nothing that is kept: prompts are
encoded one by one at their own length, which equals the official padded form and never depends on the batch.
Reading the weights from the layouts they come in is text_weights.py.
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
from hvtrain.models.hunyuan_video.flavors import MAX_TOKENS
from hvtrain.models.hunyuan_video.text_weights import LLAMA, load_clip
from hvtrain.models.llm import load_llm
from hvtrain.models.spec import Parts
from hvtrain.models.tokens import check_vocabulary, open_tokenizer, tokenizer_folder
from hvtrain.weights.containers import fingerprint, open_weights

TEMPLATE = (
    "<|start_header_id|>system<|end_header_id|>\n\n"
    "Describe the video by detailing the following aspects: "
    "1. The main content and theme of the video."
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
    "4. background environment, light, style and atmosphere."
    "5. camera angles, movements, and transitions used in the video:<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
)
BEGIN = "<|begin_of_text|>"
OFFICIAL_BEGIN_ID = 128000  # marks the Llama 3 vocabulary, whose crop is a constant of the trained model
OFFICIAL_CROP = 95
CLIP_TOKENS = 77


@dataclass(frozen=True)
class LlmTokenizer:
    """Prompt -> ids of the whole template; the first `crop` states belong to its head and are dropped."""

    tokenizer: Any
    begin: int
    crop: int

    def __call__(self, prompt: str) -> list[int]:
        head, tail = TEMPLATE.split("{}")
        ids = self.tokenizer.encode(head + prompt + tail).ids
        # Some copies of the tokenizer lack the rule that adds the first token, which the crop counts.
        ids = ids if ids[:1] == [self.begin] else [self.begin, *ids]
        return ids[: self.crop + MAX_TOKENS]


class LlamaAndClip:
    """Prompts to what the DiT reads. `.llm` and `.clip` are the library's models; gradients never flow."""

    def __init__(
        self, llm: nn.Module, clip: nn.Module, *, llm_tokenizer: LlmTokenizer, clip_tokenizer: Any,
        fingerprint: str = "",
    ) -> None:
        self.llm, self.clip = llm, clip
        self.llm_tokenizer, self.clip_tokenizer = llm_tokenizer, clip_tokenizer
        self.fingerprint = fingerprint

    @property
    def device(self) -> torch.device:
        return next(self.clip.parameters()).device

    def to(self, device: torch.device | str) -> LlamaAndClip:
        self.llm.to(device)
        self.clip.to(device)
        return self

    def encode(self, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
        """Per prompt, float32 on the CPU: "text" [n E], the valid tokens only, and "pooled" [P]."""
        return [{"text": self.encode_llm(p), "pooled": self.encode_clip(p)} for p in prompts]

    @torch.no_grad()
    def encode_llm(self, prompt: str) -> Tensor:
        ids = torch.tensor([self.llm_tokenizer(prompt)], device=self.device)
        states = self.llm(input_ids=ids, use_cache=False).last_hidden_state[0]
        return states[self.llm_tokenizer.crop :].float().cpu()

    @torch.no_grad()
    def encode_clip(self, prompt: str) -> Tensor:
        ids = torch.tensor([self.clip_tokenizer.encode(prompt).ids], device=self.device)
        # Unpadded, the end token is the last one: the pooled state whatever `eos_token_id` the config claims.
        return self.clip(input_ids=ids).last_hidden_state[0, -1].float().cpu()


def open_text(
    parts: Parts, *, dtype: torch.dtype = torch.float16, device: torch.device | str = "cpu", fp8: bool = False
) -> LlamaAndClip:
    """Read both encoders, each from a Hugging Face directory or a single file.

    A tokenizer that is not given is looked for in the directory of its model. `fp8` stores the LLM's linear layers as
    float8 (half the memory; states differ by a few percent) and multiplies in `dtype`.
    """
    llm, clip = parts["llm"], parts["clip"]
    llm_ids = open_llm_tokenizer(tokenizer_folder(parts, "llm"))
    clip_ids = open_clip_tokenizer(tokenizer_folder(parts, "clip"))
    llm_part = load_llm(llm, LLAMA, dtype=dtype, device=device, fp8=fp8)
    clip_part = load_clip(clip, dtype=dtype, device=device)
    check_vocabulary(llm, llm_ids.tokenizer, llm_part.model.config.vocab_size)
    check_vocabulary(clip, clip_ids, clip_part.model.config.vocab_size)
    return LlamaAndClip(
        llm_part.model, clip_part.model, llm_tokenizer=llm_ids, clip_tokenizer=clip_ids,
        fingerprint=_joined(llm_part.fingerprint, clip_part.fingerprint, fp8, llm_ids.crop),
    )


def text_fingerprints(parts: Parts) -> tuple[str, ...]:
    """Those of the encoders that `open_text` would make of these files, plain and in float8. Reads headers and samples."""
    crop = open_llm_tokenizer(tokenizer_folder(parts, "llm")).crop
    prints = fingerprint(open_weights(parts["llm"])), fingerprint(open_weights(parts["clip"]))
    return tuple(_joined(*prints, fp8, crop) for fp8 in (False, True))


def _joined(llm: str, clip: str, fp8: bool, crop: int) -> str:
    return hashlib.sha256("/".join([llm, clip, "fp8" if fp8 else "", str(crop)]).encode()).hexdigest()


def open_llm_tokenizer(folder: str | Path) -> LlmTokenizer:
    tokenizer = open_tokenizer(Path(folder))
    begin = tokenizer.token_to_id(BEGIN)
    if begin is None or tokenizer.token_to_id("<|eot_id|>") is None:
        raise CheckpointError(f"{folder}: not a Llama 3 tokenizer: it has no {BEGIN} or <|eot_id|> token")
    head = tokenizer.encode(TEMPLATE.split("{}")[0]).ids
    crop = len(head) + (head[:1] != [begin])
    return LlmTokenizer(tokenizer, begin, crop=OFFICIAL_CROP if begin == OFFICIAL_BEGIN_ID else crop)


def open_clip_tokenizer(folder: str | Path) -> Any:
    tokenizer = open_tokenizer(Path(folder))
    end = tokenizer.token_to_id("<|endoftext|>")
    if end is None or tokenizer.encode("").ids[-1:] != [end]:
        raise CheckpointError(f"{folder}: not a CLIP tokenizer: it does not end a text with <|endoftext|>")
    tokenizer.enable_truncation(CLIP_TOKENS)  # keeps the end token
    return tokenizer
