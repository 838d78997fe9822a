"""The released sets of weights (and tiny ones): sizes, conditions, tasks, experts
and how to sample from them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import torch

from hvtrain.models.spec import Defaults, Expert, Field, Flavor, LatentGeometry, Shapes
from hvtrain.models.wan.arch import WanArch, has_picture, infer_arch

CLIP_TOKENS = 257  # of one picture: the class and 16 x 16 patches
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，"
    "背景人很多，倒着走"
)
_14B = WanArch(in_channels=16, out_channels=16, dim=5120, ffn_dim=13824, n_heads=40, n_layers=40)
_1_3B = replace(_14B, dim=1536, ffn_dim=8960, n_heads=12, n_layers=30)
_5B = replace(_14B, in_channels=48, out_channels=48, dim=3072, ffn_dim=14336, n_heads=24, n_layers=30)
_I2V = replace(_14B, in_channels=36)  # and 4 of mask, 16 of the image's latents
_CLIP = replace(_I2V, clip_dim=1280)
_TINY = WanArch(
    in_channels=16, out_channels=16, dim=128, ffn_dim=256, n_heads=4, n_layers=4, text_dim=64, freq_dim=64,
    text_len=64
)
_480P = Defaults(
    steps=50, shift=5.0, guidance=None, fps=16, frames=81, height=480, width=832,
    negative_prompt=NEGATIVE_PROMPT, cfg_scale=5.0, solver="unipc",
)
_720P = replace(_480P, height=720, width=1280)
_SMALL = replace(_480P, steps=20, shift=3.0, fps=8, frames=9, height=64, width=64, negative_prompt="")


def cond_fields(arch: WanArch, task: str) -> tuple[Field, ...]:
    fields = [Field("text", (None, arch.text_dim), torch.bfloat16, "text", longest=arch.text_len)]
    if task == "ti2v":  # optional in shards: without the column it is text to video
        fields += [
            Field("image_latents", (arch.out_channels, 1, None, None), torch.bfloat16, "image", optional=True)
        ]
    elif arch.in_channels > arch.out_channels:
        fields += [Field("image_latents", (arch.out_channels, None, None, None), torch.bfloat16, "image")]
    if arch.clip_dim:
        fields += [Field("clip", (arch.n_clip or CLIP_TOKENS, arch.clip_dim), torch.bfloat16, "clip")]
    return tuple(fields)


def _flavor(
    name: str, about: str, arch: WanArch, defaults: Defaults, *, tasks: tuple[str, ...] = ("t2v",),
    boundary: float | None = None, cfg_scales: tuple[float, float] = (1.0, 1.0),
) -> Flavor:
    """`boundary`: the noise level from which on the expert of high noise predicts;
    cfg_scales: of high and low noise."""
    space = 16 if arch.out_channels == 48 else 8
    latent = LatentGeometry(arch.out_channels, stride_t=4, stride_h=space, stride_w=space, patch=arch.patch)
    experts = () if boundary is None else (
        Expert("high", "dit", (boundary, 1.0), cfg_scales[0], r"high[._-]?noise"),
        Expert("low", "dit_low", (0.0, boundary), cfg_scales[1], r"low[._-]?noise"),
    )
    given = (0, -1) if tasks[0] == "flf2v" else (0,)
    cond = cond_fields(arch, tasks[0])
    both = tasks[0] == "ti2v"
    return Flavor(
        name, about, arch, arch.n_heads, latent, cond, tasks, defaults, experts, image_optional=both,
        given=given
    )


_SHAKING = "镜头晃动，" + NEGATIVE_PROMPT
_IMAGE = replace(_480P, steps=40, shift=3.0, negative_prompt=_SHAKING)
_CUTTING = replace(_720P, shift=16.0, negative_prompt="镜头切换，" + _SHAKING)
_TI2V = ("ti2v", "t2v", "i2v-frame")
# Where no weight tells flavors apart, the first is taken unless the user or the file's path says another.
FLAVORS = {
    flavor.name: flavor
    for flavor in (
        _flavor("t2v-14b", "2.1 text to video 14B", _14B, _720P),
        _flavor("t2v-1.3b", "2.1 text to video 1.3B", _1_3B, replace(_480P, cfg_scale=6.0)),
        _flavor("i2v-14b-480p", "2.1 image to video 14B", _CLIP, _IMAGE, tasks=("i2v",)),
        _flavor(
            "i2v-14b-720p", "2.1 image to video 14B", _CLIP,
            replace(_720P, steps=40, negative_prompt=_SHAKING), tasks=("i2v",)
        ),
        _flavor(
            "flf2v-14b", "2.1 first and last frame to video 14B", replace(_CLIP, n_clip=2 * CLIP_TOKENS),
            _CUTTING, tasks=("flf2v",),
        ),
        _flavor(
            "t2v-a14b", "2.2 text to video, two experts of 14B", _14B,
            replace(_720P, steps=40, shift=12.0, cfg_scale=4.0), boundary=0.875, cfg_scales=(4.0, 3.0),
        ),
        _flavor(
            "i2v-a14b", "2.2 image to video, two experts of 14B", _I2V,
            replace(_720P, steps=40, cfg_scale=3.5), tasks=("i2v",), boundary=0.9, cfg_scales=(3.5, 3.5),
        ),
        _flavor(
            "ti2v-5b", "2.2 text or image to video 5B", _5B, replace(_720P, fps=24, frames=121, height=704),
            tasks=_TI2V
        ),
        _flavor("tiny", "for CPUs, one model for all noise", _TINY, _SMALL),
        _flavor(
            "tiny-a14b", "the embedded one, for CPUs, two experts", _TINY, _SMALL, boundary=0.875,
            cfg_scales=(4.0, 3.0)
        ),
        _flavor(
            "tiny-ti2v", "for CPUs, as the 5B", replace(_TINY, in_channels=48, out_channels=48), _SMALL,
            tasks=_TI2V
        ),
    )
}
_22 = r"wan[._-]?2[._-]?2|a14b|(high|low)[._-]?noise"
# What file and directory names say: all patterns of a flavor must occur.
_NAMES = {
    "flf2v-14b": ("flf2v",),
    "t2v-a14b": (_22, "t2v"),
    "i2v-a14b": (_22, "i2v(?<!ti2v)"),
    "i2v-14b-720p": ("i2v", "720p"),
    "i2v-14b-480p": ("i2v", "480p"),
}


def sizes_from(shapes: Shapes) -> WanArch:
    """The architecture of a file under official names: the released one with the same patch embedding and
    picture tokens, so that the strict check can name what such a file lacks; else what the shapes say."""
    proj, ffn = shapes.get("patch_embedding.weight", ()), shapes.get("blocks.0.ffn.0.weight")
    for arch in (flavor.arch for flavor in FLAVORS.values()):
        pictured = (
            bool(arch.clip_dim) == has_picture(shapes) and bool(arch.n_clip) == ("img_emb.emb_pos" in shapes)
        )
        same = ffn is None or ffn[0] == arch.ffn_dim
        if proj == (arch.dim, arch.in_channels, *arch.patch) and pictured and same:
            return arch
    return infer_arch(shapes)


def fitted(flavor: Flavor, arch: WanArch) -> Flavor:
    """The flavor with exactly these sizes."""
    latent = replace(flavor.latent, channels=arch.out_channels, patch=arch.patch)
    return replace(
        flavor, arch=arch, n_heads=arch.n_heads, latent=latent, cond=cond_fields(arch, flavor.tasks[0])
    )


def told_by(path: Path) -> str | None:
    """The flavor that a file's name, or its directory's, speaks of; None: it does not say."""
    for part in (path.name, path.parent.name, path.parent.parent.name):
        for name, patterns in _NAMES.items():
            if all(re.search(pattern, part.lower()) for pattern in patterns):
                return name
    return None
