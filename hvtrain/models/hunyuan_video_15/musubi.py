"""musubi-tuner's cache files of this architecture: unscaled latents, embeddings at their own length."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from hvtrain.errors import DataError
from hvtrain.models.spec import MusubiCache

# of the official VAE's config; musubi-tuner applies it while training, to the latents but not to the image's
SCALING = 1.03682


def _latents(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """latents_FxHxW_DTYPE [32 F H W]; of image to video latents_image_FxHxW_DTYPE [32 + 1 F H W], the image
    in its first frame and a mask, and siglip_DTYPE [729 1152]."""
    plain, image, seen = (
        [t for name, t in tensors.items() if re.fullmatch(pattern, name)]
        for pattern in (r"latents_\d+x\d+x\d+_\w+", r"latents_image_\d+x\d+x\d+_\w+", r"siglip_\w+")
    )
    if len(plain) != 1 or plain[0].ndim != 4 or len(image) != len(seen) or len(image) > 1:
        raise DataError(
            "expected latents_FxHxW_DTYPE, and latents_image_FxHxW_DTYPE with siglip_DTYPE, found "
            f"{sorted(tensors)}"
        )
    found = {"latents": plain[0].float() * SCALING}
    if image:
        found["image_latents"] = image[0][: len(plain[0]), :1].float() * SCALING
        found["vision"] = seen[0].reshape(-1, seen[0].shape[-1])
    return {name: value.to(torch.bfloat16) for name, value in found.items()}


def _text(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """varlen_vl_embed_DTYPE [L 3584] and varlen_byt5_embed_DTYPE [L 1472], the second of no
    rows where nothing is quoted."""
    found = {}
    for field, name in (("text", "vl"), ("glyph", "byt5")):
        mine = [t for key, t in tensors.items() if re.fullmatch(rf"(varlen_)?{name}_embed_\w+", key)]
        if len(mine) != 1 or mine[0].ndim != 2:
            raise DataError(
                f"expected varlen_vl_embed_DTYPE and varlen_byt5_embed_DTYPE, found {sorted(tensors)}"
            )
        found[field] = mine[0].to(torch.bfloat16)
    return found


MUSUBI = MusubiCache(short="hv15", full="hunyuan_video_1_5", latents=_latents, text=_text)
