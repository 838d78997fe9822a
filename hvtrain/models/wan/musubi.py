"""musubi-tuner's cache files of this architecture: latents as the model takes them,
embeddings at their own length."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from hvtrain.errors import DataError
from hvtrain.models.spec import MusubiCache
from hvtrain.models.wan.inputs import FRAMES_PER_LATENT


def _latents(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """latents_FxHxW_DTYPE [16 F H W]; of image to video latents_image_FxHxW_DTYPE [4 + 16 F H W], which
    begins with the mask, and of 2.1's clip_DTYPE [257 1280]."""
    plain = [t for name, t in tensors.items() if re.fullmatch(r"latents_\d+x\d+x\d+_\w+", name)]
    image = [t for name, t in tensors.items() if re.fullmatch(r"latents_image_\d+x\d+x\d+_\w+", name)]
    clip = [t for name, t in tensors.items() if re.fullmatch(r"clip_\w+", name)]
    if len(plain) != 1 or plain[0].ndim != 4 or len(plain) + len(image) + len(clip) < len(tensors):
        raise DataError(
            "expected latents_FxHxW_DTYPE, and latents_image_FxHxW_DTYPE and clip_DTYPE, found "
            f"{sorted(tensors)}"
        )
    found = {"latents": plain[0]}
    if image:
        found["image_latents"] = image[0][FRAMES_PER_LATENT:]
        if found["image_latents"].shape != plain[0].shape:
            raise DataError(
                f"latents_image of shape {tuple(image[0].shape)} beside latents of {tuple(plain[0].shape)}"
            )
    if clip:
        found["clip"] = clip[0].reshape(-1, clip[0].shape[-1])
    return {name: value.to(torch.bfloat16) for name, value in found.items()}


def _text(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """varlen_t5_DTYPE [L 4096]."""
    text = [t for name, t in tensors.items() if re.fullmatch(r"(varlen_)?t5_(?!mask)\w+", name)]
    if len(text) != 1 or text[0].ndim != 2:
        raise DataError(f"expected varlen_t5_DTYPE of two dimensions, found {sorted(tensors)}")
    return {"text": text[0].to(torch.bfloat16)}


MUSUBI = MusubiCache(short="wan", full="wan", latents=_latents, text=_text)
