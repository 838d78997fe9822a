"""Low-rank adapters on the Linear layers of a model: W x becomes W x + (alpha / rank) * up(down(x)).

`inject` swaps the layers in place and keeps their parameters' names, so the base checkpoint still loads by its own
names beside the adapter's (`X.lora_down.weight`, `X.lora_up.weight`). arXiv 2106.09685; initialisation and scaling
as in sd-scripts and musubi-tuner, whose files these become.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from hvtrain.errors import CheckpointError, ConfigError, suggest
from hvtrain.lorafiles.files import LoraFile
from hvtrain.lorafiles.pairs import LoraPair, add_pairs
from hvtrain.rng import generator
from hvtrain.weights.float8 import Fp8Linear, linear


@dataclass(frozen=True)
class DropoutKey:
    """Where in the run a forward pass is. Equal on sequence-parallel peers, so that they drop the same."""

    seed: int
    step: int
    micro: int
    dp_rank: int


class LoraLinear(nn.Linear):
    """A frozen Linear and its adapter. The adapter is float32 whatever the base is; autocast casts it per use."""

    def __init__(
        self, base: nn.Linear, *, name: str, rank: int, alpha: float, dropout: float, seed: int,
        rows: tuple[int, int] | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not Linear's own: it would allocate and initialise weights to throw away
        self.in_features, self.out_features = base.in_features, base.out_features
        if isinstance(base, Fp8Linear):
            self.register_buffer("weight", base.weight)
            self.register_buffer("scale_weight", base.scale_weight)
        else:
            self.weight, self.scale_weight = base.weight, None
        self.matmul = getattr(base, "matmul", True)  # of a float8 weight
        self.bias = base.bias
        self.name, self.rank, self.alpha, self.dropout = name, rank, alpha, dropout
        # Only these output rows are adapted: the others have no parameters, so nothing can move them.
        self.rows = rows or (0, self.out_features)
        if not 0 <= self.rows[0] < self.rows[1] <= self.out_features:
            raise ConfigError(f"adapter target '{name}': rows {self.rows} of a layer with {self.out_features}")
        self.multiplier = 1.0
        self.dropout_key: DropoutKey | None = None
        # Made on the CPU by name, not in order: equal on every rank without a broadcast, and a layer's start does
        # not depend on which other layers are trained.
        down = torch.empty(rank, self.in_features)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator(seed, stream=f"lora-init/{name}"))
        device = "cpu" if base.weight.is_meta else base.weight.device
        # Modules, not bare parameters: ZeRO-3 gathers a module's own parameters around its forward.
        self.lora_down = _linear(down, device)
        self.lora_up = _linear(torch.zeros(self.rows[1] - self.rows[0], rank), device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B ... in] -> [B ... out]
        base = linear(x, self.weight, self.bias, self.scale_weight, matmul=self.matmul)
        if self.multiplier == 0.0:
            return base
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.lora_down.weight.dtype)
        inner = self.lora_down(x) * (self.multiplier * self.alpha / self.rank)  # [B ... rank]: far fewer numbers than come out
        if self.training and self.dropout > 0:
            inner = inner * self._kept(inner)
        delta = self.lora_up(inner).to(base.dtype)
        begin, end = self.rows
        if end - begin < self.out_features:
            delta = F.pad(delta, (begin, self.out_features - end))
        return base + delta

    def _kept(self, inner: torch.Tensor) -> torch.Tensor:  # [B ... rank] -> [B 1.. rank]
        """0 or 1 / (1 - p) for each sample and rank component, one draw for all tokens of a sample.

        Not one per token: a token's place in the sequence then never matters, so any split of the sequence over
        ranks, and the recomputation in a checkpointed backward, drop exactly what one plain process drops.
        """
        if self.dropout_key is None:
            raise RuntimeError(f"{self.name}: adapter dropout needs seed_dropout(model, ...) before each forward")
        key = self.dropout_key
        draw = generator(
            key.seed, step=key.step, micro=key.micro, dp_rank=key.dp_rank, stream=f"lora-dropout/{self.name}"
        )
        kept = torch.rand(inner.shape[0], self.rank, generator=draw) >= self.dropout
        mask = (kept / (1 - self.dropout)).to(inner.device, inner.dtype)
        return mask.view(inner.shape[0], *[1] * (inner.ndim - 2), self.rank)


def _linear(weight: torch.Tensor, device: torch.device | str) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.to(device))
    return layer


def inject(
    model: nn.Module,
    targets: Sequence[str],
    *,
    rank: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    seed: int = 0,
    rows: Mapping[str, tuple[int, int]] | None = None,
) -> list[str]:
    """Freeze the model and put an adapter on each named Linear. Returns the names of the trainable parameters.

    `alpha` None or 0 means rank, that is a scale of 1. `rows`: output rows of a layer that may change (default: all).
    """
    if rank < 1:
        raise ConfigError(f"adapter.rank is {rank}: it must be at least 1")
    if not 0 <= dropout < 1:
        raise ConfigError(f"adapter.dropout is {dropout}: it must be in [0, 1)")
    if not targets:
        raise ConfigError("the adapter has no target layers: adapter.include / adapter.exclude leave none")
    model.requires_grad_(False)
    for name in targets:
        layer = _submodule(model, name)
        if not isinstance(layer, nn.Linear) or type(layer) not in (nn.Linear, Fp8Linear):
            raise ConfigError(f"adapter target '{name}' is a {type(layer).__name__}; adapters go on Linear layers")
        parent, _, leaf = name.rpartition(".")
        own = (rows or {}).get(name)
        adapted = LoraLinear(layer, name=name, rank=rank, alpha=alpha or rank, dropout=dropout, seed=seed, rows=own)
        adapted.train(layer.training)
        setattr(model.get_submodule(parent), leaf, adapted)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        choices = [other for other, module in model.named_modules() if type(module) is nn.Linear]
        raise ConfigError(f"the model has no layer '{name}': {suggest(name, choices)}") from None


def adapted_layers(model: nn.Module) -> Iterator[LoraLinear]:
    return (module for module in model.modules() if isinstance(module, LoraLinear))


def seed_dropout(model: nn.Module, seed: int, *, step: int = 0, micro: int = 0, dp_rank: int = 0) -> None:
    """Say where in the run the next forward is: call before each training forward of a model with dropout."""
    key = DropoutKey(seed, step, micro, dp_rank)
    for layer in adapted_layers(model):
        layer.dropout_key = key


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """The base model's behaviour for a while: for "before" pictures and base losses."""
    layers = [(layer, layer.multiplier) for layer in adapted_layers(model)]
    for layer, _ in layers:
        layer.multiplier = 0.0
    try:
        yield
    finally:
        for layer, multiplier in layers:
            layer.multiplier = multiplier


