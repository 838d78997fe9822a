"""The released sets of weights (and the tiny one): sizes, conditions, tasks and how to sample from them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import torch

from hvtrain.models.hunyuan_video.arch import HunyuanVideoArch, has_guidance, infer_arch
from hvtrain.models.spec import Defaults, Field, Flavor, LatentGeometry, Shapes

MAX_TOKENS = 256  # of a prompt
PICTURE_TOKENS = 576  # of an image in the LLM, of which the DiT reads every n-th
NEGATIVE_PROMPT = (
    "Aerial view, aerial view, overexposed, low quality, deformation, a poor composition, bad hands, bad "
    "teeth, bad eyes, bad limbs, distortion"
)
_FULL = HunyuanVideoArch(
    in_channels=16,
    out_channels=16,
    hidden_size=3072,
    heads_num=24,
    double=20,
    single=40,
    rope_dims=(16, 56, 56),
    text_dim=4096,
    pooled_dim=768,
    guidance_embed=True,
)
_TINY = HunyuanVideoArch(
    in_channels=16,
    out_channels=16,
    hidden_size=160,
    heads_num=4,
    double=2,
    single=4,
    rope_dims=(8, 16, 16),
    text_dim=64,
    pooled_dim=64,
    guidance_embed=True,
)
_OFFICIAL = Defaults(
    steps=50,
    shift=7.0,
    guidance=6.0,
    fps=24,
    frames=129,
    height=720,
    width=1280,
    negative_prompt=NEGATIVE_PROMPT,
)
_IMAGE = replace(
    _OFFICIAL,
    negative_prompt="deformation, a poor composition and deformed video, bad teeth, bad eyes, bad limbs"
)
# Trained with an embedded guidance of 1 and sampled with true classifier-free guidance.
_SKYREELS = replace(
    _OFFICIAL, steps=30, guidance=1.0, frames=97, height=544, width=960, cfg_scale=6.0,
    prompt_prefix="FPS-24, "
)
_SMALL = replace(_OFFICIAL, steps=20, shift=3.0, fps=8, frames=9, height=64, width=64, negative_prompt="")


def cond_fields(arch: HunyuanVideoArch, task: str, sees: int = 0) -> tuple[Field, ...]:
    """States that have seen the image go by another name: no one takes plain ones for them."""
    longest = MAX_TOKENS + (-(-PICTURE_TOKENS // sees) if sees else 0)
    text = Field(
        "seen_text" if sees else "text", (None, arch.text_dim), torch.bfloat16, "text", longest=longest
    )
    pooled = Field("pooled", (arch.pooled_dim,), torch.bfloat16, "text")
    # Optional in shards: without the column, the image is the clip's own first latent frame.
    image = Field("image_latents", (arch.out_channels, 1, None, None), torch.bfloat16, "image", optional=True)
    return (text, pooled) if task == "t2v" else (text, pooled, image)


def _flavor(
    name: str, about: str, arch: HunyuanVideoArch, *, task: str, defaults: Defaults, sees: int = 0
) -> Flavor:
    latent = LatentGeometry(arch.out_channels, stride_t=4, stride_h=8, stride_w=8, patch=arch.patch)
    return Flavor(
        name, about, arch, arch.heads_num, latent, cond_fields(arch, task, sees), (task,), defaults, sees=sees
    )


_REPLACED = replace(_FULL, token_replace=True)


FLAVORS = {
    flavor.name: flavor
    for flavor in (
        _flavor("t2v", "text to video 13B, guidance-distilled", _FULL, task="t2v", defaults=_OFFICIAL),
        _flavor(
            "i2v", "image to video 13B, first frame replaced, steady", _REPLACED, task="i2v", defaults=_IMAGE,
            sees=4
        ),
        _flavor(
            "i2v-dynamic",
            "the same weights, sampled for more motion",
            _REPLACED,
            task="i2v-dynamic",
            defaults=replace(_IMAGE, shift=17.0, training_shift=7.0),
            sees=4,
        ),
        _flavor(
            "i2v-concat",
            "image to video 13B, the first release: image and mask in extra channels",
            replace(_FULL, in_channels=33, guidance_embed=False),
            task="i2v-mask",
            defaults=replace(_IMAGE, guidance=None),
            sees=2,
        ),
        _flavor("skyreels-v1-t2v", "SkyReels V1 text to video 13B", _FULL, task="t2v", defaults=_SKYREELS),
        _flavor(
            "skyreels-v1-i2v",
            "SkyReels V1 image to video 13B, image in extra channels",
            replace(_FULL, in_channels=32),
            task="i2v-concat",
            defaults=_SKYREELS,
        ),
        _flavor("tiny", "the embedded default, for CPUs", _TINY, task="t2v", defaults=_SMALL),
    )
}


def sizes_from(shapes: Shapes) -> HunyuanVideoArch:
    """The architecture of a file under official names: the released one with the same patch embedding, so
    that the strict check can name what such a file lacks; else what the shapes say."""
    proj = shapes.get("img_in.proj.weight", ())
    for arch in (flavor.arch for flavor in FLAVORS.values() if not flavor.arch.token_replace):
        if proj == (arch.hidden_size, arch.in_channels, *arch.patch):
            return replace(arch, guidance_embed=has_guidance(shapes))
    return infer_arch(shapes)


def fitted(flavor: Flavor, arch: HunyuanVideoArch) -> Flavor:
    """The flavor with exactly these sizes."""
    latent = replace(flavor.latent, channels=arch.out_channels, patch=arch.patch)
    own = flavor.defaults.guidance
    guidance = (_OFFICIAL.guidance if own is None else own) if arch.guidance_embed else None
    cond = cond_fields(arch, flavor.tasks[0], flavor.sees)
    return replace(
        flavor, arch=arch, n_heads=arch.heads_num, latent=latent, cond=cond,
        defaults=replace(flavor.defaults, guidance=guidance)
    )


def told_by(path: Path) -> str | None:
    """The flavor that a file's name, or its directory's, speaks of; None: it does not say."""
    for part in (path.name, path.parent.name, path.parent.parent.name):
        name = part.lower()
        image = re.search(r"i2v|image[._-]?to[._-]?video", name)
        if "skyreels" in name:
            return "skyreels-v1-i2v" if image else "skyreels-v1-t2v"
        if image or re.search(r"t2v|text[._-]?to[._-]?video", name):
            return "i2v" if image else "t2v"
    return None
