"""From a weights file to a model: whose is it, which sizes, is it whole; then tensor
by tensor out of the memory map.

Official names, ComfyUI's and diffusers' are accepted, with the prefixes that
all-in-one files and wrappers add.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hvtrain.errors import CheckpointError
from hvtrain.models import all_specs, find
from hvtrain.models.dit import DiT
from hvtrain.models.foreign import looks_like
from hvtrain.models.identify import ARCH_KEY, arch_of, flavor_of
from hvtrain.models.spec import Flavor, ModelSpec
from hvtrain.weights.containers import Weights, fingerprint, open_weights
from hvtrain.weights.keymap import Fused
from hvtrain.weights.source import SCALES, Edit, Source, Spread, check, shapes_of
from hvtrain.weights.stream import open_writer
from shards.tensors import Extent

PREFIXES = ("model.diffusion_model.", "model.model.", "diffusion_model.", "transformer.", "module.", "model.")
MODEL_KEY, FLAVOR_KEY = "hvtrain.model", "hvtrain.flavor"
_MARKERS = ("scaled_fp8",)
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class Identified(Source):
    """What a file holds, told from names and shapes alone; its tensors under
    official names, prefix stripped."""

    spec: ModelSpec
    arch: Any
    flavor: Flavor
    prefix: str
    dialect: str


@dataclass(frozen=True)
class LoadedDit:
    model: DiT
    spec: ModelSpec
    arch: Any
    flavor: Flavor
    fingerprint: str
    metadata: Mapping[str, str]


def identify(path: str | Path, *, model: str | None = None, flavor: str | None = None) -> Identified:
    """Read the header only. `model` and `flavor` are what the user says; a file
    that contradicts is refused."""
    path = Path(path)
    whole = open_weights(path)
    prefix, weights = strip_prefix(whole)
    weights = _with_scales(weights)
    specs = [find(model)] if model is not None else list(all_specs())
    for spec in specs:
        dialect, sources = _dialect_of(spec, weights)
        shapes = Source(weights, sources).shapes
        if not spec.signature(shapes):
            continue
        if (stated := weights.metadata.get(MODEL_KEY, spec.name)) != spec.name:
            raise CheckpointError(
                f"{path}: its metadata says that it is '{stated}', its tensors are {spec.name}'s"
            )
        try:
            arch = arch_of(spec, shapes, weights.metadata)
            likely = spec.told_by(path) if spec.told_by else None
            chosen = flavor_of(spec, arch, flavor, hint=weights.metadata.get(FLAVOR_KEY), likely=likely)
            if flavor and likely and spec.flavor(likely).tasks[0] != chosen.tasks[0]:
                raise CheckpointError(
                    f"its name or config says '{likely}', which does another task than flavor '{flavor}'"
                )
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        _refuse_integers(weights, sources)
        return Identified(weights, sources, spec, chosen.arch, chosen, prefix, dialect)
    names = " or ".join(spec.name for spec in specs)
    raise CheckpointError(f"{path}: not a DiT of {names}; {_resembles(whole.shapes, weights.shapes)}")


def load_dit(
    path: str | Path, *, model: str | None = None, flavor: str | None = None,
    dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu", quantize_to: str = "none",
    edit: Edit | None = None, spread: Spread | None = None,
) -> LoadedDit:
    """The model in a file. Peak host memory: one copy in `dtype`, or in float8 with
    `quantize_to` (fp8, fp8_scaled).

    `edit` changes a layer's weight before it is quantised: how LoRAs are merged into what is
    loaded. `spread`: Source.fill.
    """
    return load_found(
        identify(path, model=model, flavor=flavor), dtype=dtype, device=device, quantize_to=quantize_to,
        edit=edit, spread=spread,
    )


def load_found(
    found: Identified, *, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu",
    quantize_to: str = "none", edit: Edit | None = None, spread: Spread | None = None,
) -> LoadedDit:
    """The same, of a file whose header was read already."""
    empty = whole_model(found)
    eight_bit = set(found.spec.lora_targets(empty)) if quantize_to != "none" else set()
    found.fill(
        empty, dtype=dtype, device=device, eight_bit=eight_bit, how=quantize_to, edit=edit, spread=spread
    )
    return LoadedDit(
        empty, found.spec, found.arch, found.flavor, fingerprint(found.weights), found.weights.metadata
    )


def float8_shapes(found: Identified, quantize_to: str) -> set[tuple[int, int]]:
    """[out, in] of the layers that `load_found` makes float8 and that float8 products could take."""
    if quantize_to == "none":
        return set()
    names = [f"{name}.weight" for name in found.spec.lora_targets(whole_model(found))]
    shapes = found.shapes
    return {(shapes[n][0], shapes[n][1]) for n in names if found.takes_product(n, quantize_to)}


def whole_model(found: Identified) -> DiT:
    """The file's model on the meta device, after its tensors were compared with what the file has."""
    with torch.device("meta"):
        empty = found.spec.build(found.arch)
    check(found.path, shapes_of(empty), found.shapes)
    return empty


