"""A model's tensors in a file: compared by name and shape before anything is read, then filled in one by one.

Whatever the file calls them and however it stores them: under a prefix, cut and fused in other places, in
float8 with factors beside. Every DiT, VAE and text encoder is loaded this way.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hvtrain.errors import CheckpointError
from hvtrain.weights.containers import Weights, open_weights
from hvtrain.weights.float8 import BLOCK, DTYPE, dequantize, quantize, replace_linear
from hvtrain.weights.keymap import Fused, KeyMap

# the factors of a float8 weight: ComfyUI's and musubi-tuner's word, others'
SCALES = ("scale_weight", "weight_scale")
SHOWN = 3  # differences named in an error
Shapes = Mapping[str, tuple[int, ...]]
# (module, its weight or None) -> whether it changes this layer; with a weight, in place
Edit = Callable[[str, Tensor | None], bool]
Spread = Callable[[Callable[[], tuple]], Sequence[Any]]


@dataclass(frozen=True)
class Source:
    """Where each of a model's tensors comes from."""

    weights: Weights  # under the file's own names
    sources: Mapping[str, Fused]  # the model's own name -> how it is made of these

    @property
    def path(self) -> Path:
        return self.weights.path

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """By the model's own names."""
        shapes = self.weights.shapes
        return {name: source.shape(shapes) for name, source in self.sources.items()}

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one that tells a size. Raises CheckpointError where it is not there."""
        if name not in self.sources:
            raise CheckpointError(f"{self.path}: no '{name}' in it, which tells the size of the model")
        return self.sources[name].shape(self.weights.shapes)

    def read(self, name: str, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """A copy; the pages of the file that it came from are given back."""

        def get(part: str) -> Tensor:
            mapped = self.weights.get(part)
            value = mapped.to(device=device, dtype=dtype, copy=True)
            self.weights.release(mapped)
            scale = self._scale(part)
            return value if scale is None else dequantize(value, scale, dtype)

        return self.sources[name].build(get)

    def fill(
        self, model: nn.Module, *, dtype: torch.dtype, device: torch.device | str = "cpu",
        eight_bit: Collection[str] = (), how: str = "fp8", edit: Edit | None = None,
        spread: Spread | None = None,
    ) -> None:
        """Values for a model on the meta device that `check` has passed. Peak
        host memory: one converted copy.

        The Linear layers named in `eight_bit` become float8, quantised as `how` says (float8.quantize) where
        the file is not float8 itself. `edit` changes a Linear's weight before, given the layer's name, and
        other tensors, given their own. On the meta device only the dtype is set. `spread` gets what reads a
        tensor and gives the tensor, perhaps one that another process has read (parallel/spread.py).
        """
        if torch.device(device).type == "meta":
            nn.Module.to(model, dtype)  # a library's own `to` warns of modules that it does not have
            return
        linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        spread = spread or (lambda make: make())
        state = {}
        for name, wanted in model.state_dict().items():
            module = name.removesuffix(".weight")
            change = edit if module in linear and module != name else None
            if module == name or module not in eight_bit:
                whole = None if edit is None else partial(edit, module if change else name)
                (state[name],) = spread(partial(self._whole, name, wanted.shape, dtype, device, whole))
                continue
            values, scale = spread(partial(self._eight_bit, name, how, dtype, device, change))
            replace_linear(model, module, values, scale)
            state[name] = values
            if scale is not None:
                state[f"{module}.scale_weight"] = scale
        model.load_state_dict(state, assign=True)

    def load(
        self, model: nn.Module, *, what: str, dtype: torch.dtype, device: torch.device | str = "cpu",
        fp8: str | None = None, used: re.Pattern[str] | None = None,
    ) -> None:
        """Compare and fill a frozen encoder; `fp8`: how its Linear layers are quantised. What the
        file holds beside is another part's, except parameters that `used` matches: those are
        refused. Its float8 weights are dequantised: what is encoded does not depend on the machine. Raises
        CheckpointError."""
        wanted = shapes_of(model)
        beside = {n for n in self.sources if used and used.match(n) and n.endswith((".weight", ".bias"))}
        mine = {n: shape for n, shape in self.shapes.items() if n in wanted or n in beside}
        check(self.path, wanted, mine, what=f"not {what}", hint="", ones=True)
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        self.fill(model, dtype=dtype, device=device, eight_bit=linear if fp8 else (), how=fp8 or "")
        model.eval().requires_grad_(False)

    def _whole(
        self, name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device | str,
        edit: Callable[[Tensor], object] | None,
    ) -> tuple[Tensor]:
        value = self.read(name, dtype=dtype, device=device).reshape(shape)
        if edit is not None:
            edit(value)
        return (value,)

    def _eight_bit(
        self, name: str, how: str, dtype: torch.dtype, device: torch.device | str, edit: Edit | None
    ) -> tuple[Tensor, Tensor | None]:
        """A layer's float8 values and factors: the file's own where it has them and nothing
        changes them, else new ones."""
        module, source = name.removesuffix(".weight"), self.sources[name]
        part = source.parts[0]
        if self._keeps(source) and (edit is None or not edit(module, None)):
            mapped, scale = self.weights.get(part), self._scale(part)
            values = source.own_rows(mapped.to(device, copy=True))
            self.weights.release(mapped)
            if scale is None:
                return values, None
            rows = len(scale) == mapped.shape[0] if scale.ndim > 1 else False
            return (
                values, source.own_rows(scale.to(device, copy=True)) if rows else scale.to(device, copy=True)
            )
        weight = self.read(name, dtype=dtype, device=device)
        if edit is not None:
            edit(module, weight)
        return quantize(weight, how)

    def takes_product(self, name: str, how: str) -> bool:
        """Whether this weight [out, in], loaded as float8 as `how` says, has no factors within a row: they
        could not leave the sum of a float8 product."""
        source = self.sources[name]
        if self._keeps(source):
            scale = self._scale(source.parts[0])
            return scale is None or scale.ndim < 3
        return how != "fp8_scaled" or self.shapes[name][1] % BLOCK != 0

    def _keeps(self, source: Fused) -> bool:
        """Whether the file's own float8 values can be taken as they are."""
        return len(source.parts) == 1 and not source.swap and self.weights.dtype(source.parts[0]) == DTYPE

    def _scale(self, part: str) -> Tensor | None:
        """The factors of a weight in float8: one, one a row [out, 1], or one a block [out, blocks, 1]."""
        stem = part.removesuffix("weight")
        for name in (stem + ending for ending in SCALES):
            if name in self.weights:
                scale = self.weights.get(name)
                return scale.reshape(-1, 1) if scale.ndim == 1 and scale.numel() > 1 else scale
        return None


