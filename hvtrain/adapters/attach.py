"""Adapters and a whole model: put on its layers, started from a file, merged into its weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn
from torch.nn import functional as F

from hvtrain.adapters.layer import AdaptedLinear, Delta, DropoutKey, How
from hvtrain.adapters.lokr import LokrLinear
from hvtrain.adapters.lora import STARTS, LoraLinear
from hvtrain.adapters.table import kind_of
from hvtrain.config import AdapterConfig
from hvtrain.errors import CheckpointError, ConfigError, suggest
from hvtrain.lorafiles.files import LoraFile, read_lora
from hvtrain.lorafiles.lowrank import shrink
from hvtrain.lorafiles.pairs import LoraPair, add_pairs
from hvtrain.models.dit import DiT
from hvtrain.models.spec import ModelSpec
from hvtrain.slices.plan import SlicePlan
from hvtrain.weights.float8 import Fp8Linear

T = TypeVar("T")

def add_adapter(model: DiT, spec: ModelSpec, a: AdapterConfig, plan: SlicePlan | None, *, seed: int) -> None:
    """Freeze the model and put the config's adapter on it; `plan`: of the slices that it is one of."""
    if plan is None:
        rows, targets = None, spec.lora_targets(model, include=a.include, exclude=a.exclude)
    else:
        slots = plan.slice(a.loraid or 0).slots
        rows, targets = {s.module: (s.begin, s.end) for s in slots}, [s.module for s in slots]
    shapes, kind = linear_shapes(model), kind_of(a.type, a.slice_type)
    inject(
        model, targets, kind=kind, rank=a.rank, alpha=a.alpha, dropout=a.dropout, seed=seed, rows=rows,
        how=how_of(a), own=ranks_of(a, targets),
    )
    if a.init_from is not None:
        start_from(model, read_lora(a.init_from, shapes, spec=spec, decomposed=True), balance=a.init_balance)


def how_of(a: AdapterConfig) -> How:
    return How(a.rank_dropout, a.module_dropout, a.scale_weight_norms, a.init, a.factor)


def ranks_of(a: AdapterConfig, targets: Sequence[str]) -> dict[str, tuple[int, float]]:
    """Each layer's rank and alpha: of the first pattern that its name matches, else the common ones; for
    rsLoRA, whose scale is alpha / sqrt(rank), the alpha that is that over the rank. Raises ConfigError for a
    pattern that matches nothing."""
    found = {}
    for name in targets:
        rank = first_match(a.ranks, name, a.rank, key="adapter.ranks")
        alpha = first_match(a.alphas, name, a.alpha, key="adapter.alphas")
        found[name] = (rank, alpha * rank**0.5 if a.rank_stable else alpha)
    check_patterns({"adapter.ranks": a.ranks, "adapter.alphas": a.alphas}, targets)
    return found


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
    how: How | None = None,
    own: Mapping[str, tuple[int, float]] | None = None,
) -> list[str]:
    """Freeze the model and put an adapter on each named Linear; the names of the trainable parameters.

    `alpha` None or 0 means rank, a scale of 1. `rows`: output rows of a layer that may change (default: all).
    `own`: rank and alpha of single layers.
    """
    how = how or How()
    if rank < 1:
        raise ConfigError(f"adapter.rank is {rank}: it must be at least 1")
    if not 0 <= dropout < 1:
        raise ConfigError(f"adapter.dropout is {dropout}: it must be in [0, 1)")
    check_kind(kind, dropout, how)
    if not targets:
        raise ConfigError("the adapter has no target layers: adapter.include / adapter.exclude leave none")
    model.requires_grad_(False)
    for name in targets:
        layer = _submodule(model, name)
        if not isinstance(layer, nn.Linear) or type(layer) not in (nn.Linear, Fp8Linear):
            what = type(layer).__name__
            raise ConfigError(f"adapter target '{name}' is a {what}; adapters go on Linear layers")
        parent, _, leaf = name.rpartition(".")
        n, scale = (own or {}).get(name, (rank, alpha))
        mine = (rows or {}).get(name)
        check_rows(kind, name, mine, layer.out_features)
        adapted = kind(
            layer, name=name, rank=n, alpha=scale or n, dropout=dropout, seed=seed, rows=mine, how=how
        )
        adapted.train(layer.training)
        setattr(model.get_submodule(parent), leaf, adapted)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def check_kind(kind: type[AdaptedLinear], dropout: float, how: How) -> None:
    """What the maths of a kind does not have. Raises ConfigError."""
    if dropout and not kind.DROPS:
        raise ConfigError(f"adapter.dropout is {dropout:g}, but a {kind.LABEL} has no dropout; set it to 0")
    STARTS.find(how.start, key="adapter.init")
    if how.start != "zero" and not issubclass(kind, LoraLinear):
        raise ConfigError(f"adapter.init is {how.start}, but a {kind.LABEL} has its own start; use zero")
    if how.start == "pissa" and how.max_norm:
        raise ConfigError(
            "adapter.init pissa starts with a large part of the weight: scale_weight_norms would cut it; use "
            "0"
        )
    for key, value, none in (("scale_weight_norms", how.max_norm, 0), ("init", how.start, "zero")):
        reason = kind.WITHOUT.get({"scale_weight_norms": "max_norm", "init": "start"}[key])
        if value != none and reason:
            raise ConfigError(f"adapter.{key} is {value}, but of a {kind.LABEL} {reason}; use {none}")
    if how.factor != -1 and kind is not LokrLinear:
        raise ConfigError(
            f"adapter.factor is {how.factor}, but it is a LoKr's, and this is a {kind.LABEL}; use -1"
        )


