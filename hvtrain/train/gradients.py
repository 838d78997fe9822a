"""Gradient norms of a model's parts: where in the depth of a model a training is unquiet."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

Parts = Mapping[str, tuple[str, ...]]  # a part's name -> its parameters' names
QUARTERS = 4
_BLOCK = re.compile(r"(.*?)\.?(\d+)\.")


def parts_of(names: Iterable[str]) -> Parts:
    """Blocks of one kind in up to four runs of their depth, as `KIND.0-4`; what
    lies in no block is `rest`."""
    found = [
        (name, match[1], int(match[2])) if (match := _BLOCK.match(name)) else (name, "", 0) for name in names
    ]
    sizes: dict[str, int] = {}
    for _, kind, number in found:
        sizes[kind] = max(sizes.get(kind, 0), number + 1)
    parts: dict[str, list[str]] = {}
    for name, kind, number in found:
        wide = -(-sizes[kind] // QUARTERS)
        first = number // wide * wide
        parts.setdefault(
            f"{kind}.{first}-{min(first + wide, sizes[kind]) - 1}" if kind else "rest", []
        ).append(name)
    return {part: tuple(members) for part, members in parts.items()}


def norms_of_parts(
    norms: Mapping[str, Tensor], parts: Parts, *, device: torch.device | None = None,
    total: Callable[[Tensor], object] | None = None,
) -> dict[str, float]:
    """The norm of each part, from the norms of its gradients, each of which is in one part. `norms` may be of
    pieces of them, or lack some; `total` then adds up a tensor on `device` over all ranks in place."""
    if not parts:
        return {}
    sums = torch.zeros(len(parts), device=device)
    if norms:
        number = {name: i for i, members in enumerate(parts.values()) for name in members}
        into = torch.tensor([number[name] for name in norms], device=device)
        sums.index_add_(0, into, torch.stack(list(norms.values())).to(sums).square())
    if total is not None:
        total(sums)
    return dict(zip(parts, sums.sqrt().tolist(), strict=True))
