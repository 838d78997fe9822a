"""The sizes of a HunyuanVideo transformer, and how they are read off a weights file."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from hvtrain.errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]

# How a head is divided among t, h and w is in no tensor's shape; these are the divisions in use.
_ROPE_DIMS = {128: (16, 56, 56), 96: (12, 42, 42)}
_KNOWN_IN_CHANNELS = (16, 32)
METADATA_KEY = "hvtrain.arch"


@dataclass(frozen=True)
class HunyuanVideoArch:
    """Defaults are the constants of every released 13B; sizes have none."""

    in_channels: int
    out_channels: int
    hidden_size: int
    heads_num: int
    double: int
    single: int
    rope_dims: tuple[int, int, int]
    text_dim: int
    pooled_dim: int
    guidance_embed: bool
    patch: tuple[int, int, int] = (1, 2, 2)
    mlp_ratio: float = 4.0
    rope_theta: float = 256.0
    refiner_depth: int = 2
    token_replace: bool = False  # the first latent frame is a given image; changes no weight's shape

    def __post_init__(self) -> None:
        if min(self.hidden_size, self.heads_num, *self.patch) < 1:
            raise CheckpointError(f"sizes must be positive: {self}")
        head = self.hidden_size // self.heads_num
        if self.hidden_size % self.heads_num or sum(self.rope_dims) != head or any(d % 2 for d in self.rope_dims):
            raise CheckpointError(
                f"rope_dims {self.rope_dims} must be even and add up to the head's width: hidden_size "
                f"{self.hidden_size} / heads_num {self.heads_num} = {self.hidden_size / self.heads_num:g}"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.heads_num

    @property
    def mlp_dim(self) -> int:
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def patch_size(self) -> int:
        return math.prod(self.patch)


def parse_arch(values: Mapping[str, Any]) -> HunyuanVideoArch:
    """From the JSON of a file's metadata."""
    if not isinstance(values, Mapping):
        raise CheckpointError(f"metadata '{METADATA_KEY}' must be a JSON object, not {values!r}")
    known = {f.name for f in fields(HunyuanVideoArch)}
    if unknown := sorted(set(values) - known):
        raise CheckpointError(f"metadata '{METADATA_KEY}' has unknown fields {unknown}; known: {sorted(known)}")
    try:
        lists: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        return HunyuanVideoArch(**lists)
    except TypeError as error:
        raise CheckpointError(f"metadata '{METADATA_KEY}' is incomplete: {error}") from None


def same_weights(a: HunyuanVideoArch, b: HunyuanVideoArch) -> dict[str, tuple[Any, Any]]:
    """The fields in which two architectures' weights differ: name -> (of a, of b)."""
    left, right = asdict(a), asdict(b)
    ignored = ("token_replace", "guidance_embed", "rope_theta", "rope_dims")
    return {k: (left[k], right[k]) for k in left if k not in ignored and left[k] != right[k]}


def infer_arch(shapes: Shapes, metadata: Mapping[str, str]) -> HunyuanVideoArch:
    """The architecture of a file under official names. Its metadata wins; else everything is in the shapes."""
    if METADATA_KEY in metadata:
        try:
            return parse_arch(json.loads(metadata[METADATA_KEY]))
        except ValueError as error:
            raise CheckpointError(f"metadata '{METADATA_KEY}' is not JSON: {error}") from None
    proj, final = _shape(shapes, "img_in.proj.weight", 5), _shape(shapes, "final_layer.linear.weight", 2)
    norm = "double_blocks.0.img_attn_q_norm.weight"
    head = _shape(shapes, norm if norm in shapes else "single_blocks.0.q_norm.weight", 1)[0]
    hidden, patch = proj[0], (proj[2], proj[3], proj[4])
    if proj[1] not in _KNOWN_IN_CHANNELS and proj[1] > 16:
        raise CheckpointError(
            f"img_in.proj.weight takes {proj[1]} input channels; supported: 16 (text to video, token replace) and 32 "
            "(image latents beside the noisy ones); 33 is the withdrawn latent-concat model, use token replace"
        )
    return HunyuanVideoArch(
        in_channels=proj[1],
        out_channels=final[0] // math.prod(patch),
        hidden_size=hidden,
        heads_num=hidden // head,
        double=_some(shapes, "double_blocks"),
        single=_some(shapes, "single_blocks"),
        rope_dims=_rope_dims(head),
        text_dim=_shape(shapes, "txt_in.input_embedder.weight", 2)[1],
        pooled_dim=_shape(shapes, "vector_in.in_layer.weight", 2)[1],
        guidance_embed=has_guidance(shapes),
        patch=patch,
        mlp_ratio=_mlp_ratio(shapes, hidden),
        refiner_depth=count(shapes, r"txt_in\.individual_token_refiner\.blocks\.(\d+)\."),
    )


def count(names: Iterable[str], pattern: str) -> int:
    """How many blocks the names number, from 0."""
    found = {int(match[1]) for name in names if (match := re.match(pattern, name))}
    return max(found, default=-1) + 1


def has_guidance(names: Iterable[str]) -> bool:
    return any(name.startswith("guidance_in.") for name in names)


def _some(names: Iterable[str], blocks: str) -> int:
    if not (n := count(names, blocks + r"\.(\d+)\.")):
        raise CheckpointError(f"missing keys '{blocks}.*': the file has no such block; is it one part of several?")
    return n


def _shape(shapes: Shapes, name: str, ndim: int) -> tuple[int, ...]:
    if name not in shapes:
        raise CheckpointError(f"missing key '{name}', which tells the size of the model")
    if len(shapes[name]) != ndim or 0 in shapes[name]:
        raise CheckpointError(f"'{name}' has the shape {shapes[name]}, expected {ndim} dimensions, none of them 0")
    return shapes[name]


def _mlp_ratio(shapes: Shapes, hidden: int) -> float:
    if "double_blocks.0.img_mlp.fc1.weight" in shapes:
        return _shape(shapes, "double_blocks.0.img_mlp.fc1.weight", 2)[0] / hidden
    return _shape(shapes, "single_blocks.0.linear1.weight", 2)[0] / hidden - 3


def _rope_dims(head: int) -> tuple[int, int, int]:
    if head not in _ROPE_DIMS:
        raise CheckpointError(
            f"heads of width {head} do not tell how they are divided for the rotary embedding; the file needs the "
            f"metadata key '{METADATA_KEY}' (a JSON object with rope_dims), which files written by hvtrain have"
        )
    return _ROPE_DIMS[head]
