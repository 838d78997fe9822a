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
    """Blocks of one kind in up to four runs of their depth, as `KIND.0-4`; what lies in no block is `rest`."""
    found = [(name, match[1], int(match[2])) if (match := _BLOCK.match(name)) else (name, "", 0) for name in names]
    sizes: dict[str, int] = {}
    for _, kind, number in found:
        sizes[kind] = max(sizes.get(kind, 0), number + 1)
    parts: dict[str, list[str]] = {}
    for name, kind, number in found:
        wide = -(-sizes[kind] // QUARTERS)
        first = number // wide * wide
        parts.setdefault(f"{kind}.{first}-{min(first + wide, sizes[kind]) - 1}" if kind else "rest", []).append(name)
    return {part: tuple(members) for part, members in parts.items()}


def norms_of_parts(
    grads: Mapping[str, Tensor], parts: Parts, *, total: Callable[[Tensor], object] | None = None
) -> dict[str, float]:
    """The norm of each part's gradients. `grads` may hold pieces of them, or lack some; `total` then adds up a tensor over
    all ranks in place."""
    if not parts:
        return {}
    names = list(grads)
    squares = dict(zip(names, torch._foreach_norm(list(grads.values())), strict=True)) if names else {}
    where = next(iter(grads.values())).device if names else torch.device("cpu")
    sums = torch.stack([
        torch.stack([squares[name].float().square() for name in members if name in squares]).sum()
        if any(name in squares for name in members) else torch.zeros((), device=where)
        for members in parts.values()
    ])  # fmt: skip
    if total is not None:
        total(sums)
    return dict(zip(parts, sums.sqrt().tolist(), strict=True))
