"""The sizes of a strange transformer, its flavors, and how both are told from a file."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from hvtrain.errors import CheckpointError
from hvtrain.models.identify import count_some, shape_of
from hvtrain.models.spec import Defaults, Expert, Field, Flavor, LatentGeometry, Shapes

PATCH = (1, 2, 2)
CHANNELS, MASK_CHANNELS, SIGHT_TOKENS = 48, 4, 4
BOUNDARY = 0.6


@dataclass(frozen=True)
class StrangeArch:
    in_channels: int
    dim: int
    num_heads: int
    ffn_dim: int
    num_layers: int
    words_dim: int
    letters_dim: int
    sight_dim: int | None  # None: it is shown no image

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def rope_dims(self) -> tuple[int, int, int]:
        """A third of the head, even, for height and for width; what is left for time."""
        third = self.head_dim // 6 * 2
        return self.head_dim - 2 * third, third, third


def owns(shapes: Shapes) -> bool:
    return "strange_patch.weight" in shapes and "blocks.0.words_kv.weight" in shapes


def sizes_from(shapes: Shapes) -> StrangeArch:
    dim, width = shape_of(shapes, "strange_patch.weight", 2)
    if width % math.prod(PATCH):
        raise CheckpointError(
            f"'strange_patch.weight' takes {width} values, expected a multiple of {math.prod(PATCH)}"
        )
    return StrangeArch(
        in_channels=width // math.prod(PATCH),
        dim=dim,
        num_heads=dim // shape_of(shapes, "blocks.0.self_q_norm.weight", 1)[0],
        ffn_dim=shape_of(shapes, "blocks.0.ffn.fc1.weight", 2)[0],
        num_layers=count_some(shapes, "blocks"),
        words_dim=shape_of(shapes, "words_in.weight", 2)[1],
        letters_dim=shape_of(shapes, "letters_in.weight", 2)[1],
        sight_dim=shape_of(shapes, "sight_in.weight", 2)[1] if "sight_in.weight" in shapes else None,
    )


def cond_fields(arch: StrangeArch) -> tuple[Field, ...]:
    text = (
        Field("words", (None, arch.words_dim), torch.bfloat16, "text", longest=12),
        Field("letters", (None, arch.letters_dim), torch.bfloat16, "text", longest=20),
    )
    if arch.sight_dim is None:
        return text
    # Without the column, the image is the clip's own first frame.
    still = Field("still", (CHANNELS, 1, None, None), torch.bfloat16, "image", optional=True)
    return (*text, Field("sight", (SIGHT_TOKENS, arch.sight_dim), torch.bfloat16, "vision"), still)


_PLAIN = StrangeArch(
    in_channels=CHANNELS, dim=48, num_heads=4, ffn_dim=80, num_layers=2, words_dim=24, letters_dim=16,
    sight_dim=None
)
_FURTHER = replace(_PLAIN, in_channels=2 * CHANNELS + MASK_CHANNELS, num_layers=3, sight_dim=20)
_DEFAULTS = Defaults(
    steps=4, shift=5.0, guidance=None, fps=8, frames=9, height=32, width=96, negative_prompt='dull, "x"',
    cfg_scale=3.0, training_shift=2.0,
)
_LATENT = LatentGeometry(CHANNELS, stride_t=4, stride_h=16, stride_w=16, patch=PATCH)
_EXPERTS = (
    Expert("high", "dit", (BOUNDARY, 1.0)),
    Expert("low", "dit_low", (0.0, BOUNDARY), cfg_scale=2.0),
)

def _flavor(name: str, about: str, arch: StrangeArch, task: str, **more: Any) -> Flavor:
    return Flavor(name, about, arch, arch.num_heads, _LATENT, cond_fields(arch), (task,), _DEFAULTS, **more)


FLAVORS = {
    flavor.name: flavor
    for flavor in (
        _flavor("plain", "text to video", _PLAIN, "t2v"),
        _flavor("further", "goes on from an image", _FURTHER, "go-on"),
        _flavor(
            "pair", "the same by two experts", replace(_FURTHER, num_layers=2), "go-on", experts=_EXPERTS
        ),
    )
}


def fitted(flavor: Flavor, arch: StrangeArch) -> Flavor:
    return replace(flavor, arch=arch, n_heads=arch.num_heads, cond=cond_fields(arch))
