"""HunyuanVideo 1.5: text and image to video 8.3B, distilled ones, and super-resolution."""

from __future__ import annotations

from hvtrain.models.hunyuan_video_15.arch import HunyuanVideo15Arch
from hvtrain.models.hunyuan_video_15.flavors import FLAVORS, fitted, sizes_from, told_by
from hvtrain.models.hunyuan_video_15.images import image_conditions
from hvtrain.models.hunyuan_video_15.inputs import make_input
from hvtrain.models.hunyuan_video_15.keys import KEY_MAPS, owns
from hvtrain.models.hunyuan_video_15.model import HunyuanVideo15
from hvtrain.models.hunyuan_video_15.musubi import MUSUBI
from hvtrain.models.later import later
from hvtrain.models.spec import Column, ModelSpec
from hvtrain.models.two_stream import init_weights

SPEC = ModelSpec(
    name="hunyuan-video-15",
    flavors=FLAVORS,
    arch=HunyuanVideo15Arch,
    kind=("upscales", "meanflow"),
    signature=owns,
    sizes_from=sizes_from,
    fitted=fitted,
    told_by=told_by,
    build=HunyuanVideo15,
    init_weights=init_weights,
    make_input=make_input,
    open_vae=later(f"{__name__}.vae", "open_vae"),
    open_text=later(f"{__name__}.text", "open_text"),
    text_fingerprints=later(f"{__name__}.text", "text_fingerprints"),
    key_maps=KEY_MAPS,
    is_lora_target=lambda name: True,  # every Linear of a block, modulation too: 14
    lora_keys={"comfyui": "comfy"},
    lora_about={
        "ss_base_model_version": "hunyuan_video_1_5", "modelspec.architecture": "hunyuan-video-1.5/lora",
        "ss_network_module": "networks.lora_hv_1_5",
    },
    columns=(
        Column(
            "vision", "what the first frame looks like", ("siglip",),
            later(f"{__name__}.vision", "open_vision")
        ),
    ),
    image_conditions=image_conditions,
    open_enlarger=later(f"{__name__}.upsample", "open_enlarger"),
    sizes=((848, 480), (480, 848), (1280, 720), (720, 1280), (1920, 1072), (960, 960), (640, 640)),
    tiny=later(f"{__name__}.tiny", "parts"),
    musubi=MUSUBI,
)