def anchored(path: str | Path, anchors: Mapping[str, KeyMap], *, what: str) -> Source:
    """A model's tensors under whatever prefix the file gives them. `anchors`: a name that tells a dialect ->
    its map to the model's own names; the shortest prefix wins.

    Raises CheckpointError for a file that is not `what`.
    """
    weights = open_weights(path)
    found = [
        (key, anchor) for anchor in anchors for key in weights if key == anchor or key.endswith(f".{anchor}")
    ]
    if not found:
        first = ", ".join(list(weights)[:SHOWN])
        raise CheckpointError(
            f"{path}: not {what}: no '{' or '.join(anchors)}' in it (its first keys: {first})"
        )
    key, anchor = min(found, key=lambda hit: len(hit[0]) - len(hit[1]))
    prefix = key.removesuffix(anchor)
    names = [
        name.removeprefix(prefix) for name in weights if name.startswith(prefix) and not name.endswith(SCALES)
    ]
    own = anchors[anchor].read(names)
    return Source(
        weights, {name: replace(f, parts=tuple(prefix + part for part in f.parts)) for name, f in own.items()}
    )


def check(
    path: str | Path, wanted: Shapes, found: Shapes, *, what: str = "its tensors do not fit the model",
    hint: str = ". Is the file complete?", ones: bool = False,
) -> None:
    """Refuse missing, unexpected and misshapen tensors, naming the first of each. `ones`: dimensions of 1,
    which programs add and leave out, do not count."""
    missing = [n for n in wanted if n not in found]
    extra = [n for n in found if n not in wanted]
    both = [(n, found[n], shape) for n, shape in wanted.items() if n in found and found[n] != shape]
    wrong = [
        f"{n} is {_by(a)}, expected {_by(b)}" for n, a, b in both if not (ones and _dense(a) == _dense(b))
    ]
    parts = [
        f"{len(names)} {kind}: {', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''}"
        for kind, names in (("missing", missing), ("unexpected", extra), ("of another shape", wrong))
        if names
    ]
    if parts:
        raise CheckpointError(f"{path}: {what}: {'; '.join(parts)}{hint}")


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """What `check` wants of a file for this model."""
    return {name: tuple(t.shape) for name, t in model.state_dict().items()}


def config_of(
    path: Path, metadata: Mapping[str, str], key: str, *, mine: Callable[[Mapping[str, Any]], bool]
) -> dict[str, Any]:
    """The config that goes with a file: from its metadata, else the config.json in its directory or beside
    it, which may be another model's: `mine` tells. Empty: none."""
    if key in metadata:
        return json_object(metadata[key], f"{path}, metadata '{key}'")
    beside = (path if path.is_dir() else path.parent) / "config.json"
    config = json_object(beside.read_text(), beside) if beside.is_file() else {}
    return config if mine(config) else {}


def json_object(text: str, where: str | Path) -> dict[str, Any]:
    """Raises CheckpointError for anything else, and says where it is."""
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{where}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{where}: expected a JSON object, found {type(config).__name__}")
    return config


def _dense(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a scalar"
