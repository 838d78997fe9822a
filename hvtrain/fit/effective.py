"""What a config leaves to its model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from hvtrain.config import ModelConfig, asset
from hvtrain.config.sampling import Sampling
from hvtrain.errors import HvtrainError
from hvtrain.fit.estimate import candidate
from hvtrain.models import find
from hvtrain.models.spec import Flavor

_SAMPLED = {f.name for f in fields(Sampling)}


def of_model(model: ModelConfig, values: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Under the dotted keys of `values` that are None, the flavor's own; and which flavor
    that is, or why none is known."""
    try:
        flavor = _flavor(model)
    except HvtrainError as error:
        return {}, f"the model's own, which is not known: {error}"
    if flavor is None:
        lost = "" if model.dit is None else f"{model.dit} is not there, and "
        return {}, f"the model's own; {lost}nothing says which flavor it is: give model.flavor"
    own = flavor.defaults
    shift = own.shift if own.training_shift is None else own.training_shift
    known: dict[str, Any] = {"model.flavor": flavor.name, "flow.shift": shift, "flow.guidance": own.guidance}
    for key in values:
        section, _, name = key.rpartition(".")
        if name in _SAMPLED and section in ("", "preview") and key != "preview.guidance":
            known[key] = getattr(own, name)
    found = {key: known[key] for key, value in values.items() if value is None and known.get(key) is not None}
    return found, f"model ({flavor.name})"


def _flavor(model: ModelConfig) -> Flavor | None:
    spec = find(model.name)
    path = model.file("dit")
    if model.flavor is None and path is None:
        return None
    if path is None or not Path(asset(path)).exists():
        told = spec.told_by(Path(path)) if spec.told_by and path else None
        name = model.flavor or told
        return spec.flavor(name) if name else None
    return candidate(model).flavor
