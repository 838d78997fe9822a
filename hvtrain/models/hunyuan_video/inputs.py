"""What goes into HunyuanVideo's transformer for each task; training and generation both come here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from hvtrain.errors import DataError
from hvtrain.models.base import ModelInput
from hvtrain.registry import Registry

TASKS: Registry[Callable[[ModelInput, Mapping[str, Tensor]], ModelInput]] = Registry("task")


def make_input(
    x_sigma: Tensor, sigma: Tensor, cond: Mapping[str, Tensor], *, task: str, guidance: float | None
) -> ModelInput:
    """x_sigma [B C T H W] noised latents, sigma [B], cond a batch's conditions; guidance is the embedded scale, if any."""
    add_condition = TASKS.find(task, key="task")
    told = {} if guidance is None else {"guidance": embedded_guidance(guidance, sigma)}
    plain = ModelInput(
        x=x_sigma,
        t=1000.0 * sigma.float(),
        text=cond["text"],
        text_len=tuple(cond["text_len"].tolist()),
        cond={"pooled": cond["pooled"], **told},
    )
    return add_condition(plain, cond)


def embedded_guidance(scale: float, sigma: Tensor) -> Tensor:
    """[B] fp32. Officially scaled by 1000 in bfloat16: 6 becomes 6016, and the weights have never seen 6000."""
    value = torch.full_like(sigma, scale, dtype=torch.bfloat16) * 1000.0
    return value.float()


@TASKS.add("t2v")
def _text_to_video(inp: ModelInput, cond: Mapping[str, Tensor]) -> ModelInput:
    return inp


@TASKS.add("i2v")
def _token_replace(inp: ModelInput, cond: Mapping[str, Tensor]) -> ModelInput:
    """Latent frame 0 is the given image, clean at every step; the loss leaves it out."""
    image = _image_latents(cond, inp.x)
    mask = torch.ones(inp.x.shape[0], 1, inp.x.shape[2], 1, 1, device=inp.x.device)
    mask[:, :, 0] = 0.0
    x = torch.cat([image, inp.x[:, :, 1:]], dim=2)
    return replace(inp, x=x, loss_mask=mask, token_replace=True)


@TASKS.add("i2v-concat")
def _channel_concat(inp: ModelInput, cond: Mapping[str, Tensor]) -> ModelInput:
    """The image's latents in frame 0 of as many extra channels, zeros in the other frames, no mask channel."""
    image = F.pad(_image_latents(cond, inp.x), (0, 0, 0, 0, 0, inp.x.shape[2] - 1))
    return replace(inp, x=torch.cat([inp.x, image], dim=1))


def _image_latents(cond: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """[B C 1 H W]: the first frame of the condition, which may have more."""
    if "image_latents" not in cond:
        raise DataError("image to video needs the condition 'image_latents', which these samples lack; encode them anew")
    image = cond["image_latents"][:, :, :1].to(x)
    if image.shape[1] != x.shape[1] or image.shape[3:] != x.shape[3:]:
        raise DataError(f"image_latents of shape {tuple(image.shape)} do not fit latents of shape {tuple(x.shape)}")
    return image
