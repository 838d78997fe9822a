"""What a video is conditioned on: prompts through the text encoders, images through the VAE
and encoders of the model's own.

All encoders live on rank 0 only, one kind at a time, and not for long; the others are sent what they make.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hvtrain.config import ModelConfig
from hvtrain.encode.media import read_frames
from hvtrain.errors import CheckpointError, ConfigError, DataError
from hvtrain.generate.check import on_main
from hvtrain.generate.low import read_low
from hvtrain.generate.requests import Request
from hvtrain.models.conditions import batch_of_one
from hvtrain.models.parts import keys_of, open_column, open_enlarger, open_text, open_vae
from hvtrain.models.spec import Flavor, ModelSpec
from hvtrain.parallel.context import ParallelContext
from hvtrain.rng import generator

Cond = Mapping[str, Tensor]  # a flavor's condition fields, batched


@dataclass(frozen=True)
class Shown:
    """Images at a size: what a video begins with, or also what it ends with; and the
    smaller one that it is made of."""

    images: tuple[str, ...]
    width: int
    height: int
    frames: int
    video: str | None = None
    seed: int = 0  # of what is drawn for it

    @classmethod
    def of(cls, request: Request) -> Shown | None:
        images, video = tuple(request.images.values()), request.video
        size = request.width, request.height, request.frames
        return cls(images, *size, video, request.seed if video else 0) if images or video else None

    @property
    def first(self) -> Tensor:
        return read_image(self.images[0], width=self.width, height=self.height)


@dataclass(frozen=True)
class Said:
    """A text as the encoders read it, and what they see beside it, if they do:
    nothing beside a negative prompt."""

    text: str
    # the number of a request that begins with something else than an image file
    seen: Shown | int | None = None


@dataclass(frozen=True)
class Conditions:
    """Of all requests, each a batch of one on the CPU."""

    flavor: Flavor
    texts: Mapping[Said, Cond]
    images: Mapping[Shown, Cond]

    def of(self, request: Request, number: int | None = None) -> Cond:
        return self._with_image(request, prompt_of(request, self.flavor, number))

    def negative(self, request: Request) -> Cond:
        return self._with_image(request, Said(request.negative_prompt))

    def _with_image(self, request: Request, said: Said) -> Cond:
        shown = Shown.of(request)
        return {**self.texts[said], **(self.images[shown] if shown else {})}


def prompt_of(request: Request, flavor: Flavor, number: int | None = None) -> Said:
    text = flavor.defaults.prompted(request.prompt)
    return Said(text, (number if number is not None else Shown.of(request)) if flavor.sees else None)


def encode_requests(
    requests: Sequence[Request], spec: ModelSpec, flavor: Flavor, model: ModelConfig, ctx: ParallelContext, *,
    pictures: Mapping[int, Tensor] | None = None,
) -> Conditions:
    """`pictures` [3 H W] in [-1, 1]: by number, what requests without an image begin with. Raises
    CheckpointError for encoders of another model, DataError for an image that cannot be read. Collective."""
    given = pictures or {}
    texts = [prompt_of(r, flavor, i if i in given else None) for i, r in enumerate(requests)]
    texts = list(dict.fromkeys([*texts, *(Said(r.negative_prompt) for r in requests if r.guided)]))
    shown = list(dict.fromkeys(one for r in requests if (one := Shown.of(r))))

    def encode() -> list[list[dict[str, Tensor]]]:
        seen = [given[s.seen] if isinstance(s.seen, int) else s.seen.first if s.seen else None for s in texts]
        found = _encode_texts([s.text for s in texts], spec, flavor, model, ctx.device, seen)
        images = _encode_images(shown, spec, flavor, model, ctx.device) if shown else []
        free(ctx.device)
        of_images = [batch_of_one(sample, flavor.cond) for sample in images]
        check_conds(of_images, spec, flavor)
        return [found, of_images]

    of_texts, of_images = on_main(ctx, encode)
    return Conditions(
        flavor, dict(zip(texts, of_texts, strict=True)), dict(zip(shown, of_images, strict=True))
    )


def encode_texts(
    texts: Sequence[str], spec: ModelSpec, flavor: Flavor, model: ModelConfig, ctx: ParallelContext
) -> list[dict[str, Tensor]]:
    """Each text's conditions as a batch of one, on the CPU. Collective."""
    return on_main(ctx, lambda: _encode_texts(texts, spec, flavor, model, ctx.device))


