"""The columns of a set, one entry each: what of a sample it is made of, what makes it,
and what is said of it beside."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from hvtrain.config import ModelConfig
from hvtrain.config.parts import MASK
from hvtrain.encode.encoders import Encode, Fields, Latents, Looks, Masks, PixelEncoder, TextEncoder
from hvtrain.encode.samples import Picture, PlannedChunk, PlannedSample, hashed
from hvtrain.errors import ConfigError, DataError
from hvtrain.models.parts import keys_of, open_column, open_text, open_vae
from hvtrain.models.spec import Field, Flavor, ModelSpec

Pictures = Callable[[PlannedSample], tuple[Picture, ...]]


@dataclass(frozen=True)
class Tools:
    """What columns are encoded with, and how their tensors are stored."""

    spec: ModelSpec
    flavor: Flavor
    model: ModelConfig
    device: torch.device
    dtype: str
    seed: int
    batch_size: int
    workers: int


@dataclass(frozen=True)
class Encoder:
    """Of a column, opened."""

    encode: Encode
    fingerprint: str
    # of captions: the fields of the empty one, or why there are none
    empty: Callable[[], Fields | str] | None = None


@dataclass(frozen=True)
class ColumnKind:
    """An entry."""

    name: str
    fields: tuple[Field, ...]  # what is in it, the flavor's own first
    pictures: Pictures | None  # that it is made of; None: of the captions
    says: Callable[[PlannedSample], dict[str, Any]]  # in KEY.json
    settings: Callable[[Tools], tuple]  # what its tensors depend on besides the encoder's files
    open: Callable[[ColumnKind, Tools], Encoder]
    given: tuple[int, ...] = ()  # latents of a clip of the sample's length that is grey but for these frames
    seen: Pictures | None = None  # beside captions

    def digest(self, s: PlannedSample, encoder: str) -> str:
        """What the tensors of a sample are a function of."""
        pictures = self.pictures or self.seen
        sources = [
            *(s.captions if self.pictures is None else ()),
            *(p.identity for p in (pictures(s) if pictures else ()))
        ]
        return hashed(*sources, *([f"{len(s.clip.frames)} frames"] if self.given else []), encoder)

    def tar_name(self, chunk: PlannedChunk, encoder: str) -> str:
        """A function of the contents: a tar that exists under its name is the right one."""
        parts = [part for s in chunk.samples for part in (s.key, self.digest(s, encoder))]
        return f"{self.name}/{chunk.bucket}-{hashed(*parts)[:16]}.tar"


def columns_of(spec: ModelSpec) -> list[str]:
    """In the order of the model's parts; text last: what cannot be decoded is known
    before captions are encoded."""
    made = list(dict.fromkeys(column for part in spec.parts.values() for column in part.makes))
    return sorted([*made, MASK], key=lambda column: column == "text")


def kind_of(name: str, spec: ModelSpec, flavor: Flavor) -> ColumnKind:
    """The column as this flavor takes it; where it does not, as the others do. Raises ConfigError for none of
    the model's, and for one that they take differently."""
    if name not in (legal := columns_of(spec)):
        raise ConfigError(f"columns: no column '{name}'; choose from {', '.join(legal)}")
    taker = _taker(name, spec, flavor)
    every = [f for one in (taker, *spec.flavors.values()) for f in one.cond if f.column == name]
    fields = tuple({f.name: next(g for g in every if g.name == f.name) for f in every}.values())

    def given(s: PlannedSample) -> tuple[Picture, ...]:
        return (s.image or replace(s.clip, frames=tuple(s.clip.frames[i] for i in taker.given)),)

    if name == "text":
        seen = given if flavor.sees else None
        return ColumnKind(name, fields, None, _captions, _text_settings, _open_text, seen=seen)
    if name == MASK:
        cells = (Field(MASK, (1, None, None, None), torch.bfloat16, MASK),)
        return ColumnKind(
            MASK, cells, lambda s: (s.mask,) if s.mask else (), _masked, _mask_settings, _open_masks
        )
    if spec.column(name) is not None:
        return ColumnKind(name, fields, given, _window, _look_settings, _open_own)
    if not fields:  # no condition
        own = "latents" if name == "latents" else f"{name}_latents"
        fields = (Field(own, (flavor.latent.channels, None, None, None), torch.bfloat16, name),)
    pictures, says = _LATENTS.get(name, (given, _window))
    whole = taker.given if pictures is given and fields[0].dims[1] is None else ()
    return ColumnKind(name, fields, pictures, says, _latent_settings, _open_latents, whole)


