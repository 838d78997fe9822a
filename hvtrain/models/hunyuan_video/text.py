"""The text encoders: the language model of LLaVA-Llama-3-8B (per-token states)
and CLIP-L (one pooled vector).

For image to video the LLM is shown the image too (sight.py). Both are causal with padding on the right,
so padding and its mask change nothing that is kept: prompts are encoded one by one at their own length,
which equals the official padded form and never depends on the batch. Reading the weights from the layouts
they come in is text_weights.py.
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
from hvtrain.models.hunyuan_video.sight import Sight, open_sight, sight_fingerprint
from hvtrain.models.hunyuan_video.text_weights import LLAMA, load_clip
from hvtrain.models.language import load_language_model
from hvtrain.models.spec import Parts
from hvtrain.models.tokens import check_vocabulary, open_tokenizer, tokenizer_folder
from hvtrain.weights.containers import fingerprint, open_weights

_SYSTEM, _USER = (
    "<|start_header_id|>system<|end_header_id|>\n\n",
    "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
)
_ASPECTS = (
    "1. The main content and theme of the video.2. The color, shape, size, texture, quantity, text, and "
    "spatial relationships of the objects.3. Actions, events, behaviors temporal relationships, physical "
    "movement changes of the objects.4. background environment, light, style and atmosphere.5. camera "
    "angles, movements, and transitions used in the video:<|eot_id|>"
)
TEMPLATE = f"{_SYSTEM}Describe the video by detailing the following aspects: {_ASPECTS}{_USER}"
SEEING_TEMPLATE = (  # the image stands at <image>
    f"{_SYSTEM}<image>\nDescribe the video by detailing the following aspects according to the reference "
    f"image: {_ASPECTS}\n\n{_USER}<|start_header_id|>assistant<|end_header_id|>\n\n"
)
BEGIN = "<|begin_of_text|>"
OFFICIAL_BEGIN_ID = 128000  # marks the Llama 3 vocabulary, whose crop is a constant of the trained model
OFFICIAL_CROP = 95
OFFICIAL_SEEING_CROP = 103  # counts the image as one token
ENDING = 4  # tokens between the prompt and the last line break, which are dropped
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


@dataclass(frozen=True)
class SeenPrompt:
    """The ids around an image, up to the last that is read."""

    before: list[int]
    behind: list[int]
    crop: int  # of those behind, the template's head
    cut: bool  # the prompt was too long

    @classmethod
    def of(cls, prompt: str, tokens: LlmTokenizer) -> SeenPrompt:
        """Both parts are cut into tokens by themselves, as a special token between them makes it."""
        tokenizer = tokens.tokenizer
        head, tail = SEEING_TEMPLATE.split("<image>")
        before = tokenizer.encode(head).ids
        before = before if before[:1] == [tokens.begin] else [tokens.begin, *before]
        crop = len(tokenizer.encode(tail.split("{}")[0], add_special_tokens=False).ids)
        if tokens.begin == OFFICIAL_BEGIN_ID:
            crop = OFFICIAL_SEEING_CROP - 1 - len(before)
        behind, most = (
            tokenizer.encode(tail.replace("{}", prompt), add_special_tokens=False).ids, crop + MAX_TOKENS
        )
        return cls(before, behind[:most], crop, len(behind) > most)


class LlamaAndClip:
    """Prompts to what the DiT reads. `.llm` and `.clip` are the library's models; gradients never flow."""

    def __init__(
        self, llm: nn.Module, clip: nn.Module, *, llm_tokenizer: LlmTokenizer, clip_tokenizer: Any,
        fingerprint: str = "", sight: Sight | None = None, sees: int = 0,
    ) -> None:
        self.llm: Any = llm
        self.clip, self.sight, self.sees = clip, sight, sees
        self.llm_tokenizer, self.clip_tokenizer = llm_tokenizer, clip_tokenizer
        self.fingerprint = fingerprint

    @property
    def device(self) -> torch.device:
        return next(self.clip.parameters()).device

    def to(self, device: torch.device | str) -> LlamaAndClip:
        self.llm.to(device)
        self.clip.to(device)
        if self.sight is not None:
            self.sight.to(device)
        return self

    def encode(
        self, prompts: Sequence[str], pictures: Sequence[Tensor | None] = ()
    ) -> list[dict[str, Tensor]]:
        """Per prompt, float32 on the CPU: "text" [n E], the valid tokens only, and "pooled" [P].
        Where the LLM sees, "seen_text": every `sees`-th token of the picture [3 H W] in [-1, 1]
        (none: black), then the prompt's."""
        if self.sight is None:
            return [{"text": self.encode_llm(p), "pooled": self.encode_clip(p)} for p in prompts]
        both = zip(prompts, pictures or [None] * len(prompts), strict=True)
        return [
            {"seen_text": self.encode_seeing(p, image), "pooled": self.encode_clip(p)} for p, image in both
        ]

    @torch.no_grad()
    def encode_seeing(self, prompt: str, picture: Tensor | None) -> Tensor:
        assert self.sight is not None
        ids, image, words = (
            SeenPrompt.of(prompt, self.llm_tokenizer), self.sight(picture), self.llm.get_input_embeddings()
        )
        before, behind = (words(torch.tensor(part, device=self.device)) for part in (ids.before, ids.behind))
        embeddings = torch.cat([before, image.to(before), behind])[None]
        states = self.llm(inputs_embeds=embeddings, use_cache=False).last_hidden_state[0]
        start = len(before) + len(image)
        seen, said = states[len(before) : start : self.sees], states[start + ids.crop :]
        # Of a prompt that was cut its own last tokens are dropped, as in the official code.
        said = said[:-ENDING] if ids.cut else torch.cat([said[: -ENDING - 1], said[-1:]])
        return torch.cat([seen, said]).float().cpu()

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
    parts: Parts, *, dtype: torch.dtype = torch.float16, device: torch.device | str = "cpu",
    fp8: bool = False, sees: int = 0
) -> LlamaAndClip:
    """Read both encoders, each from a Hugging Face directory or a single file; with
    `sees` the LLM's vision tower too.

    A tokenizer that is not given is looked for in the directory of its model. `fp8` stores the LLM's linear
    layers as float8 (half the memory; states differ by a few percent) and multiplies in `dtype`.
    """
    llm, clip = parts["llm"], parts["clip"]
    llm_ids = open_llm_tokenizer(tokenizer_folder(parts, "llm"))
    clip_ids = open_clip_tokenizer(tokenizer_folder(parts, "clip"))
    llm_part = load_language_model(llm, LLAMA, dtype=dtype, device=device, fp8=fp8)
    clip_part = load_clip(clip, dtype=dtype, device=device)
    check_vocabulary(llm, llm_ids.tokenizer, llm_part.model.config.vocab_size)
    check_vocabulary(clip, clip_ids, clip_part.model.config.vocab_size)
    config = llm_part.model.config
    sight = open_sight(parts, width=config.hidden_size, dtype=dtype, device=device) if sees else None
    seen = () if sight is None else (sight.fingerprint, str(sees))
    return LlamaAndClip(
        llm_part.model, clip_part.model, llm_tokenizer=llm_ids, clip_tokenizer=clip_ids, sight=sight,
        sees=sees,
        fingerprint=_joined(llm_part.fingerprint, clip_part.fingerprint, *seen, fp8=fp8, crop=llm_ids.crop),
    )


def text_fingerprints(parts: Parts, *, sees: int = 0) -> tuple[str, ...]:
    """Those of the encoders that `open_text` would make of these files, plain and in
    float8. Reads headers and samples."""
    crop = open_llm_tokenizer(tokenizer_folder(parts, "llm")).crop
    prints = fingerprint(open_weights(parts["llm"])), fingerprint(open_weights(parts["clip"]))
    seen = (sight_fingerprint(parts), str(sees)) if sees else ()
    return tuple(_joined(*prints, *seen, fp8=fp8, crop=crop) for fp8 in (False, True))


def _joined(*files: str, fp8: bool, crop: int) -> str:
    return hashlib.sha256(
        "/".join([*files[:2], "fp8" if fp8 else "", str(crop), *files[2:]]).encode()
    ).hexdigest()


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
