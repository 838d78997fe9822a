"""The released sets of weights (and the tiny one): sizes, conditions, tasks and how to sample from them."""

from __future__ import annotations

from dataclasses import replace

import torch

from hvtrain.models.hunyuan_video.arch import HunyuanVideoArch, has_guidance, infer_arch
from hvtrain.models.spec import Defaults, Field, Flavor, LatentGeometry, Shapes

MAX_TOKENS = 256  # of a prompt
NEGATIVE_PROMPT = (
    "Aerial view, aerial view, overexposed, low quality, deformation, a poor composition, bad hands, bad teeth, "
    "bad eyes, bad limbs, distortion"
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
# Trained with an embedded guidance of 1 and sampled with true classifier-free guidance.
_SKYREELS = replace(_OFFICIAL, steps=30, guidance=1.0, frames=97, height=544, width=960, cfg_scale=6.0)
_SMALL = replace(_OFFICIAL, steps=20, shift=3.0, fps=8, frames=9, height=64, width=64, negative_prompt="")


def cond_fields(arch: HunyuanVideoArch, task: str) -> tuple[Field, ...]:
    text = Field("text", (None, arch.text_dim), torch.bfloat16, "text", longest=MAX_TOKENS)
    pooled = Field("pooled", (arch.pooled_dim,), torch.bfloat16, "text")
    # Optional in shards: without the column, the image is the clip's own first latent frame.
    image = Field("image_latents", (arch.out_channels, 1, None, None), torch.bfloat16, "image", optional=True)
    return (text, pooled) if task == "t2v" else (text, pooled, image)


def _flavor(name: str, about: str, arch: HunyuanVideoArch, *, task: str, defaults: Defaults) -> Flavor:
    latent = LatentGeometry(arch.out_channels, stride_t=4, stride_h=8, stride_w=8, patch=arch.patch)
    return Flavor(name, about, arch, arch.heads_num, latent, cond_fields(arch, task), (task,), defaults)


FLAVORS = {
    flavor.name: flavor
    for flavor in (
        _flavor("t2v", "text to video 13B, guidance-distilled", _FULL, task="t2v", defaults=_OFFICIAL),
        _flavor(
            "i2v",
            "image to video 13B, first frame replaced",
            replace(_FULL, token_replace=True),
            task="i2v",
            defaults=_OFFICIAL,
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
    """The architecture of a file under official names: the released one with the same patch embedding, so that the strict
    check can name what such a file lacks; else what the shapes say."""
    proj = shapes.get("img_in.proj.weight", ())
    for arch in (flavor.arch for flavor in FLAVORS.values() if not flavor.arch.token_replace):
        if proj == (arch.hidden_size, arch.in_channels, *arch.patch):
            return replace(arch, guidance_embed=has_guidance(shapes))
    return infer_arch(shapes)


def fitted(flavor: Flavor, arch: HunyuanVideoArch) -> Flavor:
    """The flavor with exactly these sizes."""
    latent = replace(flavor.latent, channels=arch.out_channels, patch=arch.patch)
    defaults = flavor.defaults if arch.guidance_embed else replace(flavor.defaults, guidance=None)
    return replace(
        flavor, arch=arch, n_heads=arch.heads_num, latent=latent, cond=cond_fields(arch, flavor.tasks[0]), defaults=defaults
    )
