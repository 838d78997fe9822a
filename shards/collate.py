"""From samples to one batch: equal shapes are stacked, fields of different lengths are padded."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Sequence

import torch
from torch import Tensor

from shards.buffers import empty
from shards.errors import ShardError
from shards.order import pick
from shards.reader import Sample

VARIANT = re.compile(r"(.+)\.([0-9]{1,4})")  # text.1 is the second caption's `text`


def choose_caption(sample: Sample, *, seed: int, epoch: int, index: int) -> Sample:
    """One of the sample's captions: every epoch another draw, the same for everyone."""
    variants = [m for m in map(VARIANT.fullmatch, sample.tensors) if m]
    if not variants:
        return sample
    number = pick(seed, epoch, index, 1 + max(int(m[2]) for m in variants))
    names = {m[1] for m in variants}
    tensors = {n: t for n, t in sample.tensors.items() if not VARIANT.fullmatch(n)}
    meta = dict(sample.meta)
    if number:
        try:
            tensors |= {name: sample.tensors[f"{name}.{number}"] for name in names}
            meta["caption"] = meta["captions"][number]
        except (KeyError, IndexError, TypeError):
            raise ShardError(
                f"sample {sample.key} lacks its caption number {number}; encode column 'text' again"
            ) from None
    return Sample(sample.key, tensors, meta)


New = Callable[[tuple[int, ...], torch.dtype], Tensor]  # memory for one field of a batch, uninitialised


def collate(samples: Sequence[Sample], *, ragged: Container[str], new: New = empty) -> dict[str, Tensor]:
    """Stack equal shapes, in memory from `new`; the `ragged` fields (Manifest.ragged) are padded with
    zeros and get a NAME_len [B]."""
    names = list(samples[0].tensors)
    batch: dict[str, Tensor] = {}
    for name in names:
        values = [_field(sample, name) for sample in samples]
        _alike(name, samples, [str(v.dtype).removeprefix("torch.") for v in values], "dtypes")
        if name in ragged:
            _alike(
                name, samples,
                ["x".join(["any", *map(str, v.shape[1:])]) if v.ndim else "none" for v in values], "shapes"
            )
            batch |= _padded(name, values, new)
            continue
        _alike(name, samples, [tuple(v.shape) for v in values], "shapes")
        out = new((len(values), *values[0].shape), values[0].dtype)
        for row, value in zip(out, values, strict=True):
            row.copy_(value)
        batch[name] = out
    return batch


def _alike(name: str, samples: Sequence[Sample], seen: Sequence[object], what: str) -> None:
    if len(set(seen)) > 1 or "none" in seen:
        keys = ", ".join(s.key for s in samples)
        raise ShardError(
            f"samples {keys}: '{name}' has {what} {', '.join(sorted(map(str, set(seen))))} in one bucket"
        )


def _field(sample: Sample, name: str) -> Tensor:
    if name not in sample.tensors:
        raise ShardError(
            f"sample {sample.key} lacks the field '{name}' that others have; encode that column again"
        )
    return sample.tensors[name]


def _padded(name: str, values: Sequence[Tensor], new: New) -> dict[str, Tensor]:
    longest = max(len(v) for v in values)
    out = new((len(values), longest, *values[0].shape[1:]), values[0].dtype)
    for row, value in zip(out, values, strict=True):
        row[: len(value)].copy_(value)
        row[len(value) :] = 0
    lengths = new((len(values),), torch.int64).copy_(torch.tensor([len(v) for v in values]))
    return {name: out, f"{name}_len": lengths}
