"""HunyuanVideo 13B and its relatives with the same transformer: HunyuanVideo-I2V,
SkyReels V1, and the tiny default."""

from __future__ import annotations

import re

from hvtrain.models.hunyuan_video.arch import HunyuanVideoArch
from hvtrain.models.hunyuan_video.flavors import FLAVORS, fitted, sizes_from, told_by
from hvtrain.models.hunyuan_video.inputs import image_conditions, make_input, start
from hvtrain.models.hunyuan_video.keys import KEY_MAPS, owns
from hvtrain.models.hunyuan_video.model import HunyuanVideo
from hvtrain.models.hunyuan_video.musubi import MUSUBI
from hvtrain.models.later import later
from hvtrain.models.spec import ModelSpec
from hvtrain.models.two_stream import init_weights


def _is_lora_target(name: str) -> bool:
    """Every Linear of the blocks but the modulation's: 8 per double block, 2 per single block."""
    return re.search(r"(^|\.)(img_mod|txt_mod|modulation)\.linear$", name) is None


SPEC = ModelSpec(
    name="hunyuan-video",
    flavors=FLAVORS,
    arch=HunyuanVideoArch,
    kind=("in_channels",),
    signature=owns,
    sizes_from=sizes_from,
    told_by=told_by,
    fitted=fitted,
    build=HunyuanVideo,
    init_weights=init_weights,
    make_input=make_input,
    open_vae=later(f"{__name__}.vae", "open_vae"),
    open_text=later(f"{__name__}.text", "open_text"),
    text_fingerprints=later(f"{__name__}.text", "text_fingerprints"),
    key_maps=KEY_MAPS,
    is_lora_target=_is_lora_target,
    unseen=("token_replace",),
    may_differ=("guidance_embed", "rope_theta", "rope_dims"),
    image_conditions=image_conditions,
    start=start,
    # The official code needs a height or width in patches that the GPUs divide: at most
    # sizes not 5, 6 or 7 of them.
    sizes=((1280, 720), (960, 544), (1104, 832), (960, 960), (832, 624), (720, 720)),
    tiny=later(f"{__name__}.tiny", "parts"),
    musubi=MUSUBI,
)
