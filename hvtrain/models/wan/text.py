"""The text encoder: UMT5-XXL's encoder (arXiv:2304.09151), module names of the official implementation.

Padding is masked out in there, so a prompt is encoded alone at its own length, which equals the official
padded form and never depends on the batch. The DiT pads to 512 itself.
"""

from __future__ import annotations

import hashlib
import html
import math
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hvtrain.errors import CheckpointError, ConfigError
from hvtrain.models.identify import count
from hvtrain.models.layers import RMSNorm
from hvtrain.models.spec import Parts
from hvtrain.models.tokens import check_vocabulary, open_tokenizer
from hvtrain.weights.containers import fingerprint, open_weights
from hvtrain.weights.keymap import OWN_NAMES, KeyMap, Rule
from hvtrain.weights.source import anchored

MAX_TOKENS = 512
BUCKETS, FARTHEST = 32, 128  # of relative positions
TOKENIZERS = ("google/umt5-xxl", "tokenizer", "../tokenizer", ".")  # where it lies beside the encoder


# --- prompts ------------------------------------------------------------------------------------------------

_QUOTES = {
    **dict.fromkeys("\u02bc\u2018\u2019\u201a\u201b", "'"), **dict.fromkeys("\u201c\u201d\u201e\u201f", '"')
}
_FULL_WIDTH = range(0xFF01, 0xFFF0)
_LIGATURES = (*range(0xFB00, 0xFB07), 0x132, 0x133, *range(0x1C4, 0x1CD), *range(0x1F1, 0x1F4))
_PLAIN = {chr(n): unicodedata.normalize("NFKC", chr(n)) for n in (0x3000, *_FULL_WIDTH, *_LIGATURES)}
_SAME = str.maketrans(_QUOTES | _PLAIN | {"\ufb05": "\u017ft", "\u0149": "'n"})
_CONTROL = re.compile(r"\x1b\[[\d;]*m|[\x00-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]")


def cleaned(prompt: str) -> str:
    """What the official pipeline makes of a prompt before it is cut into tokens: typographic variants
    (curled quotes, full width forms, ligatures) as plain characters, HTML entities as what they stand for,
    runs of white space as one space.

    Officially the first step is the ftfy library; these are its rules but one: it also repairs
    text that was decoded wrongly.
    """
    plain = unicodedata.normalize("NFC", _CONTROL.sub("", prompt.translate(_SAME)))
    return re.sub(r"\s+", " ", html.unescape(html.unescape(plain))).strip()


# --- the encoder --------------------------------------------------------------------------------------------


class RelativePositions(nn.Module):
    """A bias for each head and bucket of distances; every layer has its own."""

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BUCKETS, n_heads)

    def forward(self, n: int) -> Tensor:
        """[1 N n n], by query and key."""
        place = torch.arange(n, device=self.embedding.weight.device)
        distance = place[None] - place[:, None]
        half, exact = BUCKETS // 2, BUCKETS // 4
        far = distance.abs()
        # Distances up to 8 have a bucket each, farther ones share them on a logarithmic scale.
        log = torch.log(far.float().clamp(min=1) / exact) / math.log(FARTHEST / exact) * (half - exact)
        bucket = torch.where(far < exact, far, (exact + log.long()).clamp(max=half - 1))
        return self.embedding(bucket + (distance > 0) * half).permute(2, 0, 1)[None]


class Umt5Attention(nn.Module):
    """Without the usual scale, which the weights have learnt."""

    def __init__(self, dim: int, inner: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.q = nn.Linear(dim, inner, bias=False)
        self.k = nn.Linear(dim, inner, bias=False)
        self.v = nn.Linear(dim, inner, bias=False)
        self.o = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = (q @ k.transpose(-1, -2) + bias).float().softmax(-1).to(v.dtype)
        return self.o((scores @ v).transpose(1, 2).flatten(2))


class GatedMlp(nn.Module):
    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(dim, inner, bias=False), nn.GELU(approximate="tanh"))
        self.fc1 = nn.Linear(dim, inner, bias=False)
        self.fc2 = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x) * self.gate(x))


class Umt5Layer(nn.Module):
    def __init__(self, dim: int, inner: int, mlp: int, n_heads: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(dim)
        self.attn = Umt5Attention(dim, inner, n_heads)
        self.norm2 = RMSNorm(dim)
        self.ffn = GatedMlp(dim, mlp)
        self.pos_embedding = RelativePositions(n_heads)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), self.pos_embedding(x.shape[1]))
        return x + self.ffn(self.norm2(x))


class Umt5(nn.Module):
    def __init__(
        self, *, vocabulary: int, dim: int, inner: int, mlp: int, n_heads: int, n_layers: int
    ) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, dim)
        self.blocks = nn.ModuleList(Umt5Layer(dim, inner, mlp, n_heads) for _ in range(n_layers))
        self.norm = RMSNorm(dim)

    def forward(self, ids: Tensor) -> Tensor:
        """[B L] without padding -> [B L dim]."""
        x = self.token_embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


# --- files --------------------------------------------------------------------------------------------------


