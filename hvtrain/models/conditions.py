"""A batch's conditions, by the flavor's fields: stacked, dropped, made up. Ragged ones are padded with zeros
to the longest, and NAME_len [B] says each one's length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hvtrain.models.spec import Field, Flavor

Conds = Mapping[str, Tensor]


def batch_of_one(sample: Conds, fields: Sequence[Field]) -> dict[str, Tensor]:
    """A sample's fields, without the batch, as a batch of one."""
    lengths = {
        f"{f.name}_len": torch.tensor([len(sample[f.name])]) for f in fields if f.ragged and f.name in sample
    }
    return {name: value[None] for name, value in sample.items()} | lengths


def stack(conds: Sequence[Conds], fields: Sequence[Field]) -> dict[str, Tensor]:
    """Several batches as one."""
    ragged = {f.name for f in fields if f.ragged}
    result = {}
    for name in conds[0]:
        values = [cond[name] for cond in conds]
        if name in ragged:
            longest = max(value.shape[1] for value in values)
            values = [_padded(value, longest) for value in values]
        result[name] = torch.cat(values)
    return result


def drop(batch: Conds, empty: Conds, dropped: Tensor, fields: Sequence[Field]) -> dict[str, Tensor]:
    """These samples (bool [B]) with the empty prompt's fields (without a batch)
    instead of their caption's."""
    result = dict(batch)
    for f in fields:
        if f.column != "text" or f.name not in batch:
            continue
        value, blank = batch[f.name], empty[f.name][None].to(batch[f.name].dtype)
        if f.ragged:
            longest = max(value.shape[1], blank.shape[1])
            result[f"{f.name}_len"] = torch.where(
                dropped, torch.tensor(blank.shape[1]), batch[f"{f.name}_len"]
            )
            value, blank = _padded(value, longest), _padded(blank, longest)
        result[f.name] = torch.where(dropped.view(-1, *[1] * (value.ndim - 1)), blank, value)
    return result


def example(
    flavor: Flavor, latents: Sequence[int], *, lengths: Sequence[int] = (), optional: bool = False,
    draw: torch.Generator | None = None,
) -> dict[str, Any]:
    """Conditions as the flavor declares them for latents [B C T H W], with values if `draw` is given: what
    a contract test or a planner feeds a model whose data it does not have. `lengths`: of the ragged fields,
    by sample; else the longest."""
    n, (_, t, h, w) = latents[0], latents[1:]
    cond: dict[str, Any] = {}
    for f in flavor.cond:
        if f.optional and not optional:
            continue
        own = [min(length, f.longest or length) for length in lengths] or [f.longest or 1] * n
        if f.ragged:
            cond[f"{f.name}_len"] = Lengths(own) if draw is None else torch.tensor(own)
        free = [max(own)] if f.ragged else []
        # Dimensions that vary beside a ragged one are the latents' own: frames,
        # height, width, from the right.
        sizes = iter(free + [t, h, w][3 - sum(d is None for d in f.dims) + len(free) :])
        shape = (n, *(next(sizes) if d is None else d for d in f.dims))
        value = torch.empty(shape) if draw is None else torch.randn(shape, generator=draw)
        if f.ragged and draw is not None:
            for row, length in zip(value, own, strict=True):
                row[length:] = 0
        cond[f.name] = value
    return cond


class Lengths(list[int]):
    """Conditions whose values matter even where tensors have none."""

    def tolist(self) -> list[int]:
        return list(self)


def _padded(value: Tensor, length: int) -> Tensor:
    """[B L ...] -> [B length ...]."""
    return F.pad(value, [0, 0] * (value.ndim - 2) + [0, length - value.shape[1]])
