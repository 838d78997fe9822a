"""An architecture that exists only to be different from the others; see tests/strange."""

from __future__ import annotations

from hvtrain.models.spec import Column, ModelSpec
from hvtrain.models.strange.arch import FLAVORS, StrangeArch, fitted, owns, sizes_from
from hvtrain.models.strange.inputs import image_conditions, make_input
from hvtrain.models.strange.keys import KEY_MAPS
from hvtrain.models.strange.model import Strange, init_weights
from hvtrain.models.strange.parts import open_eye, open_text, open_vae, text_fingerprints

SPEC = ModelSpec(
    name="strange",
    flavors=FLAVORS,
    arch=StrangeArch,
    kind=("in_channels",),
    signature=owns,
    sizes_from=sizes_from,
    fitted=fitted,
    build=Strange,
    init_weights=init_weights,
    make_input=make_input,
    open_vae=open_vae,
    open_text=open_text,
    text_fingerprints=text_fingerprints,
    key_maps=KEY_MAPS,
    is_lora_target=lambda name: not name.endswith("sight_kv"),
    columns=(Column("vision", "what the first frame looks like", ("eye",), open_eye),),
    image_conditions=image_conditions,
    sizes=((96, 32), (64, 64)),
)
