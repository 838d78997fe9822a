"""Wan 2.1 and 2.2: text, image, and first and last frame to video; 1.3B, 5B, 14B, and two experts of 14B."""

from __future__ import annotations

from hvtrain.models.later import later
from hvtrain.models.spec import Column, ModelSpec
from hvtrain.models.wan.arch import WanArch
from hvtrain.models.wan.flavors import FLAVORS, fitted, sizes_from, told_by
from hvtrain.models.wan.inputs import make_input
from hvtrain.models.wan.keys import KEY_MAPS, owns
from hvtrain.models.wan.model import Wan, init_weights
from hvtrain.models.wan.musubi import MUSUBI

SPEC = ModelSpec(
    name="wan",
    flavors=FLAVORS,
    arch=WanArch,
    kind=("in_channels", "out_channels", "n_pictures"),
    signature=owns,
    sizes_from=sizes_from,
    fitted=fitted,
    told_by=told_by,
    build=Wan,
    init_weights=init_weights,
    make_input=make_input,
    open_vae=later(f"{__name__}.vae", "open_vae"),
    open_text=later(f"{__name__}.text", "open_text"),
    text_fingerprints=later(f"{__name__}.text", "text_fingerprints"),
    key_maps=KEY_MAPS,
    is_lora_target=lambda name: True,  # every Linear of a block: 10, or 12 where a picture is cross-attended
    unseen=("text_len",),
    columns=(
        Column("clip", "CLIP's tokens of the image", ("clip",), later(f"{__name__}.clip", "open_clip")),
    ),
    image_conditions=later(f"{__name__}.images", "image_conditions"),
    sizes=((832, 480), (480, 832), (1280, 720), (720, 1280), (1280, 704), (704, 1280)),
    part_shapes={part: later(f"{__name__}.official", f"{part}_shapes") for part in ("vae", "t5")},
    tiny=later(f"{__name__}.tiny", "parts"),
    musubi=MUSUBI,
)
