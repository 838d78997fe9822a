"""What image to video needs of its image, as the official pipeline makes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from hvtrain.errors import DataError
from hvtrain.models.spec import PictureEncoder, Vae


def image_conditions(
    vae: Vae, encoders: Mapping[str, PictureEncoder], image: Tensor, shape: Sequence[int]
) -> dict[str, Tensor]:
    """image [3 H W] in [-1, 1], of the video's size; shape: its latents' [C T H W].
    -> "image_latents" [C 1 h w], the posterior's mode of it as a clip of one frame, scaled as all latents
    are, and "vision" [tokens dim]; float32, without the batch."""
    latents = vae.encode(image[None, :, None])[0].cpu()
    if latents.shape != (shape[0], 1, *shape[2:]):
        raise DataError(
            f"an image of {image.shape[-1]}x{image.shape[-2]} became latents of shape "
            f"{tuple(latents.shape)}, which do not fit those of the video, {tuple(shape)}: model.vae is "
            "another model's"
        )
    (seen,) = encoders["vision"].encode(image[None])
    return {"image_latents": latents, **seen}
