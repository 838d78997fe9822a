"""The sizes of a HunyuanVideo transformer, and how they are read off a weights file."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from hvtrain.errors import CheckpointError
from hvtrain.models.identify import ARCH_KEY, count, count_some, shape_of
from hvtrain.models.spec import Shapes

# How a head is divided among t, h and w is in no tensor's shape; these are the divisions in use.
_ROPE_DIMS = {128: (16, 56, 56), 96: (12, 42, 42)}
_KNOWN_IN_CHANNELS = (16, 32, 33)


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
        if (
            self.hidden_size % self.heads_num or sum(self.rope_dims) != head
            or any(d % 2 for d in self.rope_dims)
        ):
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


def infer_arch(shapes: Shapes) -> HunyuanVideoArch:
    """The architecture of a file under official names: everything is in the shapes."""
    proj, final = shape_of(shapes, "img_in.proj.weight", 5), shape_of(shapes, "final_layer.linear.weight", 2)
    norm = "double_blocks.0.img_attn_q_norm.weight"
    head = shape_of(shapes, norm if norm in shapes else "single_blocks.0.q_norm.weight", 1)[0]
    hidden, patch = proj[0], (proj[2], proj[3], proj[4])
    if proj[1] not in _KNOWN_IN_CHANNELS and proj[1] > 16:
        raise CheckpointError(
            f"img_in.proj.weight takes {proj[1]} input channels; supported: 16 (text to video, token "
            "replace), 32 (image latents beside the noisy ones) and 33 (these and a mask)"
        )
    return HunyuanVideoArch(
        in_channels=proj[1],
        out_channels=final[0] // math.prod(patch),
        hidden_size=hidden,
        heads_num=hidden // head,
        double=count_some(shapes, "double_blocks"),
        single=count_some(shapes, "single_blocks"),
        rope_dims=_rope_dims(head),
        text_dim=shape_of(shapes, "txt_in.input_embedder.weight", 2)[1],
        pooled_dim=shape_of(shapes, "vector_in.in_layer.weight", 2)[1],
        guidance_embed=has_guidance(shapes),
        patch=patch,
        mlp_ratio=_mlp_ratio(shapes, hidden),
        refiner_depth=count(shapes, r"txt_in\.individual_token_refiner\.blocks\.(\d+)\."),
    )


def has_guidance(names: Iterable[str]) -> bool:
    return any(name.startswith("guidance_in.") for name in names)


def _mlp_ratio(shapes: Shapes, hidden: int) -> float:
    if "double_blocks.0.img_mlp.fc1.weight" in shapes:
        return shape_of(shapes, "double_blocks.0.img_mlp.fc1.weight", 2)[0] / hidden
    return shape_of(shapes, "single_blocks.0.linear1.weight", 2)[0] / hidden - 3


def _rope_dims(head: int) -> tuple[int, int, int]:
    if head not in _ROPE_DIMS:
        raise CheckpointError(
            f"heads of width {head} do not tell how they are divided for the rotary embedding; the file "
            f"needs the metadata key '{ARCH_KEY}' (a JSON object with rope_dims), which files written by "
            "hvtrain have"
        )
    return _ROPE_DIMS[head]
