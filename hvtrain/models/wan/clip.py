"""CLIP's ViT-H/14 picture tower (open_clip, on XLM-RoBERTa's side), module names
of the official implementation.

2.1's image to video reads what comes out of all its blocks but the last: the last block, the norm behind it
and the projection take no part and are not loaded. Always fp32: it is small, and one picture a clip.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvtrain.errors import CheckpointError
from hvtrain.models.identify import count
from hvtrain.models.precision import without_autocast
from hvtrain.models.spec import Parts
from hvtrain.weights.containers import fingerprint
from hvtrain.weights.keymap import OWN_NAMES, KeyMap, Rule
from hvtrain.weights.source import Source, anchored

HEAD_DIM = 80  # of ViT-H; the number of heads is in no tensor's shape
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class VitAttention(nn.Module):
    def __init__(self, dim: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.to_qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)  # [B N L D] each
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class VitLayer(nn.Module):
    def __init__(self, dim: int, mlp: int, n_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.attn = VitAttention(dim, n_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp), nn.GELU(), nn.Linear(mlp, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Vit(nn.Module):
    def __init__(self, *, dim: int, mlp: int, n_heads: int, n_layers: int, n_tokens: int, patch: int) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, dim, kernel_size=patch, stride=patch, bias=False)
        self.cls_embedding = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embedding = nn.Parameter(torch.zeros(1, n_tokens, dim))
        self.pre_norm = nn.LayerNorm(dim, eps=1e-5)
        self.transformer = nn.ModuleList(VitLayer(dim, mlp, n_heads) for _ in range(n_layers))

    @property
    def side(self) -> int:
        """Of the pictures that it takes, in pixels."""
        return round((self.pos_embedding.shape[1] - 1) ** 0.5) * self.patch_embedding.kernel_size[0]

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [B 3 side side] -> [B tokens dim], the class first."""
        x = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_embedding.expand(len(x), -1, -1), x], dim=1) + self.pos_embedding
        x = self.pre_norm(x)
        for layer in self.transformer:
            x = layer(x)
        return x


class ClipEncoder:
    """Pictures to the field "clip"."""

    def __init__(self, model: Vit, *, fingerprint: str = "") -> None:
        self.model, self.fingerprint = model, fingerprint

    def to(self, device: torch.device | str) -> ClipEncoder:
        self.model.to(device)
        return self

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> list[dict[str, Tensor]]:
        """[B 3 H W] in [-1, 1] -> per picture "clip" [tokens dim], float32 on the CPU."""
        device = self.model.pos_embedding.device
        with without_autocast(device.type):
            return [{"clip": x.cpu()} for x in self.model(self.prepared(pictures.to(device)))]

    def prepared(self, pictures: Tensor) -> Tensor:
        """Squashed to a square, bicubic without anti-aliasing or cropping, as officially."""
        side = (self.model.side, self.model.side)
        pixels = F.interpolate(pictures.float(), size=side, mode="bicubic", align_corners=False) * 0.5 + 0.5
        mean, std = (torch.tensor(x, device=pixels.device).view(1, 3, 1, 1) for x in (MEAN, STD))
        return (pixels - mean) / std


def _library() -> Iterator[Rule]:
    """Names of transformers' CLIPVisionModel, also ComfyUI's."""
    here, there = "transformer.{n}", "encoder.layers.{n}"
    yield Rule("patch_embedding", ("embeddings.patch_embedding",))
    yield Rule("", ("embeddings",), leaf=("cls_embedding", "class_embedding"))
    yield Rule("", ("embeddings.position_embedding",), leaf=("pos_embedding", "weight"))
    yield Rule("pre_norm", ("pre_layrnorm",))
    yield Rule(f"{here}.norm1", (f"{there}.layer_norm1",))
    yield Rule(f"{here}.norm2", (f"{there}.layer_norm2",))
    yield Rule(f"{here}.attn.to_qkv", tuple(f"{there}.self_attn.{part}_proj" for part in "qkv"))
    yield Rule(f"{here}.attn.proj", (f"{there}.self_attn.out_proj",))
    yield Rule(f"{here}.mlp.0", (f"{there}.mlp.fc1",))
    yield Rule(f"{here}.mlp.2", (f"{there}.mlp.fc2",))


ANCHORS = {"cls_embedding": OWN_NAMES, "embeddings.class_embedding": KeyMap(_library())}


def open_clip(
    parts: Parts, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> ClipEncoder:
    """An official .pth (its other tower is left alone), a transformers directory or a ComfyUI
    file. `dtype` is for others."""
    path = Path(parts["clip"])
    source = anchored(path, ANCHORS, what="a CLIP picture tower")
    dim, _, patch, _ = source.shape("patch_embedding.weight")
    if dim % HEAD_DIM:
        raise CheckpointError(f"{path}: a CLIP picture tower of width {dim}, expected ViT-H's 1280")
    model = vit(source, n_heads=dim // HEAD_DIM, patch=patch)
    source.load(model, what="a CLIP picture tower", dtype=torch.float32, device=device)
    return ClipEncoder(model, fingerprint=fingerprint(source.weights))


def vit(source: Source, *, n_heads: int, patch: int) -> Vit:
    """On the meta device, of the file's sizes, without its last block."""
    with torch.device("meta"):
        return Vit(
            dim=source.shape("pre_norm.weight")[0], mlp=source.shape("transformer.0.mlp.0.weight")[0],
            n_heads=n_heads, n_layers=count(source.sources, r"transformer\.(\d+)\.") - 1,
            n_tokens=source.shape("pos_embedding")[-2], patch=patch,
        )
