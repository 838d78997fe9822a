"""Which of a model's experts a LoRA is for: their layers are alike, so no shape tells."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from hvtrain.errors import ConfigError, suggest
from hvtrain.lorafiles.files import LoraFile, prefix_number
from hvtrain.lorafiles.metadata import EXPERT_KEY
from hvtrain.models.spec import Expert, ModelSpec

_NEAR = 0.002  # of a noise level: programs count it in thousandths, some from 1


def names_of(spec: ModelSpec) -> list[str]:
    """Of all its flavors' experts, in the order of the prefixes that they have in files."""
    return list(dict.fromkeys(expert.name for flavor in spec.flavors.values() for expert in flavor.experts))


def number_of(spec: ModelSpec, name: str | None, *, key: str) -> int | None:
    """Its place in that order. Raises ConfigError."""
    names = names_of(spec)
    if name is not None and name not in names:
        raise ConfigError(
            f"{key}: {spec.name} has no expert '{name}'; {suggest(name, names) if names else 'leave it out'}"
        )
    return None if name is None else names.index(name)


def trained_range(metadata: Mapping[str, str]) -> tuple[float, float] | None:
    """The noise levels that it was trained on, as hvtrain and musubi-tuner write them."""
    said = metadata.get("modelspec.timestep_range", "").split(",")
    if len(said) != 2:
        said = [metadata.get("ss_min_timestep", "0"), metadata.get("ss_max_timestep", "1000")]
    try:
        low, high = (float(number) / 1000 for number in said)
    except ValueError:
        return None
    return None if (low, high) == (0, 1) else (low, high)


def by_name(path: Path, names: Sequence[str]) -> str | None:
    """The one expert that a file's name speaks of."""
    words = re.findall(r"[a-z]+", path.stem.lower())
    found = [name for name in names if name in words]
    return found[0] if len(found) == 1 else None


def whose(
    lora: LoraFile, experts: Sequence[Expert], bases: Mapping[str, str] | None = None
) -> tuple[str | None, bool]:
    """The expert that a LoRA is for, and whether the file says so itself, by metadata or names of tensors,
    and not only by its own name. `bases`: fingerprint of each expert's weights."""
    names, said = [expert.name for expert in experts], lora.metadata.get(EXPERT_KEY)
    if said in names:
        return said, True
    trained_on = lora.metadata.get("hvtrain.base")
    same = [name for name, base in (bases or {}).items() if base == trained_on]
    if len(same) == 1:
        return same[0], True
    if span := trained_range(lora.metadata):
        within = [
            e.name for e in experts if e.sigmas[0] - _NEAR <= span[0] and span[1] <= e.sigmas[1] + _NEAR
        ]
        if len(within) == 1:
            return within[0], True
    number = prefix_number(lora.path) or 0
    if 0 < number < len(names):
        return names[number], True
    return by_name(lora.path, names), False


def check_range(lora: LoraFile, expert: Expert) -> None:
    """Refuse a LoRA whose noise levels are none of this expert's. Raises ConfigError."""
    span = trained_range(lora.metadata)
    if span and (span[1] <= expert.sigmas[0] + _NEAR or span[0] >= expert.sigmas[1] - _NEAR):
        raise ConfigError(
            f"{lora.path}: trained on sigma {span[0]:g} to {span[1]:g}, the expert '{expert.name}' predicts "
            f"from {expert.sigmas[0]:g} to {expert.sigmas[1]:g}: it would never be asked what it learned; "
            "give it to another expert"
        )