def _taker(name: str, spec: ModelSpec, flavor: Flavor) -> Flavor:
    """Whose column this is."""
    takers = [f for f in spec.flavors.values() if any(c.column == name for c in f.cond)]
    if flavor in takers or not takers or name == "text":
        return flavor
    if len(
        {
            (f.given, *((c.name, *(d is None for d in c.dims)) for c in f.cond if c.column == name))
            for f in takers
        }
    ) > 1:
        names = ", ".join(f.name for f in takers)
        raise ConfigError(
            f"columns: '{name}' is not the same for all of {names}; say whose it is: model.flavor=..."
        )
    return takers[0]


def check_images(samples: Sequence[PlannedSample], flavor: Flavor, columns: Container[str]) -> None:
    """Of samples that come with an image nothing is left aside. Raises DataError."""
    first = next((s for s in samples if s.image), None)
    made = [c for c in flavor.columns if c not in ("latents", "text") and c not in columns]
    if first and first.image and made:
        raise DataError(
            f"{first.clip.path}: comes with {first.image.path}, of which column '{made[0]}' is made: encode "
            f"it too, columns=[..., {made[0]}]"
        )


# --- what of a sample ---------------------------------------------------------------------------------------


def _window(s: PlannedSample) -> dict[str, Any]:
    frames, (width, height) = s.clip.frames, s.clip.size
    image = {"image": str(s.image.path)} if s.image else {}
    return {
        "source": str(s.clip.path), **image, "frames": [frames[0], frames[-1], len(frames)], "width": width,
        "height": height, "bucket": s.bucket,
    }


def _captions(s: PlannedSample) -> dict[str, Any]:
    return {"caption": s.captions[0], **({"captions": list(s.captions)} if len(s.captions) > 1 else {})}


def _masked(s: PlannedSample) -> dict[str, Any]:
    return {"mask": str(s.mask.path)} if s.mask else {}


# Columns of latents that are not of the frames that a flavor is given.
_LATENTS: dict[str, tuple[Pictures, Callable[[PlannedSample], dict[str, Any]]]] = {
    "latents": (lambda s: (s.clip,), _window),
    "control": (lambda s: s.controls, lambda s: {"control": [str(c.path) for c in s.controls]}),
}


# --- what makes it ------------------------------------------------------------------------------------------


def _latent_settings(t: Tools) -> tuple:
    return t.model.vae_dtype, t.model.vae_tiling, t.dtype, t.seed


def _open_latents(kind: ColumnKind, t: Tools) -> Encoder:
    vae, latent = open_vae(t.spec, t.model, t.device), t.flavor.latent
    if vae.stride != (stride := (latent.stride_t, latent.stride_h, latent.stride_w)):
        own, wanted = (" x ".join(map(str, s)) for s in (vae.stride, stride))
        raise ConfigError(
            f"model.vae compresses {own}, flavor '{t.flavor.name}' takes {wanted}; give that flavor's VAE, "
            "or another model.flavor"
        )
    make = Latents(vae, kind.fields[0].name, getattr(torch, t.dtype), t.seed, kind.given)
    return Encoder(_pixels(kind, make, t), f"{vae.fingerprint}/{t.dtype}/{t.seed}")


def _mask_settings(t: Tools) -> tuple:
    latent = t.flavor.latent
    return latent.stride_t, latent.stride_h, latent.stride_w


def _open_masks(kind: ColumnKind, t: Tools) -> Encoder:
    strides = _mask_settings(t)
    return Encoder(_pixels(kind, Masks(*strides), t), f"{MASK}-{'x'.join(map(str, strides))}")


def _look_settings(t: Tools) -> tuple:
    return t.model.dtype, t.dtype


def _open_own(kind: ColumnKind, t: Tools) -> Encoder:
    """A column of the model's own."""
    eye = open_column(t.spec, t.model, kind.name, t.device)
    make = Looks(eye, t.device, getattr(torch, t.dtype), keys_of(t.spec, kind.name))
    return Encoder(_pixels(kind, make, t), f"{eye.fingerprint}/{t.dtype}")


def _pixels(kind: ColumnKind, make: Latents | Looks | Masks, t: Tools) -> PixelEncoder:
    assert kind.pictures is not None
    return PixelEncoder(kind.pictures, make, t.batch_size, t.workers)


def _text_settings(t: Tools) -> tuple:
    return t.model.fp8_text, t.model.dtype, t.dtype, *([t.flavor.sees] if t.flavor.sees else [])


def _open_text(kind: ColumnKind, t: Tools) -> Encoder:
    text = open_text(t.spec, t.model, t.device, t.flavor)
    encode = TextEncoder(text, getattr(torch, t.dtype), kind.seen, t.workers)
    return Encoder(encode, f"{text.fingerprint}/{t.dtype}", lambda: encode.stored(text.encode([""])[0], ""))