def check_rows(kind: type[AdaptedLinear], name: str, rows: tuple[int, int] | None, n_out: int) -> None:
    if rows not in (None, (0, n_out)) and "rows" in kind.WITHOUT:
        raise ConfigError(f"'{name}', a slice of some rows, of a {kind.LABEL}: {kind.WITHOUT['rows']}")


def first_match(patterns: Mapping[str, T], name: str, default: T, *, key: str) -> T:
    """The value of the first pattern, a regular expression for the whole name, that matches."""
    try:
        return next((value for pattern, value in patterns.items() if re.fullmatch(pattern, name)), default)
    except re.error as error:
        raise ConfigError(f"{key}: no regular expression: {error}") from None


def trained(names: Sequence[str], *, train: Sequence[str], freeze: Sequence[str]) -> list[str]:
    """The parameters of a full fine-tune. Raises ConfigError for patterns that
    match nothing, or leave nothing."""
    check_patterns({"adapter.train": train, "adapter.freeze": freeze}, names)
    wanted, not_these = dict.fromkeys(train, True) or {".*": True}, dict.fromkeys(freeze, True)
    chosen = [
        name for name in names
        if first_match(wanted, name, False, key="adapter.train")
        and not first_match(not_these, name, False, key="adapter.freeze")
    ]  # fmt: skip
    if not chosen:
        raise ConfigError(
            f"adapter.train {list(train)} and adapter.freeze {list(freeze)} leave nothing to train"
        )
    return chosen


def check_patterns(tables: Mapping[str, Iterable[str]], names: Sequence[str]) -> None:
    for key, patterns in tables.items():
        for pattern in patterns:
            if not any(first_match({pattern: True}, name, False, key=key) for name in names):
                raise ConfigError(
                    f"{key}: '{pattern}' matches nothing that is trained; an example of a name: {names[0]}"
                )


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        choices = [other for other, module in model.named_modules() if type(module) is nn.Linear]
        raise ConfigError(f"the model has no layer '{name}': {suggest(name, choices)}") from None


def adapted_layers(model: nn.Module) -> Iterator[AdaptedLinear]:
    return (module for module in model.modules() if isinstance(module, AdaptedLinear))


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """The model as it was before they were attached, for a while."""
    layers = list(adapted_layers(model))
    for layer in layers:
        layer.off = True
    try:
        yield
    finally:
        for layer in layers:
            layer.off = False


def seed_dropout(model: nn.Module, seed: int, *, step: int = 0, micro: int = 0, dp_rank: int = 0) -> None:
    """Say where in the run the next forward is: call before each training forward of a model with dropout."""
    key = DropoutKey(seed, step, micro, dp_rank)
    for layer in adapted_layers(model):
        layer.dropout_key = key


