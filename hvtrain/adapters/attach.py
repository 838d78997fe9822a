"""Adapters and a whole model: put on its layers, started from a file, merged into its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from hvtrain.adapters.layer import AdaptedLinear, DropoutKey
from hvtrain.adapters.lora import LoraLinear
from hvtrain.adapters.table import kind_of
from hvtrain.config import AdapterConfig
from hvtrain.errors import CheckpointError, ConfigError, suggest
from hvtrain.lorafiles.files import LoraFile, read_lora
from hvtrain.lorafiles.pairs import LoraPair, add_pairs
from hvtrain.models.dit import DiT
from hvtrain.models.spec import ModelSpec
from hvtrain.slices.plan import SlicePlan
from hvtrain.weights.float8 import Fp8Linear


def add_adapter(model: DiT, spec: ModelSpec, a: AdapterConfig, plan: SlicePlan | None, *, seed: int) -> None:
    """Freeze the model and put the config's adapter on it; `plan`: of the slices that it is one of."""
    if plan is None:
        rows, targets = None, spec.lora_targets(model, include=a.include, exclude=a.exclude)
    else:
        slots = plan.slice(a.loraid or 0).slots
        rows, targets = {s.module: (s.begin, s.end) for s in slots}, [s.module for s in slots]
    shapes, kind = linear_shapes(model), kind_of(a.type)
    inject(model, targets, kind=kind, rank=a.rank, alpha=a.alpha, dropout=a.dropout, seed=seed, rows=rows)
    if a.init_from is not None:
        start_from(model, read_lora(a.init_from, shapes, spec=spec))


def inject(
    model: nn.Module,
    targets: Sequence[str],
    *,
    rank: int,
    kind: type[AdaptedLinear] = LoraLinear,
    alpha: float | None = None,
    dropout: float = 0.0,
    seed: int = 0,
    rows: Mapping[str, tuple[int, int]] | None = None,
) -> list[str]:
    """Freeze the model and put an adapter on each named Linear; the names of the trainable parameters.

    `alpha` None or 0 means rank, a scale of 1. `rows`: output rows of a layer that may change (default: all).
    """
    if rank < 1:
        raise ConfigError(f"adapter.rank is {rank}: it must be at least 1")
    if not 0 <= dropout < 1:
        raise ConfigError(f"adapter.dropout is {dropout}: it must be in [0, 1)")
    check_dropout(kind, dropout)
    if not targets:
        raise ConfigError("the adapter has no target layers: adapter.include / adapter.exclude leave none")
    model.requires_grad_(False)
    for name in targets:
        layer = _submodule(model, name)
        if not isinstance(layer, nn.Linear) or type(layer) not in (nn.Linear, Fp8Linear):
            what = type(layer).__name__
            raise ConfigError(f"adapter target '{name}' is a {what}; adapters go on Linear layers")
        parent, _, leaf = name.rpartition(".")
        own = (rows or {}).get(name)
        adapted = kind(layer, name=name, rank=rank, alpha=alpha or rank, dropout=dropout, seed=seed, rows=own)
        adapted.train(layer.training)
        setattr(model.get_submodule(parent), leaf, adapted)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def check_dropout(kind: type[AdaptedLinear], dropout: float) -> None:
    if dropout and not kind.DROPS:
        raise ConfigError(f"adapter.dropout is {dropout:g}, but a {kind.LABEL} has no dropout; set it to 0")


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        choices = [other for other, module in model.named_modules() if type(module) is nn.Linear]
        raise ConfigError(f"the model has no layer '{name}': {suggest(name, choices)}") from None


def adapted_layers(model: nn.Module) -> Iterator[AdaptedLinear]:
    return (module for module in model.modules() if isinstance(module, AdaptedLinear))


def seed_dropout(model: nn.Module, seed: int, *, step: int = 0, micro: int = 0, dp_rank: int = 0) -> None:
    """Say where in the run the next forward is: call before each training forward of a model with dropout."""
    key = DropoutKey(seed, step, micro, dp_rank)
    for layer in adapted_layers(model):
        layer.dropout_key = key


