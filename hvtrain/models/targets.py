"""Which Linear modules a LoRA adapts: the architecture's own rule, changed by the user's patterns."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn

from hvtrain.errors import ConfigError
from hvtrain.models.dit import DiT
from hvtrain.models.spec import ModelSpec


def lora_targets(
    spec: ModelSpec, model: DiT, *, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> list[str]:
    """Names in the model's order. Patterns are regular expressions for the whole
    name of a module inside a block.

    As in musubi-tuner, `exclude` removes and `include` brings back what is excluded (modulation by default).
    """
    blocks = {id(module) for block in model.blocks for module in block.modules()}
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and id(m) in blocks]
    for option, patterns in (("adapter.include", include), ("adapter.exclude", exclude)):
        for pattern in patterns:
            if not any(_matches(pattern, name, option=option) for name in names):
                raise ConfigError(
                    f"{option}: '{pattern}' matches no module; an example of a name: {names[0]}"
                )
    chosen = []
    for name in names:
        wanted = spec.is_lora_target(name) and not any(_matches(p, name) for p in exclude)
        if wanted or any(_matches(p, name) for p in include):
            chosen.append(name)
    if not chosen:
        raise ConfigError(f"adapter.exclude: {list(exclude)} leaves nothing to train")
    return chosen


def _matches(pattern: str, name: str, *, option: str = "adapter.include/exclude") -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise ConfigError(f"{option}: '{pattern}' is no regular expression: {error}") from None


@cache
def layers_of(build: Callable[[Any], nn.Module], arch: Any) -> Mapping[str, tuple[int, int]]:
    """[out, in] of every Linear of a model that is not there, by name; `build`: the
    ModelSpec's. Flavors share many."""
    with torch.device("meta"):
        modules = build(arch).named_modules()
    return {
        name: (layer.out_features, layer.in_features) for name,
        layer in modules if isinstance(layer, nn.Linear)
    }