def _library() -> Iterator[Rule]:
    """T5's names in transformers, also ComfyUI's."""
    here, there = "blocks.{n}", "encoder.block.{n}.layer"
    yield Rule("token_embedding", ("shared",))
    yield Rule("norm", ("encoder.final_layer_norm",))
    for part in "qkvo":
        yield Rule(f"{here}.attn.{part}", (f"{there}.0.SelfAttention.{part}",))
    yield Rule(f"{here}.pos_embedding.embedding", (f"{there}.0.SelfAttention.relative_attention_bias",))
    yield Rule(f"{here}.norm1", (f"{there}.0.layer_norm",))
    yield Rule(f"{here}.norm2", (f"{there}.1.layer_norm",))
    for name, other in (("gate.0", "wi_0"), ("fc1", "wi_1"), ("fc2", "wo")):
        yield Rule(f"{here}.ffn.{name}", (f"{there}.1.DenseReluDense.{other}",))


ANCHORS = {"token_embedding.weight": OWN_NAMES, "shared.weight": KeyMap(_library())}


def load_umt5(
    path: str | Path, *, dtype: torch.dtype, device: torch.device | str = "cpu", fp8: bool = False
) -> tuple[Umt5, str]:
    """The encoder of an official .pth, a transformers directory or a ComfyUI file, and its fingerprint."""
    source = anchored(path, ANCHORS, what="a UMT5 text encoder")
    vocabulary, dim = source.shape("token_embedding.weight")
    with torch.device("meta"):
        model = Umt5(
            vocabulary=vocabulary, dim=dim, inner=source.shape("blocks.0.attn.q.weight")[0],
            mlp=source.shape("blocks.0.ffn.fc1.weight")[0],
            n_layers=count(source.sources, r"blocks\.(\d+)\."),
            n_heads=source.shape("blocks.0.pos_embedding.embedding.weight")[1],
        )
    source.load(
        model, what="a UMT5 text encoder", dtype=dtype, device=device, fp8="fp8_scaled" if fp8 else None
    )
    return model, fingerprint(source.weights)


class Umt5Encoder:
    """Prompts to what the DiT reads."""

    def __init__(self, model: Umt5, tokenizer: Any, *, fingerprint: str = "") -> None:
        self.model, self.tokenizer, self.fingerprint = model, tokenizer, fingerprint

    def to(self, device: torch.device | str) -> Umt5Encoder:
        self.model.to(device)
        return self

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
        """Per prompt, float32 on the CPU: "text" [n E], the valid tokens only; of the
        empty prompt the end token."""
        device, found = self.model.norm.weight.device, []
        for prompt in prompts:
            ids = torch.tensor([self.tokenizer.encode(cleaned(prompt)).ids], device=device)
            found.append({"text": self.model(ids)[0].float().cpu()})
        return found


def open_text(
    parts: Parts, *, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu",
    fp8: bool = False
) -> Umt5Encoder:
    """`fp8` stores the linear layers as float8: half the memory; states differ by a few percent."""
    tokenizer = open_t5_tokenizer(tokenizer_folder(parts))
    model, weights = load_umt5(parts["t5"], dtype=dtype, device=device, fp8=fp8)
    check_vocabulary(parts["t5"], tokenizer, model.token_embedding.num_embeddings)
    return Umt5Encoder(model, tokenizer, fingerprint=_joined(weights, fp8))


def text_fingerprints(parts: Parts) -> tuple[str, ...]:
    """Those of the encoder that `open_text` would make of this file, plain and in
    float8. Reads headers and samples."""
    weights = fingerprint(open_weights(parts["t5"]))
    return tuple(_joined(weights, fp8) for fp8 in (False, True))


def _joined(weights: str, fp8: bool) -> str:
    return hashlib.sha256(f"{weights}/{'fp8' if fp8 else ''}".encode()).hexdigest()


def open_t5_tokenizer(folder: Path) -> Any:
    """Ends each text with </s>, cuts it to 512 tokens with that one, pads nothing."""
    tokenizer = open_tokenizer(folder)
    end = tokenizer.token_to_id("</s>")
    if end is None or tokenizer.encode("").ids != [end]:
        raise CheckpointError(
            f"{folder / 'tokenizer.json'}: not a T5 tokenizer: it does not end a text with </s>"
        )
    tokenizer.enable_truncation(MAX_TOKENS)
    return tokenizer


def tokenizer_folder(parts: Parts) -> Path:
    if "t5_tokenizer" in parts:
        folder = Path(parts["t5_tokenizer"])
        folder = folder.parent if folder.is_file() else folder
        if not (folder / "tokenizer.json").is_file():
            raise CheckpointError(f"{folder}: no tokenizer.json in it (option t5_tokenizer)")
        return folder
    path = Path(parts["t5"])
    for place in TOKENIZERS:
        folder = (path if path.is_dir() else path.parent) / place
        if (folder / "tokenizer.json").is_file():
            return folder
    raise ConfigError(
        f"{path}: no tokenizer beside it (google/umt5-xxl/tokenizer.json); set t5_tokenizer to its directory"
    )
