"""What image to video needs of its image (or first and last frame), as the official pipelines make it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hvtrain.errors import DataError
from hvtrain.models.spec import PictureEncoder, Vae


def image_conditions(
    vae: Vae, encoders: Mapping[str, PictureEncoder], image: Tensor, shape: Sequence[int]
) -> dict[str, Tensor]:
    """image [3 H W] in [-1, 1], or first and last frame [2 3 H W], of any size; shape: the video's
    latents' [C T H W]. -> "image_latents" [C T H W], for the 5B [C 1 H W], and "clip" [n dim] with such
    an encoder; float32, without the batch.

    Resized without cropping (the official code picks a size of the image's own
    aspect); CLIP sees it as it was.
    """
    pictures = image[None] if image.ndim == 3 else image  # [n 3 H W]
    c, t, h, w = shape
    if vae.channels != c:
        raise DataError(
            f"this VAE makes latents of {vae.channels} channels, the model takes {c}: model.vae is another "
            "model's"
        )
    step_t, step_h, step_w = vae.stride
    size = (h * step_h, w * step_w)
    fitted = pictures.float()
    if fitted.shape[-2:] != size:
        fitted = F.interpolate(fitted, size=size, mode="bicubic", align_corners=False)
    if step_h == 16:  # the 5B's: its first frame is given, and nothing beside
        return {"image_latents": vae.encode(fitted[0][None, :, None])[0].cpu()}
    # The other frames are grey, which is 0, and their latents are not: the clip is encoded whole.
    clip = torch.zeros(1, 3, step_t * (t - 1) + 1, *size, device=fitted.device)
    clip[0, :, 0] = fitted[0]
    if len(fitted) > 1:
        clip[0, :, -1] = fitted[1]
    seen = (
        {"clip": torch.cat([one["clip"] for one in encoders["clip"].encode(pictures)])}
        if "clip" in encoders else {}
    )
    return {"image_latents": vae.encode(clip)[0].cpu(), **seen}