@torch.no_grad()
def start_from(model: nn.Module, lora: LoraFile) -> None:
    """Copy a file into freshly injected adapters, to train it further; a different alpha is folded in. Raises
    CheckpointError for one that does not fit."""
    layers = {layer.name: layer for layer in adapted_layers(model)}
    extra = sorted(set(lora.pairs) - set(layers))
    if extra:
        raise CheckpointError(
            f"{lora.path}: adapts {len(extra)} layers that this run does not train, first '{extra[0]}': "
            "widen adapter.include or narrow adapter.exclude"
        )
    for name, pair in lora.pairs.items():
        layer, delta = layers[name], lora.delta(name)
        if delta.kind is not type(layer):
            raise CheckpointError(
                f"{lora.path}: '{name}' is a {delta.kind.LABEL}, this run trains a {layer.LABEL}: "
                f"set adapter.type, or give the file of a {layer.LABEL}"
            )
        if delta.rank != layer.rank:
            raise CheckpointError(
                f"{lora.path}: '{name}' has rank {delta.rank}, this run trains rank {layer.rank}: "
                f"set adapter.rank={delta.rank}"
            )
        pair.check_shape(lora.path, name, (layer.out_features, layer.in_features))
        begin, end = layer.rows
        if pair.up[:begin].any() or pair.up[end:].any():
            raise CheckpointError(
                f"{lora.path}: '{name}' changes rows outside {begin} to {end}, which belong to another slice"
            )
        for part, parameter in layer.PARTS.items():
            value = delta.parts[part].float()
            value = value[begin:end] if part in layer.ROWS else value
            if part == layer.ROWS[-1]:
                value = value * (delta.alpha / delta.rank / (layer.alpha / layer.rank))
            layer.get_parameter(parameter).copy_(value)


@torch.no_grad()
def merge_all(model: nn.Module, loras: Iterable[tuple[LoraFile, float]]) -> None:
    """Add several: summed in float32 and rounded once per weight, as `hvtrain merge` does it, bit for bit."""
    merge = merging(linear_shapes(model), loras)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            merge(name, layer.weight.data)


def merging(
    shapes: Mapping[str, tuple[int, int]], loras: Iterable[tuple[LoraFile, float]]
) -> Callable[[str, torch.Tensor | None], bool]:
    """Adds LoRAs to a layer's weight, given its name: for `merge_all`, and for a model that is being loaded.

    Says whether the layer is adapted at all; the weight may be None to only ask.
    """
    wanted: dict[str, list[tuple[LoraPair, float]]] = {}
    for lora, multiplier in loras:
        for name, pair in lora.pairs.items():
            if name not in shapes:
                near = suggest(name, shapes)
                raise CheckpointError(f"{lora.path}: adapts '{name}', which is no Linear layer: {near}")
            pair.check_shape(lora.path, name, shapes[name])
            if multiplier:
                wanted.setdefault(name, []).append((pair, multiplier))

    def merge(name: str, weight: torch.Tensor | None) -> bool:
        if weight is not None and name in wanted:
            add_pairs(weight, wanted[name])
        return name in wanted

    return merge


def whole_rows(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Adapter parameters as an ordinary file holds them: a slice's with zeros in the rows that are not
    its."""
    layers = {f"{own.name}.{own.PARTS[part]}": own for own in adapted_layers(model) for part in own.ROWS}
    found = {}
    for name, tensor in tensors.items():
        layer = layers.get(name)
        if layer is not None and len(tensor) < layer.out_features:
            begin, end = layer.rows
            tensor = F.pad(tensor, (0, 0, begin, layer.out_features - end))
        found[name] = tensor
    return found


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """[out, in] of every Linear of a model, by name: what `read_lora` needs to know of it."""
    adapted = {id(layer) for own in adapted_layers(model) for layer in own.children()}
    return {
        name: (layer.out_features, layer.in_features)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and id(layer) not in adapted
    }
