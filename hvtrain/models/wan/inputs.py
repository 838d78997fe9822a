"""What goes into Wan's transformer for each task; training and generation both come here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hvtrain.errors import DataError
from hvtrain.models.dit import ModelInput
from hvtrain.registry import Registry

FRAMES_PER_LATENT = 4  # channels of the mask: one for each frame that a latent frame spans


@dataclass(frozen=True)
class WanInput(ModelInput):
    """cond: "text" [B L text_dim], and "clip" [B n clip_dim] where a picture is
    cross-attended; t: 0..1000."""

    # [B T] bool: latent frames that are given, whose tokens take the modulation of t = 0
    clean: Tensor | None = None


Conds = Mapping[str, Tensor]
Task = Callable[[WanInput, Conds, "Tensor | None"], WanInput]
TASKS: Registry[Task] = Registry("task")


def make_input(
    x_sigma: Tensor, sigma: Tensor, cond: Conds, *, task: str, guidance: float | None,
    x0: Tensor | None = None
) -> WanInput:
    """x_sigma [B C T H W] noised latents, sigma [B], cond a batch's conditions; no guidance is embedded.
    x0: the clean latents, whose first frame is the image of "i2v-frame" where the conditions hold none."""
    add_condition = TASKS.find(task, key="task")
    plain = WanInput(
        x=x_sigma, t=1000.0 * sigma.float(), cond={"text": cond["text"]},
        lengths={"text": tuple(cond["text_len"].tolist())}
    )
    return add_condition(plain, cond, x0)


@TASKS.add("t2v")
def _text_to_video(inp: WanInput, cond: Conds, x0: Tensor | None) -> WanInput:
    return inp


@TASKS.add("i2v")
def _image_to_video(inp: WanInput, cond: Conds, x0: Tensor | None) -> WanInput:
    """Beside the noised channels a mask of the given frames and the latents of a
    clip that is grey but for them."""
    return _beside(inp, cond, last=False)


@TASKS.add("flf2v")
def _first_and_last_frame(inp: WanInput, cond: Conds, x0: Tensor | None) -> WanInput:
    return _beside(inp, cond, last=True)


def _beside(inp: WanInput, cond: Conds, *, last: bool) -> WanInput:
    known = _needed(cond, "image_latents").to(inp.x)
    if known.shape != inp.x.shape:
        raise DataError(
            f"image_latents of shape {tuple(known.shape)} do not fit latents of shape {tuple(inp.x.shape)}: "
            "they are those of the whole clip, grey but for the given frames; encode the column 'image' anew"
        )
    mask = given_frames(inp.x.shape[2], last=last, device=inp.x.device).to(inp.x.dtype)
    mask = mask[None, :, :, None, None].expand(len(known), -1, -1, *known.shape[3:])
    more = {"clip": _needed(cond, "clip")} if "clip" in cond else {}
    return replace(inp, x=torch.cat([inp.x, mask, known], dim=1), cond={**inp.cond, **more})


def given_frames(n: int, *, last: bool, device: torch.device) -> Tensor:
    """[4 T] bool: which of the 4 frames of each of n latent frames are given. The first latent frame spans
    one frame, which officially counts as all four."""
    mask = torch.zeros(FRAMES_PER_LATENT, n, dtype=torch.bool, device=device)
    mask[:, 0] = True
    if last:
        mask[-1, -1] = True
    return mask


@TASKS.add("i2v-frame")
def _clean_first_frame(inp: WanInput, cond: Conds, x0: Tensor | None) -> WanInput:
    """Latent frame 0 is the given image (else the clip's own), clean at every step, its tokens at t = 0; the
    loss leaves it out. Where cond["image_given"] [B] is false, a sample is text to video after all."""
    image = cond.get("image_latents", x0)
    if image is None:
        raise DataError(
            "image to video needs the condition 'image_latents', which these samples lack; encode them anew"
        )
    first = image[:, :, :1].to(inp.x)
    if first.shape[1] != inp.x.shape[1] or first.shape[3:] != inp.x.shape[3:]:
        raise DataError(
            f"image_latents of shape {tuple(image.shape)} do not fit latents of shape {tuple(inp.x.shape)}"
        )
    clean = torch.zeros(len(first), inp.x.shape[2], dtype=torch.bool, device=inp.x.device)
    clean[:, 0] = cond["image_given"].to(clean) if "image_given" in cond else True
    mask = clean[:, None, :, None, None]  # [B 1 T 1 1]
    return replace(inp, x=torch.where(mask, first, inp.x), clean=clean, loss_mask=(~mask).to(inp.x.dtype))


@TASKS.add("ti2v")
def _with_or_without_an_image(inp: WanInput, cond: Conds, x0: Tensor | None) -> WanInput:
    """Image to video for samples that come with an image, else text to video."""
    return _clean_first_frame(inp, cond, None) if "image_latents" in cond else inp


def _needed(cond: Conds, name: str) -> Tensor:
    if name not in cond:
        raise DataError(
            f"this model needs the condition '{name}', which these samples lack; encode them anew"
        )
    return cond[name]
