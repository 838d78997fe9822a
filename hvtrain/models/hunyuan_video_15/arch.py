"""The sizes of a HunyuanVideo 1.5 transformer, and how they are read off a weights file."""

from __future__ import annotations

from dataclasses import dataclass

from hvtrain.errors import CheckpointError
from hvtrain.models.identify import ARCH_KEY, count, count_some, shape_of
from hvtrain.models.spec import Shapes

# How a head is divided among t, h and w is in no tensor's shape; these are the divisions in use.
_ROPE_DIMS = {128: (16, 56, 56), 32: (8, 12, 12), 24: (4, 10, 10)}


@dataclass(frozen=True)
class HunyuanVideo15Arch:
    """Defaults are the constants of every released model; sizes have none. A patch is one latent cell."""

    # noised latents, those of a given image and a mask; of super-resolution also low latents and a mask
    in_channels: int
    out_channels: int
    hidden_size: int
    heads_num: int
    double: int
    rope_dims: tuple[int, int, int]
    text_dim: int
    glyph_dim: int
    glyph_hidden: int
    vision_dim: int
    meanflow: bool = False  # distilled in steps: it is also told the noise level that a step ends at
    mlp_ratio: float = 4.0
    rope_theta: float = 256.0
    refiner_depth: int = 2

    def __post_init__(self) -> None:
        if min(self.hidden_size, self.heads_num, self.out_channels) < 1:
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
    def upscales(self) -> bool:
        """Whether it is one of super-resolution."""
        return self.in_channels == 3 * self.out_channels + 2


def infer_arch(shapes: Shapes) -> HunyuanVideo15Arch:
    """The architecture of a file under official names: everything is in the shapes."""
    proj, out = shape_of(shapes, "img_in.proj.weight", 5), shape_of(shapes, "final_layer.linear.weight", 2)[0]
    head = shape_of(shapes, "double_blocks.0.img_attn_q_norm.weight", 1)[0]
    if proj[1] not in (2 * out + 1, 3 * out + 2) or proj[2:] != (1, 1, 1):
        raise CheckpointError(
            f"img_in.proj.weight is {'x'.join(map(str, proj))}, with latents of {out} channels; supported: "
            f"{2 * out + 1} input channels (text and image to video) and {3 * out + 2} (super-resolution), "
            "in patches of one cell"
        )
    if head not in _ROPE_DIMS:
        raise CheckpointError(
            f"heads of width {head} do not tell how they are divided for the rotary embedding; the file "
            f"needs the metadata key '{ARCH_KEY}' (a JSON object with rope_dims), which files written by "
            "hvtrain have"
        )
    return HunyuanVideo15Arch(
        in_channels=proj[1],
        out_channels=out,
        hidden_size=proj[0],
        heads_num=proj[0] // head,
        double=count_some(shapes, "double_blocks"),
        rope_dims=_ROPE_DIMS[head],
        text_dim=shape_of(shapes, "txt_in.input_embedder.weight", 2)[1],
        glyph_dim=shape_of(shapes, "byt5_in.fc1.weight", 2)[1],
        glyph_hidden=shape_of(shapes, "byt5_in.fc1.weight", 2)[0],
        vision_dim=shape_of(shapes, "vision_in.proj.1.weight", 2)[1],
        meanflow=has_meanflow(shapes),
        mlp_ratio=shape_of(shapes, "double_blocks.0.img_mlp.fc1.weight", 2)[0] / proj[0],
        refiner_depth=count(shapes, r"txt_in\.individual_token_refiner\.blocks\.(\d+)\."),
    )


def has_meanflow(shapes: Shapes) -> bool:
    return any(name.startswith("time_r_in.") for name in shapes)
