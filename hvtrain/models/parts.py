"""The parts of a model beside its DiT, opened as a config says."""

from __future__ import annotations

import torch

from hvtrain.config.model import ModelConfig, asset
from hvtrain.models.spec import Enlarger, Flavor, ModelSpec, PictureEncoder, TextEncoders, Vae

Device = torch.device | str


def open_vae(spec: ModelSpec, model: ModelConfig, device: Device) -> Vae:
    """On the meta device without values, as everything here."""
    dtype = getattr(torch, model.vae_dtype)
    return spec.open_vae(asset(str(model.vae)), dtype=dtype, device=device, tiling=model.vae_tiling)


def open_text(spec: ModelSpec, model: ModelConfig, device: Device, flavor: Flavor) -> TextEncoders:
    dtype, sees = getattr(torch, model.dtype), _sees(flavor)
    return spec.open_text(model.files, dtype=dtype, device=device, fp8=model.fp8_text, **sees)


def open_column(spec: ModelSpec, model: ModelConfig, name: str, device: Device) -> PictureEncoder:
    """Of a column of the model's own."""
    column = spec.column(name)
    assert column is not None, name
    return column.open(model.files, dtype=getattr(torch, model.dtype), device=device)


def text_fingerprints(spec: ModelSpec, model: ModelConfig, flavor: Flavor | None) -> tuple[str, ...]:
    """What the text encoders' fingerprint may be; empty where not all of their files are given."""
    needed = [name for name, part in spec.parts.items() if "text" in part.makes and not part.optional]
    return (
        spec.text_fingerprints(model.files, **_sees(flavor))
        if all(name in model.parts for name in needed) else ()
    )


def _sees(flavor: Flavor | None) -> dict[str, int]:
    return {"sees": flavor.sees} if flavor and flavor.sees else {}


def open_enlarger(spec: ModelSpec, model: ModelConfig, device: Device, flavor: Flavor) -> Enlarger:
    assert spec.open_enlarger is not None, spec.name
    return spec.open_enlarger(model.files, flavor, device=device)


def keys_of(spec: ModelSpec, column: str) -> str:
    """The config's keys whose files make a column, as text."""
    names = [name for name, part in spec.parts.items() if column in part.makes and not part.optional]
    return " and ".join(f"model.{name}" for name in names)


def files_of(spec: ModelSpec, model: ModelConfig, column: str) -> list[str | None]:
    """Those files, optional ones too; None where one is not given."""
    found = [model.file(name) for name, part in spec.parts.items() if column in part.makes]
    return [path and asset(path) for path in found]
