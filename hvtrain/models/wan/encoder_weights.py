"""Weights of the encoders: from the layouts in use into a module under official names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from hvtrain.errors import CheckpointError
from hvtrain.models.foreign import looks_like
from hvtrain.weights.containers import open_weights
from hvtrain.weights.float8 import DTYPE, dequantize, quantize, replace_linear
from hvtrain.weights.keymap import Fused, KeyMap

_SCALES = ("scale_weight", "weight_scale")  # of a float8 weight: ComfyUI's, other tools'


class Source:
    """A file's tensors under official names, whatever its dialect and prefix."""

    def __init__(self, path: str | Path, *, anchors: Mapping[str, KeyMap], what: str) -> None:
        """anchors: a name that tells a dialect -> its map. Raises CheckpointError for a file without any."""
        self.path, self.what, self.weights = Path(path), what, open_weights(path)
        found = [(key, anchor) for anchor in anchors for key in self.weights if key == anchor or key.endswith(f".{anchor}")]
        if not found:
            label = looks_like(self.weights)
            like = f"it looks like {label}" if label else f"its first keys are {', '.join(self.weights.keys()[:3])}"
            raise CheckpointError(f"{path}: not {what}: {like}")
        key, anchor = min(found, key=lambda hit: len(hit[0]))
        self.prefix = key.removesuffix(anchor)
        names = [name.removeprefix(self.prefix) for name in self.weights if name.startswith(self.prefix)]
        self.sources: dict[str, Fused] = anchors[anchor].read(names)

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self.sources:
            raise CheckpointError(f"{self.path}: not {self.what}: no '{name}' in it")
        source = self.sources[name]
        return source.shape({part: self.weights.shape(self.prefix + part) for part in source.parts})

    def count(self, prefix: str) -> int:
        """1 + the largest N of PREFIX.N."""
        numbers = [int(name[len(prefix) + 1 :].split(".")[0]) for name in self.sources if name.startswith(f"{prefix}.")]
        return 1 + max(numbers, default=-1)

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """A copy in `dtype`; the pages of the file that it came from are given back."""

        def get(part: str) -> Tensor:
            mapped = self.weights.get(self.prefix + part)
            value = dequantize(mapped, self._scale(part), dtype) if mapped.dtype == DTYPE else mapped.to(dtype, copy=True)
            self.weights.release(mapped)
            return value

        return self.sources[name].build(get)

    def _scale(self, part: str) -> Tensor | None:
        stem = self.prefix + part.removesuffix("weight")
        return next((self.weights.get(stem + leaf).float() for leaf in _SCALES if stem + leaf in self.weights), None)


def fill(
    model: nn.Module, source: Source, *, dtype: torch.dtype, device: torch.device | str, fp8: bool = False
) -> nn.Module:
    """A meta module with the file's values, tensor by tensor; with `fp8` its Linear weights stay float8. On the meta device
    names and shapes are compared, and that is all."""
    wanted = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    for name, shape in wanted.items():
        if _dense(found := source.shape(name)) != _dense(shape):
            raise CheckpointError(f"{source.path}: not {source.what}: '{name}' is {list(found)}, expected {list(shape)}")
    if torch.device(device).type == "meta":
        return model
    linear = {f"{name}.weight": name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    state = {}
    for name in wanted:
        state[name] = source.read(name, dtype).reshape(wanted[name]).to(device)
        if fp8 and name in linear:
            values, scale = quantize(state[name], "fp8_scaled")
            replace_linear(model, linear[name], values, scale)
            state[name] = values
            if scale is not None:
                state[f"{linear[name]}.scale_weight"] = scale
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def _dense(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without dimensions of 1, which programs add and leave out."""
    return tuple(n for n in shape if n != 1)
