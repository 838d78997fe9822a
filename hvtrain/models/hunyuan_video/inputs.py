"""What goes into HunyuanVideo's transformer for each task; training and generation both come here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from hvtrain.errors import DataError
from hvtrain.models.dit import ModelInput
from hvtrain.models.spec import Vae
from hvtrain.registry import Registry

IMAGE_SHARE = 0.001  # of the noise that an image-to-video sampling begins with


@dataclass(frozen=True)
class HunyuanInput(ModelInput):
    """cond: "text" [B L E], with an image's tokens before the prompt's where the LLM saw one, "pooled" [B P],
    and "guidance" [B] (times 1000) where it is embedded; t: 0..1000."""

    token_replace: bool = False  # the first latent frame is clean: its tokens take the modulation of t = 0


TASKS: Registry[Callable[[HunyuanInput, Tensor | None], HunyuanInput]] = Registry("task")


def make_input(
    x_sigma: Tensor, sigma: Tensor, cond: Mapping[str, Tensor], *, task: str, guidance: float | None,
    x0: Tensor | None = None,
) -> HunyuanInput:
    """x_sigma [B C T H W] noised latents, sigma [B], cond a batch's conditions; guidance is the embedded
    scale, if any. x0: the clean latents, whose first frame is the image where the conditions hold none."""
    add_condition = TASKS.find(task, key="task")
    words = "seen_text" if "seen_text" in cond else "text"
    told = {} if guidance is None else {"guidance": embedded_guidance(guidance, sigma)}
    plain = HunyuanInput(
        x=x_sigma,
        t=1000.0 * sigma.float(),
        cond={"text": cond[words], "pooled": cond["pooled"], **told},
        lengths={"text": tuple(cond[f"{words}_len"].tolist())},
    )
    image = cond.get("image_latents", x0)
    return add_condition(plain, image)


def embedded_guidance(scale: float, sigma: Tensor) -> Tensor:
    """[B] fp32. Officially scaled by 1000 in bfloat16: 6 becomes 6016, and the
    weights have never seen 6000."""
    value = torch.full_like(sigma, scale, dtype=torch.bfloat16) * 1000.0
    return value.float()


@TASKS.add("t2v")
def _text_to_video(inp: HunyuanInput, image: Tensor | None) -> HunyuanInput:
    return inp


@TASKS.add("i2v")
@TASKS.add("i2v-dynamic")
def _token_replace(inp: HunyuanInput, image: Tensor | None) -> HunyuanInput:
    """Latent frame 0 is the given image, clean at every step; the loss leaves it out."""
    first = _image_latents(image, inp.x)
    mask = torch.ones(inp.x.shape[0], 1, inp.x.shape[2], 1, 1, device=inp.x.device)
    mask[:, :, 0] = 0.0
    x = torch.cat([first, inp.x[:, :, 1:]], dim=2)
    return replace(inp, x=x, loss_mask=mask, token_replace=True)


@TASKS.add("i2v-concat")
def _channel_concat(inp: HunyuanInput, image: Tensor | None) -> HunyuanInput:
    """The image's latents in frame 0 of as many extra channels, zeros in the
    other frames, no mask channel."""
    return replace(inp, x=torch.cat([inp.x, _first_frame(image, inp.x)], dim=1))


@TASKS.add("i2v-mask")
def _channel_concat_with_mask(inp: HunyuanInput, image: Tensor | None) -> HunyuanInput:
    """The same, then a channel that is 1 in frame 0."""
    mask = torch.zeros_like(inp.x[:, :1])
    mask[:, :, 0] = 1.0
    return replace(inp, x=torch.cat([inp.x, _first_frame(image, inp.x), mask], dim=1))


def _first_frame(image: Tensor | None, x: Tensor) -> Tensor:
    """[B C T H W], zeros but for frame 0."""
    return F.pad(_image_latents(image, x), (0, 0, 0, 0, 0, x.shape[2] - 1))


def _image_latents(image: Tensor | None, x: Tensor) -> Tensor:
    """[B C 1 H W]: the first frame of the image's latents, or of the clip's own."""
    if image is None:
        raise DataError(
            "image to video needs the condition 'image_latents', which these samples lack; encode them anew"
        )
    first = image[:, :, :1].to(x)
    if first.shape[1] != x.shape[1] or first.shape[3:] != x.shape[3:]:
        raise DataError(
            f"image_latents of shape {tuple(image.shape)} do not fit latents of shape {tuple(x.shape)}"
        )
    return first


def image_conditions(
    vae: Vae, encoders: Mapping[str, object], image: Tensor, shape: Sequence[int]
) -> dict[str, Tensor]:
    """image [3 H W] -> "image_latents" [C 1 h w]: the posterior's mode of it as a clip of one frame."""
    return {"image_latents": vae.encode(image[None, :, None])[0]}


def start(noise: Tensor, cond: Mapping[str, Tensor], *, task: str, x0: Tensor | None = None) -> Tensor:
    """Where sampling begins [B C T H W]: every frame holds a trace of the image, as in the
    official sampler ("stability mode") and in diffusers; it keeps the video steady. Not in its
    dynamic mode, and not in SkyReels'."""
    if task not in ("i2v", "i2v-mask"):
        return noise
    return (1 - IMAGE_SHARE) * noise + IMAGE_SHARE * _image_latents(cond.get("image_latents", x0), noise)
