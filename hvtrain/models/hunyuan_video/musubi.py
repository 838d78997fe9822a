"""musubi-tuner's cache files of this architecture: unscaled latents, and
embeddings padded to a fixed length."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from hvtrain.errors import DataError
from hvtrain.models.spec import MusubiCache

SCALING = 0.476986  # of the official VAE's config; musubi-tuner applies it while training


def _latents(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """latents_FxHxW_DTYPE [16 F H W]."""
    found = [name for name in tensors if re.fullmatch(r"latents_\d+x\d+x\d+_\w+", name)]
    if len(found) != 1 or tensors[found[0]].ndim != 4:
        raise DataError(
            f"expected one tensor latents_FxHxW_DTYPE of four dimensions, found {sorted(tensors)}"
        )
    return {"latents": (tensors[found[0]].float() * SCALING).to(torch.bfloat16)}


def _text(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """llm_DTYPE [256 4096] with llm_mask [256], clipL_DTYPE [768]. The padding is left out."""
    llm = [t for name, t in tensors.items() if re.fullmatch(r"(varlen_)?llm_(?!mask)\w+", name)]
    clip = [t for name, t in tensors.items() if re.fullmatch(r"clipL_(?!mask)\w+", name)]
    if len(llm) != 1 or len(clip) != 1 or "llm_mask" not in tensors:
        raise DataError(f"expected llm_DTYPE, llm_mask and clipL_DTYPE, found {sorted(tensors)}")
    valid = tensors["llm_mask"].flatten().bool()
    text = llm[0].reshape(-1, llm[0].shape[-1])
    if len(valid) != len(text):
        raise DataError(f"llm_mask has {len(valid)} entries for {len(text)} embeddings")
    return {"text": text[valid].to(torch.bfloat16), "pooled": clip[0].flatten().to(torch.bfloat16)}


MUSUBI = MusubiCache(short="hv", full="hunyuan_video", latents=_latents, text=_text)
