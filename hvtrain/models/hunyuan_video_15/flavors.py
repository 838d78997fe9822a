"""The released sets of weights (and tiny ones): sizes, conditions, tasks and how to sample from them."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from hvtrain.models.hunyuan_video_15.arch import HunyuanVideo15Arch, has_meanflow, infer_arch
from hvtrain.models.spec import Defaults, Field, Flavor, LatentGeometry, Shapes
from hvtrain.weights.source import json_object

log = logging.getLogger(__name__)

TEXT_TOKENS, GLYPH_TOKENS, VISION_TOKENS = 1000, 256, 729  # of a prompt, of what it quotes, of a picture
_FULL = HunyuanVideo15Arch(
    in_channels=65, out_channels=32, hidden_size=2048, heads_num=16, double=54, rope_dims=(16, 56, 56),
    text_dim=3584, glyph_dim=1472, glyph_hidden=2048, vision_dim=1152,
)
_STEPS = replace(_FULL, meanflow=True)
_SR = replace(_STEPS, in_channels=98)
_TINY = HunyuanVideo15Arch(
    in_channels=65, out_channels=32, hidden_size=96, heads_num=4, double=3, rope_dims=(4, 10, 10),
    text_dim=64, glyph_dim=32, glyph_hidden=64, vision_dim=48, mlp_ratio=2.0,
)
_480P = Defaults(
    steps=50, shift=5.0, guidance=None, fps=24, frames=121, height=480, width=848, cfg_scale=6.0,
    training_shift=3.0
)
_720P = replace(_480P, height=720, width=1280, shift=9.0)
_1080P = replace(_480P, height=1080 // 16 * 16, width=1920)
_SMALL = replace(_480P, steps=20, shift=3.0, fps=8, frames=9, height=64, width=64)


def cond_fields(arch: HunyuanVideo15Arch, task: str) -> tuple[Field, ...]:
    fields = [
        Field("text", (None, arch.text_dim), torch.bfloat16, "text", longest=TEXT_TOKENS),
        Field("glyph", (None, arch.glyph_dim), torch.bfloat16, "text", longest=GLYPH_TOKENS),
    ]
    # without the column, the image is the clip's own first latent frame; super-resolution needs none
    if task != "t2v":
        either = task == "sr"
        fields += [
            Field(
                "vision", (None, arch.vision_dim), torch.bfloat16, "vision", optional=either,
                longest=VISION_TOKENS
            ),
            Field(
                "image_latents", (arch.out_channels, 1, None, None), torch.bfloat16, "image", optional=True
            ),
        ]
    if task == "sr":  # of a low clip of the same length, brought to the size
        fields.append(Field("low_latents", (arch.out_channels, None, None, None), torch.bfloat16, "control"))
    return tuple(fields)


def _flavor(
    name: str, about: str, arch: HunyuanVideo15Arch, defaults: Defaults, *, task: str
) -> Flavor:
    latent = LatentGeometry(arch.out_channels, stride_t=4, stride_h=16, stride_w=16, patch=(1, 1, 1))
    return Flavor(
        name, about, arch, arch.heads_num, latent, cond_fields(arch, task), (task,), defaults,
        image_optional=task == "sr", enlarges=task == "sr", mixes=task == "i2v", unguided=arch.meanflow,
    )


_I2V_720P = replace(_720P, shift=7.0)
# Where no weight tells flavors apart, the first is taken unless the user, or the file's
# config or path, says another.
FLAVORS = {
    flavor.name: flavor
    for flavor in (
        _flavor("t2v-480p", "text to video 8.3B", _FULL, _480P, task="t2v"),
        _flavor("i2v-480p", "image to video 8.3B", _FULL, _480P, task="i2v"),
        _flavor("t2v-720p", "text to video 8.3B", _FULL, _720P, task="t2v"),
        _flavor("i2v-720p", "image to video 8.3B", _FULL, _I2V_720P, task="i2v"),
        _flavor(
            "t2v-480p-distilled", "text to video 8.3B, guidance-distilled", _FULL,
            replace(_480P, cfg_scale=1.0), task="t2v"
        ),
        _flavor(
            "i2v-480p-distilled", "image to video 8.3B, guidance-distilled", _FULL,
            replace(_480P, cfg_scale=1.0), task="i2v"
        ),
        _flavor(
            "t2v-720p-distilled", "text to video 8.3B, guidance-distilled", _FULL,
            replace(_720P, cfg_scale=1.0), task="t2v"
        ),
        _flavor(
            "i2v-720p-distilled",
            "image to video 8.3B, guidance-distilled; the sparse one too, computed densely", _FULL,
            replace(_I2V_720P, cfg_scale=1.0), task="i2v",
        ),
        _flavor(
            "i2v-480p-step-distilled", "image to video 8.3B in 4 to 12 steps, without guidance", _STEPS,
            replace(_480P, steps=12, shift=7.0, cfg_scale=1.0), task="i2v",
        ),
        _flavor("sr-720p", "super-resolution 480p to 720p, without guidance", _SR,
            replace(_720P, steps=6, shift=2.0, cfg_scale=1.0), task="sr"),
        _flavor("sr-1080p", "super-resolution 720p to 1080p, without guidance", _SR,
            replace(_1080P, steps=8, shift=2.0, cfg_scale=1.0), task="sr"),
        _flavor("tiny", "for CPUs", _TINY, _SMALL, task="t2v"),
        _flavor("tiny-i2v", "the same weights, image to video", _TINY, _SMALL, task="i2v"),
        _flavor(
            "tiny-steps", "for CPUs, image to video, as the one distilled in steps",
            replace(_TINY, meanflow=True), replace(_SMALL, steps=4, cfg_scale=1.0), task="i2v"
        ),
    )
}


def sizes_from(shapes: Shapes) -> HunyuanVideo15Arch:
    """The architecture of a file under official names: the released one with the same patch embedding, so
    that the strict check can name what such a file lacks; else what the shapes say."""
    proj = shapes.get("img_in.proj.weight", ())
    for arch in (flavor.arch for flavor in FLAVORS.values()):
        if proj == (arch.hidden_size, arch.in_channels, 1, 1, 1) and arch.meanflow == has_meanflow(shapes):
            return arch
    return infer_arch(shapes)


def fitted(flavor: Flavor, arch: HunyuanVideo15Arch) -> Flavor:
    """The flavor with exactly these sizes."""
    latent = replace(flavor.latent, channels=arch.out_channels)
    return replace(
        flavor, arch=arch, n_heads=arch.heads_num, latent=latent, cond=cond_fields(arch, flavor.tasks[0])
    )


def told_by(path: Path) -> str | None:
    """The flavor that a file's name, its directory's or the official config.json
    speaks of; None: it does not say."""
    for part in (path.name, path.parent.name, path.parent.parent.name):
        if name := _told(part.lower()):
            if "sparse" in part.lower():
                _say(
                    f"{path}: trained with sparse attention, which is not here: it is computed densely, as "
                    "its weights allow"
                )
            return name
    for folder in (path, path.parent):
        if (folder / "config.json").is_file():
            config = json_object((folder / "config.json").read_text(encoding="utf-8"), folder / "config.json")
            return _told(f"{config.get('ideal_resolution')}_{config.get('ideal_task')}")
    return None


def _told(text: str) -> str | None:
    """480p_t2v, hunyuanvideo1.5_720p_i2v_cfg_distilled_fp16, 1080p_sr_distilled, ..."""
    size, task = re.search(r"(480|720|1080)p", text), re.search(r"(?<![a-z])(t2v|i2v|sr)(?![a-z])", text)
    if size is None or task is None:
        return None
    name = f"{task[1]}-{size[0]}"
    if task[1] != "sr" and "distill" in text:
        name += "-step-distilled" if re.search(r"step[._-]?distill", text) else "-distilled"
    return name if name in FLAVORS else None


@cache
def _say(text: str) -> None:
    log.warning(text)