@torch.no_grad()
def start_from(model: nn.Module, lora: LoraFile, *, balance: bool = False) -> None:
    """Copy a file into freshly injected adapters, to train it further; a different alpha is folded in.
    `balance`: a LoRA as the singular vectors of what it adds, both factors of one size, at the run's ranks
    where these are enough: what a merge leaves trains on as something that was trained would. Raises
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
        if (
            delta.kind is not type(layer)
            and not (balance and type(layer) is LoraLinear and pair.magnitude is None)
        ):
            raise CheckpointError(
                f"{lora.path}: '{name}' is a {delta.kind.LABEL}, this run trains a {layer.LABEL}: "
                f"set adapter.type, or give the file of a {layer.LABEL}"
            )
        pair.check_shape(lora.path, name, (layer.out_features, layer.in_features))
        begin, end = layer.rows
        if (begin, end) != (0, layer.out_features) and (pair.up[:begin].any() or pair.up[end:].any()):
            raise CheckpointError(
                f"{lora.path}: '{name}' changes rows outside {begin} to {end}, which belong to another slice"
            )
        _fill(layer, _balanced(delta, layer, lora.path) if balance else delta, lora.path)


def _balanced(delta: Delta, layer: AdaptedLinear, path: Path) -> Delta:
    """Of the layer's rank. Raises CheckpointError where that would lose something."""
    if type(layer) is not LoraLinear:
        raise ConfigError(
            f"adapter.init_balance: the factors of a {layer.LABEL} are not unique; leave it away"
        )
    cut = shrink([(delta.pair(), 1.0)], rank=layer.rank)
    if cut.error > 1e-3:  # less is rounding
        raise CheckpointError(
            f"{path}: '{layer.name}' at rank {layer.rank} would lose {100 * cut.error:.3g} % of what it "
            "adds: give a higher adapter.rank, or cut it first with `hvtrain lora resize`"
        )
    missing = layer.rank - cut.pair.rank  # of a small layer there are not so many directions
    down, up = F.pad(cut.pair.down, (0, 0, 0, missing)), F.pad(cut.pair.up, (0, missing))
    own = layer.parts["down"]
    live = down.norm(dim=1) > 1e-6 * down.norm(dim=1).max().clamp(min=1e-30)
    # what the file leaves unused starts as in a new LoRA, up zero
    down = torch.where(live[:, None], down, own.to(down))
    up = torch.where(live[None, :], up, 0.0)
    return Delta(LoraLinear, {"down": down, "up": up}, float(layer.rank))


def _fill(layer: AdaptedLinear, delta: Delta, path: Path) -> None:
    own, (begin, end) = layer.parts, layer.rows
    if delta.rank != layer.kind_rank:
        raise CheckpointError(
            f"{path}: '{layer.name}' has rank {delta.rank}, this run trains rank {layer.rank}: "
            f"set adapter.rank={delta.rank} (or adapter.init_balance=true, of a LoRA)"
        )
    for part, parameter in own.items():
        value = delta.parts.get(part, torch.empty(0)).float()
        value = value.flatten() if parameter.ndim == 1 else value
        value = value[begin:end] if part in layer.ROWS else value
        if value.shape != parameter.shape:
            raise CheckpointError(
                f"{path}: '{layer.name}' has {part} of shape {list(value.shape)}, this run's is "
                f"{list(parameter.shape)}: set adapter.rank and adapter.factor as they were"
            )
        if part == layer.ROWS[-1]:
            value = value * (delta.scale / layer.scale_of(own, layer.alpha))
        parameter.copy_(value)


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
    """Adapter parameters as an ordinary file holds them, with each layer's alpha: a slice's with zeros
    in the rows that are not its."""
    found: dict[str, torch.Tensor] = {}
    for own in adapted_layers(model):
        names = {part: f"{own.name}.{name}" for part, name in own.PARTS.items()}
        held = own.exported({part: tensors[name].detach() for part, name in names.items() if name in tensors})
        found |= {names[part]: tensor for part, tensor in held.items()}
        if held:
            found[f"{own.name}.alpha"] = torch.tensor(float(own.file_alpha))
    return found


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """[out, in] of every Linear of a model, by name: what `read_lora` needs to know of it."""
    adapted = {id(layer) for own in adapted_layers(model) for layer in own.children()}
    return {
        name: (layer.out_features, layer.in_features)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and id(layer) not in adapted
    }
