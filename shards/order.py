"""The order of training samples: a pure function of (seed, epoch, buckets). No torch, no files, no ranks.

The endless global stream is a list of micro-batches, each of one bucket. An epoch holds every sample exactly
once: its samples are shuffled within their buckets, cut into micro-batches (the last of a bucket may be
short), and the micro-batches of all buckets are shuffled together. Of weighted sets (`Mixture`) an epoch
draws other numbers of samples: each set is gone through evenly, again and again, in an order of its own.
Data-parallel rank r of n takes micro-batches r, r + n, ... of the stream, so all ranks get equally many, on
any number of ranks. The cursor is one integer: samples consumed.

Shuffling sorts by a hash of the index (splitmix64, Steele et al. 2014), not by a random generator: the order
is the same on every machine and version of every library, and a million samples take a tenth of a second.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Groups = Mapping[str, np.ndarray]  # bucket -> indices of its samples
BatchSize = int | Mapping[str, int]  # of all buckets, or of each
# bits of an index; above them the number of its copy in one epoch, so that copies are shuffled like others
_COPY = 40


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
        return tuple((self.samples[start : start + int(self.lengths[number])] & ((1 << _COPY) - 1)).tolist())


def mix(values: np.ndarray, salt: int) -> np.ndarray:
    """uint64 hashes [n] of uint64 values [n]: splitmix64's finaliser. Of different values
    different ones: no sort has ties."""
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


def epoch_order(groups: Groups, *, batch_size: BatchSize, seed: int, epoch: int) -> EpochOrder:
    parts, starts, lengths, at = [], [], [], 0
    key = salt(seed, epoch, "samples")
    for bucket in sorted(groups):
        members = groups[bucket]
        parts.append(members[np.argsort(mix(members, key))])
        size = batch_size if isinstance(batch_size, int) else batch_size[bucket]
        begins = np.arange(0, len(members), size)
        starts.append(at + begins)
        lengths.append(np.minimum(size, len(members) - begins))
        at += len(members)
    order = np.argsort(mix(np.arange(sum(map(len, starts))), salt(seed, epoch, "batches")))
    return EpochOrder(np.concatenate(parts), np.concatenate(starts)[order], np.concatenate(lengths)[order])


def count(groups: Groups) -> int:
    return sum(len(members) for members in groups.values())


@dataclass(frozen=True)
class Mixture:
    """Sets, and how many samples of each an epoch has."""

    sets: tuple[Groups, ...]
    counts: tuple[int, ...]
    batch_size: BatchSize

    @property
    def n(self) -> int:
        return sum(self.counts)

    def order(self, *, seed: int, epoch: int) -> EpochOrder:
        drawn = [self._drawn(i, seed, epoch) for i in range(len(self.sets))]
        groups = {
            bucket: np.concatenate([d[bucket] for d in drawn if bucket in d]) for d in drawn for bucket in d
        }
        return epoch_order(groups, batch_size=self.batch_size, seed=seed, epoch=epoch)

    def _drawn(self, number: int, seed: int, epoch: int) -> Groups:
        """A set's samples of an epoch: it is gone through again and again, each time in another order."""
        groups, n = self.sets[number], self.counts[number]
        total, begin, end = count(groups), epoch * n, (epoch + 1) * n
        if n == total or not n:
            return groups if n else {}
        members = np.concatenate(list(groups.values()))
        buckets = np.repeat(np.arange(len(groups)), [len(m) for m in groups.values()])
        parts, first = [], begin // total
        for turn in range(first, -(-end // total)):
            order = np.argsort(mix(members, salt(seed, turn, "passes", number)))
            own = order[max(0, begin - turn * total) : end - turn * total]
            parts.append((members[own] + (np.int64(turn - first) << _COPY), buckets[own]))
        chosen, at = (np.concatenate(part) for part in zip(*parts, strict=True))
        return {bucket: chosen[at == i] for i, bucket in enumerate(groups) if (at == i).any()}

    def stream(self, *, seed: int, cursor: int = 0) -> Iterator[MicroBatch]:
        """The global stream from `cursor` samples on. A cursor inside a micro-batch starts
        with that micro-batch's rest."""
        if not self.n:
            raise ValueError("no samples")
        epoch, inside = divmod(cursor, self.n)
        while True:
            order = self.order(seed=seed, epoch=epoch)
            ends = np.cumsum(order.lengths)
            number = int(np.searchsorted(ends, inside, side="right"))
            while number < len(ends):
                samples = order.batch(number)
                begin = int(ends[number]) - len(samples)
                skip = max(0, inside - begin)
                yield MicroBatch(epoch, samples[skip:], epoch * self.n + begin + skip)
                number += 1
            epoch, inside = epoch + 1, 0


def mixture(
    sets: Sequence[Groups], *, batch_size: BatchSize, weights: Sequence[float] | None = None
) -> Mixture:
    """`weights`: the sets' shares of the samples, relative to each other; None:
    every sample once an epoch."""
    sizes = [count(groups) for groups in sets]
    if weights is None:
        return Mixture(tuple(sets), tuple(sizes), batch_size)
    wanted = [sum(sizes) * w / sum(weights) for w in weights]
    counts = [max(int(w), 1) for w in wanted]
    for i in sorted(range(len(sets)), key=lambda i: counts[i] - wanted[i])[
        : max(0, sum(sizes) - sum(counts))
    ]:
        counts[i] += 1  # what rounding down left over, to those that lost most
    return Mixture(tuple(sets), tuple(counts), batch_size)


def stream(groups: Groups, *, batch_size: BatchSize, seed: int, cursor: int = 0) -> Iterator[MicroBatch]:
    """The global stream of one set."""
    return mixture([groups], batch_size=batch_size).stream(seed=seed, cursor=cursor)
