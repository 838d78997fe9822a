"""The sizes of a Wan transformer, and how they are read off a weights file."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hvtrain.errors import CheckpointError
from hvtrain.models.identify import ARCH_KEY, count_some, shape_of
from hvtrain.models.spec import Shapes

HEAD_DIM = 128  # of every released model; the number of heads is in no tensor's shape
CONTROL = "Fun-Control (a control video's latents among its input channels)"
# (in, out) channels: text to video; image to video; the 5B, whose latents are another VAE's
KNOWN_CHANNELS = ((16, 16), (36, 16), (48, 48))


@dataclass(frozen=True)
class WanArch:
    """Defaults are the constants of every released model; sizes have none."""

    in_channels: int
    out_channels: int
    dim: int
    ffn_dim: int
    n_heads: int
    n_layers: int
    clip_dim: int = 0  # 0: no picture is cross-attended
    n_clip: int = 0  # rows of the embedding that is added to several pictures' tokens; 0: there is none
    text_dim: int = 4096
    freq_dim: int = 256
    patch: tuple[int, int, int] = (1, 2, 2)
    text_len: int = 512  # a prompt is padded to it, and the padding attended: it changes no weight's shape

    def __post_init__(self) -> None:
        if min(self.dim, self.n_heads, self.n_layers, self.text_len, self.freq_dim, *self.patch) < 1:
            raise CheckpointError(f"sizes must be positive: {self}")
        if self.dim % self.n_heads or self.head_dim % 2 or self.head_dim < 6:
            raise CheckpointError(
                f"dim {self.dim} over n_heads {self.n_heads} gives heads of {self.dim / self.n_heads:g}, "
                "expected an even number, 6 or more"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def n_pictures(self) -> int:
        """That are cross-attended: none, the first frame, or the first and the last."""
        return (1 + bool(self.n_clip)) * bool(self.clip_dim)

    @property
    def rope_dims(self) -> tuple[int, int, int]:
        """The head's share of t, h and w: what a third of it leaves over is the time's."""
        axis = 2 * (self.head_dim // 6)
        return self.head_dim - 2 * axis, axis, axis

    @property
    def patch_size(self) -> int:
        return math.prod(self.patch)


def infer_arch(shapes: Shapes) -> WanArch:
    """The architecture of a file under official names: everything is in the
    shapes, but the width of a head."""
    proj, head = shape_of(shapes, "patch_embedding.weight", 5), shape_of(shapes, "head.head.weight", 2)
    dim, channels, patch = proj[0], proj[1], (proj[2], proj[3], proj[4])
    out = head[0] // math.prod(patch)
    if out == 16 and channels in (32, 48):
        raise CheckpointError(
            f"patch_embedding.weight takes {channels} input channels: {CONTROL} is not supported"
        )
    if (channels, out) not in KNOWN_CHANNELS and out == 16:
        raise CheckpointError(
            f"patch_embedding.weight takes {channels} input channels and the head gives {out}; supported: "
            + ", ".join(f"{a} and {b}" for a, b in KNOWN_CHANNELS)
        )
    if dim % HEAD_DIM:
        raise CheckpointError(
            f"a width of {dim} does not tell the number of heads, which are {HEAD_DIM} wide in the released "
            f"models; the file needs the metadata key '{ARCH_KEY}' (a JSON object with n_heads), which files "
            "written by hvtrain have"
        )
    return WanArch(
        in_channels=channels,
        out_channels=out,
        dim=dim,
        ffn_dim=shape_of(shapes, "blocks.0.ffn.0.weight", 2)[0],
        n_heads=dim // HEAD_DIM,
        n_layers=count_some(shapes, "blocks"),
        clip_dim=shape_of(shapes, "img_emb.proj.1.weight", 2)[1] if has_picture(shapes) else 0,
        n_clip=shape_of(shapes, "img_emb.emb_pos", 3)[1] if "img_emb.emb_pos" in shapes else 0,
        text_dim=shape_of(shapes, "text_embedding.0.weight", 2)[1],
        freq_dim=shape_of(shapes, "time_embedding.0.weight", 2)[1],
        patch=patch,
    )


def has_picture(shapes: Shapes) -> bool:
    return any(name.startswith("img_emb.") for name in shapes)
