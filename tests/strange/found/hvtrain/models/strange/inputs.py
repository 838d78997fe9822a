"""What goes into a strange transformer, and what it needs beyond a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hvtrain.errors import ConfigError, DataError
from hvtrain.models.strange.arch import MASK_CHANNELS
from hvtrain.models.strange.model import StrangeInput


def make_input(
    x_sigma: Tensor, sigma: Tensor, cond: Mapping[str, Tensor], *, task: str, guidance: float | None,
    x0: Tensor | None = None,
) -> StrangeInput:
    """x_sigma [B 48 T H W], sigma [B]; no guidance is embedded. x0: the clean latents, whose first frame is
    the image where the conditions hold none."""
    text = ("words", "letters")
    lengths = {name: tuple(cond[f"{name}_len"].tolist()) for name in text}
    inp = StrangeInput(
        x=x_sigma, t=1000.0 * sigma.float(), cond={name: cond[name] for name in text}, lengths=lengths
    )
    if task == "t2v":
        return inp
    if task != "go-on":
        raise ConfigError(f"task '{task}' is not one of this model's: t2v, go-on")
    return _go_on(inp, cond.get("still", x0), cond["sight"])


def _go_on(inp: StrangeInput, still: Tensor | None, sight: Tensor) -> StrangeInput:
    """The first latent frame is the image's. Beside the noised latents: which frames are given, and these."""
    if still is None:
        raise DataError("the video goes on from an image: encode the column 'image'")
    x = inp.x
    n, _, t, h, w = x.shape
    first = still[:, :, :1].to(x)
    given = torch.zeros(n, MASK_CHANNELS, t, h, w, dtype=x.dtype, device=x.device)
    given[:, :, 0] = 1.0
    x = torch.cat([first, x[:, :, 1:]], dim=2)
    beside = F.pad(first, (0, 0, 0, 0, 0, t - 1))
    learnt = torch.ones(n, 1, t, 1, 1, device=x.device)
    learnt[:, :, 0] = 0.0
    return replace(
        inp, x=torch.cat([x, given, beside], dim=1), cond={**inp.cond, "sight": sight}, loss_mask=learnt,
        clean_first=True
    )


def image_conditions(
    vae: Any, encoders: Mapping[str, Any], image: Tensor, shape: tuple[int, ...]
) -> dict[str, Tensor]:
    """An image [3 H W] in [-1, 1] for latents of this shape [C T H W]: its own
    latents, and what it looks like."""
    still = vae.encode(image[None, :, None])[0]  # [C 1 h w]
    if still.shape[-2:] != tuple(shape[-2:]):
        raise DataError(
            f"an image of {image.shape[-1]}x{image.shape[-2]} does not fit latents of shape {tuple(shape)}"
        )
    (sight,) = encoders["vision"].encode(image[None])
    return {"still": still, **sight}