def start_from(model: nn.Module, lora: LoraFile) -> None:
    """Copy a LoRA file into freshly injected adapters, to train it further. A different alpha is folded in."""
    layers = {layer.name: layer for layer in adapted_layers(model)}
    extra = sorted(set(lora.pairs) - set(layers))
    if extra:
        raise CheckpointError(
            f"{lora.path}: adapts {len(extra)} layers that this run does not train, first '{extra[0]}': "
            "widen adapter.include or narrow adapter.exclude"
        )
    for name, pair in lora.pairs.items():
        layer = layers[name]
        if pair.rank != layer.rank:
            raise CheckpointError(
                f"{lora.path}: '{name}' has rank {pair.rank}, this run trains rank {layer.rank}: "
                f"set adapter.rank={pair.rank}"
            )
        pair.check_shape(lora.path, name, (layer.out_features, layer.in_features))
        begin, end = layer.rows
        if pair.up[:begin].any() or pair.up[end:].any():
            raise CheckpointError(
                f"{lora.path}: '{name}' changes rows outside {begin} to {end}, which belong to another slice"
            )
        with torch.no_grad():
            layer.lora_down.weight.copy_(pair.down)
            layer.lora_up.weight.copy_(pair.up[begin:end].float() * (pair.scale / (layer.alpha / layer.rank)))


def merge_into(model: nn.Module, lora: LoraFile, multiplier: float = 1.0) -> None:
    """Add a LoRA to a model's weights, in memory."""
    merge_all(model, [(lora, multiplier)])


@torch.no_grad()
def merge_all(model: nn.Module, loras: Iterable[tuple[LoraFile, float]]) -> None:
    """Add several at once: summed in float32 and rounded once per weight, as `hvtrain merge` does it, bit for bit."""
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
                raise CheckpointError(f"{lora.path}: adapts '{name}', which is no Linear layer: {suggest(name, shapes)}")
            pair.check_shape(lora.path, name, shapes[name])
            if multiplier:
                wanted.setdefault(name, []).append((pair, multiplier))

    def merge(name: str, weight: torch.Tensor | None) -> bool:
        if weight is not None and name in wanted:
            add_pairs(weight, wanted[name])
        return name in wanted

    return merge


def whole_rows(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Adapter parameters as an ordinary LoRA file holds them: `lora_up` of a slice with zeros in the rows it does not own."""
    layers = {f"{layer.name}.lora_up.weight": layer for layer in adapted_layers(model)}
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
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return {
        name: (layer.out_features, layer.in_features)
        for name, layer in layers
        if not name.endswith((".lora_down", ".lora_up"))
    }
