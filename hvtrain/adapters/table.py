"""What `adapter.type` names, besides `loraid` (a LoRA of a slice) and `none`. An entry is a class."""

from __future__ import annotations

from hvtrain.adapters.layer import AdaptedLinear
from hvtrain.adapters.loha import LohaLinear
from hvtrain.adapters.lora import LoraLinear
from hvtrain.registry import Registry

ADAPTERS: Registry[type[AdaptedLinear]] = Registry(
    "adapter", {"lora": LoraLinear, "loha": LohaLinear}, also=("loraid", "none")
)


def kind_of(name: str) -> type[AdaptedLinear]:
    """Of an `adapter.type` that is not `none`. Raises ConfigError."""
    return ADAPTERS.find("lora" if name == "loraid" else name, key="adapter.type")
