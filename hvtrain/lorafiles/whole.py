"""Whole tensors in a LoRA file: what distilled ones add to norms, biases, modulation
and layers outside the blocks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from torch import Tensor

from hvtrain.errors import CheckpointError
from hvtrain.models import find
from hvtrain.models.targets import layers_of

if TYPE_CHECKING:
    from hvtrain.lorafiles.files import LoraFile

# the last: a block's learnt shifts and scales
_ENDINGS = {".diff": ".weight", ".diff_b": ".bias", ".diff_m": ".modulation"}
_PREFIX = "diffusion_model."  # under which programs write them


def split(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What is no whole tensor's difference, and those by the parameter's official name;
    many are zeros, and left out."""
    rest, whole = {}, {}
    for key, tensor in tensors.items():
        ending = next((e for e in _ENDINGS if key.endswith(e)), None)
        if ending is None:
            rest[key] = tensor
        elif tensor.any():
            whole[key.removeprefix(_PREFIX).removesuffix(ending) + _ENDINGS[ending]] = tensor
    return rest, whole


@lru_cache
def relatives(model: str) -> frozenset[str]:
    """Names of the Linear layers of all the model's flavors: a LoRA of one may be meant
    for another that lacks some."""
    names: set[str] = set()
    for arch in dict.fromkeys(flavor.arch for flavor in find(model).flavors.values()):
        names |= layers_of(find(model).build, arch).keys()
    return frozenset(names)


def summed(
    loras: Sequence[tuple[LoraFile, float]], shapes: Mapping[str, Sequence[int]], *, once: bool
) -> dict[str, Tensor]:
    """What they add together, by parameter, float32. `shapes`: the model's own; a parameter that it lacks is
    named on stderr. `once`: no two may change one. Raises CheckpointError for that, and for another shape."""
    found: dict[str, Tensor] = {}
    for lora, multiplier in loras:
        missing = [name for name in lora.whole if name not in shapes]
        if missing:
            warn(lora.path.name, missing, "tensors")
        for name, value in lora.whole.items() if multiplier else ():
            if name in missing:
                continue
            if tuple(value.shape) != tuple(shapes[name]):
                raise CheckpointError(
                    f"{lora.path}: changes '{name}' of shape {list(value.shape)}, this model's is "
                    f"{list(shapes[name])}"
                )
            if once and name in found:
                raise CheckpointError(
                    f"{lora.path}: changes '{name}', as a LoRA before it does; --on-overlap sum adds them up"
                )
            found[name] = found.get(name, 0) + multiplier * value.float()
    return found


def warn(file: str, names: Sequence[str], what: str) -> None:
    listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    print(
        f"warning: {file}: left out {len(names)} {what} that this model lacks: {listed}", file=sys.stderr,
        flush=True
    )


def editing(
    edit: Callable[[str, Tensor | None], bool], added: Mapping[str, Tensor]
) -> Callable[[str, Tensor | None], bool]:
    """`edit` of a model that is being loaded (weights/source.py), with these differences too."""

    def change(name: str, weight: Tensor | None) -> bool:
        hit = edit(name, weight)
        value = added.get(name, added.get(f"{name}.weight"))
        if value is not None and weight is not None:
            weight.copy_(weight.float() + value.to(weight.device))
        return hit or value is not None

    return change
