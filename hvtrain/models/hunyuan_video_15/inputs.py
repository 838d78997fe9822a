"""What goes into HunyuanVideo 1.5's transformer for each task; training and generation both come here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from hvtrain.errors import DataError
from hvtrain.models.dit import ModelInput
from hvtrain.registry import Registry

LOW_NOISE = 0.7  # of the low latents of super-resolution, which are not looked at below this noise level


@dataclass(frozen=True)
class Hunyuan15Input(ModelInput):
    """cond: "text" [B L E], "glyph" [B L G] and "vision" [B L V], each of a length of
    its own, 0 too; t: 0..1000."""

    until: Tensor | None = None  # [B], as t: the noise level that this step ends at; None: t itself


Conds = Mapping[str, Tensor]
Task = Callable[[Hunyuan15Input, Conds, "Tensor | None"], Hunyuan15Input]
TASKS: Registry[Task] = Registry("task")


def make_input(
    x_sigma: Tensor, sigma: Tensor, cond: Conds, *, task: str, guidance: float | None,
    x0: Tensor | None = None
) -> Hunyuan15Input:
    """x_sigma [B C T H W] noised latents, sigma [B], cond a batch's conditions; no guidance is embedded.
    x0: the clean latents, whose first frame is the given image where the conditions hold none. A sampler
    tells the noise level that its step ends at as cond["next_sigma"] [B]; without, a model distilled in steps
    gives the velocity at sigma."""
    add_condition = TASKS.find(task, key="task")
    until = cond.get("next_sigma")
    plain = Hunyuan15Input(
        x=x_sigma,
        t=1000.0 * sigma.float(),
        cond={kind: cond[kind] for kind in ("text", "glyph")},
        lengths={kind: tuple(cond[f"{kind}_len"].tolist()) for kind in ("text", "glyph")},
        until=None if until is None else 1000.0 * until.float(),
    )
    return add_condition(plain, cond, x0)


@TASKS.add("t2v")
def _text_to_video(inp: Hunyuan15Input, cond: Conds, x0: Tensor | None) -> Hunyuan15Input:
    """Beside the noised channels those of an image and its mask, all of them zero."""
    return _beside(inp, None, None)


@TASKS.add("i2v")
def _image_to_video(inp: Hunyuan15Input, cond: Conds, x0: Tensor | None) -> Hunyuan15Input:
    """Beside the noised channels the image's latents in frame 0 (else the clip's own) and a mask that is 1
    there. Where cond["image_given"] [B] is false, a sample is text to video after all."""
    image = cond.get("image_latents", x0)
    if image is None:
        raise DataError(
            "image to video needs the condition 'image_latents', which these samples lack; encode them anew"
        )
    return _looked_at(_beside(inp, image, cond.get("image_given")), cond)


@TASKS.add("sr")
def _super_resolution(inp: Hunyuan15Input, cond: Conds, x0: Tensor | None) -> Hunyuan15Input:
    """Further beside them the low latents, of the same size, and a mask of ones; both are zero where there is
    less noise than they have themselves."""
    low = _needed(cond, "low_latents").to(inp.x)
    if low.shape != inp.x.shape:
        raise DataError(
            f"low_latents of shape {tuple(low.shape)} do not fit latents of shape {tuple(inp.x.shape)}"
        )
    both = torch.cat([low, torch.ones_like(low[:, :1])], dim=1)
    seen = (inp.t >= 1000.0 * LOW_NOISE).view(-1, 1, 1, 1, 1)
    image = cond.get("image_latents")
    told = _beside(inp, image, None)
    told = replace(told, x=torch.cat([told.x, both * seen], dim=1))
    return told if image is None else _looked_at(told, cond)


def _beside(inp: Hunyuan15Input, image: Tensor | None, given: Tensor | None) -> Hunyuan15Input:
    """x [B 2C+1 T H W]: with the first frame of these latents and its mask; with zeros for
    samples that are not given it."""
    n, c, t, h, w = inp.x.shape
    if image is None:
        return replace(inp, x=F.pad(inp.x, (0, 0, 0, 0, 0, 0, 0, c + 1)))
    first = image[:, :, :1].to(inp.x)
    if first.shape != (n, c, 1, h, w):
        raise DataError(
            f"image_latents of shape {tuple(image.shape)} do not fit latents of shape {tuple(inp.x.shape)}"
        )
    known = torch.cat([first, torch.ones_like(first[:, :1])], dim=1)
    if given is not None:
        known = known * given.to(known).view(-1, 1, 1, 1, 1)
    return replace(inp, x=torch.cat([inp.x, F.pad(known, (0, 0, 0, 0, 0, t - 1))], dim=1))


def _looked_at(inp: Hunyuan15Input, cond: Conds) -> Hunyuan15Input:
    """With what the picture looks like, for samples that are given one."""
    vision = _needed(cond, "vision")
    lengths = cond["vision_len"].tolist()
    if "image_given" in cond:
        lengths = [n * bool(given) for n, given in zip(lengths, cond["image_given"].tolist(), strict=True)]
    return replace(
        inp, cond={**inp.cond, "vision": vision}, lengths={**inp.lengths, "vision": tuple(lengths)}
    )


def _needed(cond: Conds, name: str) -> Tensor:
    if name not in cond:
        raise DataError(
            f"this model needs the condition '{name}', which these samples lack; encode them anew"
        )
    return cond[name]
