"""The order of training samples: a pure function of (seed, epoch, buckets). No torch, no files, no ranks.

The endless global stream is a list of micro-batches, each of one bucket. An epoch holds every sample exactly once: its
samples are shuffled within their buckets, cut into micro-batches (the last of a bucket may be short), and the
micro-batches of all buckets are shuffled together. Data-parallel rank r of n takes micro-batches r, r + n, ... of the
stream, so all ranks get equally many, on any number of ranks. The cursor is one integer: samples consumed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class MicroBatch:
    epoch: int
    samples: tuple[int, ...]  # indices into the sets, counted through
    begin: int  # samples of the stream before it


def epoch_batches(buckets: Sequence[str], *, batch_size: int, seed: int, epoch: int) -> list[tuple[int, ...]]:
    """One epoch's micro-batches over samples whose buckets are given."""
    members: dict[str, list[int]] = {}
    for index, bucket in enumerate(buckets):
        members.setdefault(bucket, []).append(index)
    rng = random.Random(f"{seed}/{epoch}")  # a string: seeded by its bytes, the same in every process
    batches = []
    for bucket in sorted(members):
        order = members[bucket]
        rng.shuffle(order)
        batches += [tuple(order[i : i + batch_size]) for i in range(0, len(order), batch_size)]
    rng.shuffle(batches)
    return batches


def stream(buckets: Sequence[str], *, batch_size: int, seed: int, cursor: int = 0) -> Iterator[MicroBatch]:
    """The global stream from `cursor` samples on. A cursor inside a micro-batch starts with that micro-batch's rest."""
    if not buckets:
        raise ValueError("no samples")
    epoch, begin = divmod(cursor, len(buckets))
    skip = begin
    while True:
        at = epoch * len(buckets)
        for samples in epoch_batches(buckets, batch_size=batch_size, seed=seed, epoch=epoch):
            if skip >= len(samples):
                skip -= len(samples)
            else:
                yield MicroBatch(epoch, samples[skip:], at + skip)
                skip = 0
            at += len(samples)
        epoch += 1
