"""The order of training samples: a pure function of (seed, epoch, buckets). No torch, no files, no ranks.

The endless global stream is a list of micro-batches, each of one bucket. An epoch holds every sample exactly once: its
samples are shuffled within their buckets, cut into micro-batches (the last of a bucket may be short), and the
micro-batches of all buckets are shuffled together. Data-parallel rank r of n takes micro-batches r, r + n, ... of the
stream, so all ranks get equally many, on any number of ranks. The cursor is one integer: samples consumed.

Shuffling sorts by a hash of the index (splitmix64, Steele et al. 2014), not by a random generator: the order is the same
on every machine and version of every library, and a million samples take a tenth of a second.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

Groups = Mapping[str, np.ndarray]  # bucket -> indices of its samples


@dataclass(frozen=True)
class MicroBatch:
    epoch: int
    samples: tuple[int, ...]
    begin: int  # samples of the stream before it


@dataclass(frozen=True)
class EpochOrder:
    """One epoch: micro-batch i is samples[starts[i] : starts[i] + lengths[i]]."""

    samples: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    def batch(self, number: int) -> tuple[int, ...]:
        start = int(self.starts[number])
        return tuple(self.samples[start : start + int(self.lengths[number])].tolist())


def mix(values: np.ndarray, salt: int) -> np.ndarray:
    """uint64 hashes [n] of uint64 values [n]: splitmix64's finaliser. Of different values different ones: no sort has ties."""
    x = values.astype(np.uint64) + np.uint64(salt) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def salt(*parts: object) -> int:
    """64 bits that depend on the parts only."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def pick(seed: int, epoch: int, index: int, n: int) -> int:
    """Which of n alternatives (captions) a sample takes in an epoch."""
    return int(mix(np.array([index]), salt(seed, epoch, "caption"))[0] % np.uint64(n))


def epoch_order(groups: Groups, *, batch_size: int, seed: int, epoch: int) -> EpochOrder:
    parts, starts, lengths, at = [], [], [], 0
    key = salt(seed, epoch, "samples")
    for bucket in sorted(groups):
        members = groups[bucket]
        parts.append(members[np.argsort(mix(members, key))])
        begins = np.arange(0, len(members), batch_size)
        starts.append(at + begins)
        lengths.append(np.minimum(batch_size, len(members) - begins))
        at += len(members)
    order = np.argsort(mix(np.arange(sum(map(len, starts))), salt(seed, epoch, "batches")))
    return EpochOrder(np.concatenate(parts), np.concatenate(starts)[order], np.concatenate(lengths)[order])


def count(groups: Groups) -> int:
    return sum(len(members) for members in groups.values())


def stream(groups: Groups, *, batch_size: int, seed: int, cursor: int = 0) -> Iterator[MicroBatch]:
    """The global stream from `cursor` samples on. A cursor inside a micro-batch starts with that micro-batch's rest."""
    n = count(groups)
    if not n:
        raise ValueError("no samples")
    epoch, inside = divmod(cursor, n)
    while True:
        order = epoch_order(groups, batch_size=batch_size, seed=seed, epoch=epoch)
        ends = np.cumsum(order.lengths)
        number = int(np.searchsorted(ends, inside, side="right"))
        while number < len(ends):
            samples = order.batch(number)
            begin = int(ends[number]) - len(samples)
            skip = max(0, inside - begin)
            yield MicroBatch(epoch, samples[skip:], epoch * n + begin + skip)
            number += 1
        epoch, inside = epoch + 1, 0
