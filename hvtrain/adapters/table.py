"""What `adapter.type` names, besides `loraid` (one of these on a slice) and `none`. An entry is a class."""

from __future__ import annotations

from collections.abc import Iterable

from hvtrain.adapters.dora import DoraLinear
from hvtrain.adapters.layer import AdaptedLinear
from hvtrain.adapters.loha import LohaLinear
from hvtrain.adapters.lokr import LokrLinear
from hvtrain.adapters.lora import LoraLinear
from hvtrain.registry import Registry

ADAPTERS: Registry[type[AdaptedLinear]] = Registry(
    "adapter", {"lora": LoraLinear, "loha": LohaLinear, "lokr": LokrLinear, "dora": DoraLinear},
    also=("loraid", "none")
)


def kind_of(name: str, slice_type: str = "lora") -> type[AdaptedLinear]:
    """Of an `adapter.type` that is not `none`. Raises ConfigError."""
    if name == "loraid":
        return Registry("adapter", dict(ADAPTERS)).find(slice_type, key="adapter.slice_type")
    return ADAPTERS.find(name, key="adapter.type")


def kinds_of(parts: Iterable[str]) -> list[type[AdaptedLinear]]:
    """Whose parts these are: several where they are no one adapter's; of a DoRA
    and the LoRA in it the DoRA."""
    parts = set(parts)
    found = [kind for kind in ADAPTERS.values() if parts & set(kind.PARTS)]
    whole = [kind for kind in found if parts <= set(kind.PARTS)]
    return whole[:1] or [kind for kind in found if kind is not DoraLinear or "magnitude" in parts]