def _encode_texts(
    texts: Sequence[str], spec: ModelSpec, flavor: Flavor, model: ModelConfig, device: torch.device,
    seen: Sequence[Tensor | None] = (),
) -> list[dict[str, Tensor]]:
    """`seen`: beside each text, for encoders that see."""
    found = []
    if texts:
        encoders = open_text(spec, model, device, flavor)
        found = encoders.encode(texts, seen) if flavor.sees else encoders.encode(texts)
        del encoders
    free(device)
    conds = [batch_of_one(sample, flavor.cond) for sample in found]
    check_conds(conds, spec, flavor)
    return conds


def _encode_images(
    wanted: Sequence[Shown], spec: ModelSpec, flavor: Flavor, model: ModelConfig, device: torch.device
) -> list[dict[str, Tensor]]:
    vae = open_vae(spec, model, device)
    seen = any(one.images for one in wanted)
    encoders = (
        {name: open_column(spec, model, name, device) for name in own_columns(spec, flavor)} if seen else {}
    )
    enlarger = open_enlarger(spec, model, device, flavor) if flavor.enlarges else None
    found = []
    for one in wanted:
        shape, made = (
            flavor.latent.shape(frames=one.frames, height=one.height, width=one.width), dict[str, Tensor]()
        )
        if one.images:
            assert spec.image_conditions is not None
            images = torch.stack(
                [read_image(path, width=one.width, height=one.height) for path in one.images]
            ).to(device)
            made |= spec.image_conditions(vae, encoders, images if len(images) > 1 else images[0], shape)
        if one.video is not None and enlarger is not None:
            low = read_low(one.video, flavor, vae, frames=one.frames)
            made |= enlarger(low, shape, generator=generator(one.seed, stream="low"))
        fields = {name: value.cpu() for name, value in made.items()}
        if broken := [
            name for name, value in fields.items() if value.is_floating_point() and not value.isfinite().all()
        ]:
            what = "image" if one.images else "video"
            raise DataError(
                f"{what}: '{broken[0]}' of {(*one.images, one.video)[0]} is not finite; use model.vae_dtype "
                "float32"
            )
        found.append(fields)
    return found


def read_image(path: str, *, width: int, height: int) -> Tensor:
    """[3 H W] in [-1, 1], as people see it: turned as its file says, scaled to cover the size, cropped in the
    middle. As training data is read. Raises DataError."""
    try:
        pixels = read_frames(Path(path), [0], size=(width, height))[0]
    except DataError as error:
        raise DataError(f"image: {str(error).split(';')[0]}; give another picture") from None
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 127.5 - 1


def own_columns(spec: ModelSpec, flavor: Flavor) -> list[str]:
    """Columns with encoders of the model's own that the flavor is conditioned on."""
    return [name for name in flavor.columns if spec.column(name) is not None]


def check_own_columns(spec: ModelSpec, flavor: Flavor, model: ModelConfig) -> dict[str, str]:
    """column -> its encoder's fingerprint, from headers. Raises ConfigError for a file that is
    not given, CheckpointError."""
    if flavor.beyond_text and spec.image_conditions is None:
        raise ConfigError(
            f"model.flavor: '{flavor.name}' also needs {', '.join(flavor.beyond_text)}, which no image gives"
        )
    found = {}
    for name in own_columns(spec, flavor):
        needed = [n for n, part in spec.parts.items() if name in part.makes and not part.optional]
        if missing := [n for n in needed if model.file(n) is None]:
            raise ConfigError(
                f"model.{missing[0]} is not set; '{flavor.name}' needs it ({spec.parts[missing[0]].about})"
            )
        found[name] = open_column(spec, model, name, torch.device("meta")).fingerprint
    return found


def check_conds(conds: Sequence[Cond], spec: ModelSpec, flavor: Flavor) -> None:
    """Encoders of another model make conditions of other widths."""
    for cond in conds:
        for field in flavor.cond:
            if field.name not in cond:
                continue
            found = list(cond[field.name].shape[1:])
            if not field.fits(found):
                raise CheckpointError(
                    f"{keys_of(spec, field.column)}: the encoders make '{field.name}' of shape {found}, "
                    f"{flavor.name} expects {field}: they belong to another model"
                )


def free(device: torch.device) -> None:
    """Give what is no longer used back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