def save_dit(
    model: DiT, path: str | Path, *, spec: ModelSpec, flavor: Flavor, dtype: torch.dtype | None = None,
    extra: Mapping[str, str] | None = None, value: Callable[[str], Tensor] | None = None,
) -> None:
    """Official names, with the architecture in the metadata, so that the file alone is enough. Atomic.

    `value`: gives a tensor of a model on the meta device when it is written."""
    state = model.state_dict()
    slots = [Extent(name, dtype or t.dtype, tuple(t.shape)) for name, t in state.items()]
    metadata = {
        MODEL_KEY: spec.name, ARCH_KEY: json.dumps(asdict(model.arch)), FLAVOR_KEY: flavor.name,
        "format": "pt", **(extra or {}),
    }
    with open_writer(path, slots, metadata=metadata) as writer:
        for name in writer.waiting:
            tensor = state[name] if value is None else value(name)
            writer.write(name, tensor.detach().to("cpu", dtype or state[name].dtype))


def strip_prefix(weights: Weights) -> tuple[str, Weights]:
    """The file's tensors without the prefix that the DiT's share; other parts of an
    all-in-one file are left out."""
    for prefix in PREFIXES:
        names = {name: name[len(prefix) :] for name in weights if name.startswith(prefix)}
        # "model." and the like are also beginnings of other programs' own names: then all must have it.
        if names and (prefix == PREFIXES[0] or len(names) == len(weights)):
            return prefix, weights.renamed(names)
    return "", weights


def _with_scales(weights: Weights) -> Weights:
    """The official float8 file keeps its scales in another one, X_map.pt: module name -> factor."""
    if (
        not any(f.suffix == ".pt" for f in weights.files)
        or not any(e.dtype in _FLOAT8 for e in weights.entries.values())
    ):
        return weights
    scales = weights.files[0].with_name(weights.files[0].stem + "_map.pt")
    if not scales.is_file():
        raise CheckpointError(
            f"{weights.path}: float8 weights without their scales: put {scales.name} beside it"
        )
    table = {
        f"{name.removesuffix('.weight')}.{SCALES[0]}": e for name, e in open_weights(scales).entries.items()
    }
    return replace(weights, entries={**weights.entries, **table})


def _refuse_integers(weights: Weights, sources: Mapping[str, Fused]) -> None:
    """Casting quantised integers to floats would load without a complaint, and be noise."""
    for name in (part for source in sources.values() for part in source.parts):
        if not weights.dtype(name).is_floating_point:
            kind = str(weights.dtype(name)).removeprefix("torch.")
            raise CheckpointError(
                f"{weights.path}: '{name}' is {kind}: quantised weights are not supported, but float8"
            )


def _dialect_of(spec: ModelSpec, weights: Weights) -> tuple[str, dict[str, Fused]]:
    """The dialect whose rules apply to most names; official names need none. Dialects share some names."""
    names = [n for n in weights if not _is_extra(n)]
    read = {dialect: keys.read(names) for dialect, keys in spec.key_maps.items()}
    best = max(read, key=lambda d: sum(source.parts != (name,) for name, source in read[d].items()))
    return best, read[best]


def _is_extra(name: str) -> bool:
    return name.endswith((*(f".{ending}" for ending in SCALES), ".scale_input")) or name in _MARKERS


def _resembles(*candidates: Mapping[str, tuple[int, ...]]) -> str:
    for shapes in candidates:
        if label := looks_like(shapes):
            return f"it looks like {label}"
    first = next(iter(candidates[0]), "nothing")
    return f"its {len(candidates[0])} tensors, first '{first}', are none that hvtrain knows"
