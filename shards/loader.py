"""Batches for training: this rank's micro-batches of the global stream, read
ahead by threads or processes."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Literal

import numpy as np
from torch import Tensor

from shards.buffers import empty
from shards.collate import New, choose_caption, collate
from shards.errors import ShardError
from shards.order import BatchSize, MicroBatch, Mixture, mixture
from shards.reader import Sample, ShardSet

AHEAD = 2  # batches in flight per worker


@dataclass(frozen=True)
class Turn:
    """What this rank reads, and where the stream is once every rank has read its part of the round."""

    micro: MicroBatch
    cursor: int
    epoch: int


@dataclass(frozen=True)
class Batch:
    """Stacked samples of one bucket."""

    keys: tuple[str, ...]
    # "latents" [B C T H W]; ragged fields [B L ...] zero-padded, with NAME_len [B]
    tensors: Mapping[str, Tensor]
    meta: tuple[Mapping[str, Any], ...]
    epoch: int  # whole epochs consumed by then, the same on every rank
    cursor: int  # samples consumed by all ranks once each has taken its micro-batch of this round
    sets: tuple[int, ...] = ()  # of each sample: the number of its set
    bad: tuple[str, ...] = ()  # one message per sample that another one stands in for


@dataclass(frozen=True)
class Phase:
    """What is read from a step on, until the next phase begins."""

    begin: int
    mixture: Mixture


class BatchLoader:
    """Endless. `workers` threads or processes read ahead (0: read when asked); the
    order does not depend on them.

    on_bad_sample: "stop" raises the ShardError that names file and key; "skip" puts the bucket's next sound
    sample in the bad one's place and says so in Batch.bad. `pin`: batches in page-locked memory. `columns`:
    those of them that a set has are read, and no others; None reads all. `phases`: instead of all samples,
    each once an epoch; a step is `per_step` micro-batches, and the loader begins at `step`. A phase goes on
    in its own stream from where the cursor is: the cursor says all.
    """

    def __init__(
        self,
        sets: ShardSet | Sequence[ShardSet],
        *,
        batch_size: BatchSize,
        dp_rank: int = 0,
        dp_size: int = 1,
        seed: int = 0,
        cursor: int = 0,
        workers: int = 0,
        worker_type: Literal["thread", "process"] = "thread",
        on_bad_sample: Literal["stop", "skip"] = "stop",
        pin: bool = False,
        columns: Sequence[str] | None = None,
        phases: Sequence[Phase] = (),
        step: int = 0,
        per_step: int = 1,
    ) -> None:
        self.sets = [sets] if isinstance(sets, ShardSet) else list(sets)
        self.batch_size, self.dp_rank, self.dp_size = batch_size, dp_rank, dp_size
        self.seed, self.cursor, self.workers = seed, cursor, workers
        self.worker_type, self.skip, self.pin = worker_type, on_bad_sample == "skip", pin
        self.columns = columns
        self.read_of = [
            tuple(c for c in s.manifest.columns if columns is None or c in columns) for s in self.sets
        ]
        self.begins = np.cumsum([0, *map(len, self.sets)])
        self.groups = joined(s.groups(int(b)) for s, b in zip(self.sets, self.begins))
        self.ragged = frozenset().union(*(s.manifest.ragged for s in self.sets))
        self.phases = list(phases) or [Phase(0, mixture([self.groups], batch_size=batch_size))]
        self.step, self.per_step = step, per_step
        if not self.groups:
            raise ShardError(
                f"no samples in {', '.join(s.name for s in self.sets) or 'an empty list of shard sets'}"
            )

    def state(self) -> int:
        """The cursor after the batch that was handed out last."""
        return self.cursor

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._ahead():
            self.cursor = batch.cursor
            yield batch

    def _ahead(self) -> Iterator[Batch]:
        if not self.workers:
            yield from map(self.read, self.turns())
        elif self.worker_type == "process":
            from shards.processes import read_ahead

            yield from read_ahead(self)
        else:
            yield from in_threads(self.turns(), self.read, self.workers)

    def turns(self) -> Iterator[Turn]:
        """This rank's micro-batches."""
        step, cursor = self.step, self.cursor
        ends = [phase.begin for phase in self.phases[1:]]
        for phase, end in zip(self.phases, [*ends, math.inf]):
            everyone = phase.mixture.stream(seed=self.seed, cursor=cursor) if step < end else iter(())
            while step < end:
                for _ in range(self.per_step):
                    around = list(islice(everyone, self.dp_size))
                    cursor = around[-1].begin + len(around[-1].samples)
                    yield Turn(around[self.dp_rank], cursor, cursor // phase.mixture.n)
                step += 1

    def read(self, turn: Turn, place: Callable[[Sequence[Sample]], New] | None = None) -> Batch:
        """Both kinds of workers end here. `place`: where the memory for a batch
        of these samples comes from."""
        bad: list[str] = []
        samples = [self._sample(index, turn.micro.epoch, bad) for index in turn.micro.samples]
        new = place(samples) if place else partial(empty, pin=self.pin)
        return Batch(
            keys=tuple(s.key for s in samples), tensors=collate(samples, ragged=self.ragged, new=new),
            meta=tuple(s.meta for s in samples), epoch=turn.epoch, cursor=turn.cursor, bad=tuple(bad),
            sets=tuple((np.searchsorted(self.begins, turn.micro.samples, side="right") - 1).tolist()),
        )

    def _sample(self, index: int, epoch: int, bad: list[str]) -> Sample:
        try:
            return self._get(index, epoch)
        except ShardError as error:
            if not self.skip:
                raise
            bad.append(str(error))
            return self._stand_in(index, epoch, error)

    def _stand_in(self, index: int, epoch: int, error: ShardError) -> Sample:
        """The next sound sample of the same bucket: all ranks keep equally many batches of equal size."""
        members = next(m for m in self.groups.values() if m[0] <= index <= m[-1] and index in m)
        at = int(np.searchsorted(members, index))
        for other in (*members[at + 1 :], *members[:at]):
            try:
                return self._get(int(other), epoch)
            except ShardError:
                continue
        raise ShardError(f"{error}; and its bucket has no sound sample to stand in for it")

    def _get(self, index: int, epoch: int) -> Sample:
        number = int(np.searchsorted(self.begins, index, side="right")) - 1
        sample = self.sets[number].get(index - int(self.begins[number]), self.read_of[number])
        return choose_caption(sample, seed=self.seed, epoch=epoch, index=index)


def joined(parts: Iterator[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The groups of several sets as one."""
    found: dict[str, list[np.ndarray]] = {}
    for groups in parts:
        for bucket, members in groups.items():
            found.setdefault(bucket, []).append(members)
    return {bucket: np.concatenate(arrays) for bucket, arrays in found.items() if sum(map(len, arrays))}


def in_threads(turns: Iterator[Turn], read: Callable[[Turn], Batch], workers: int) -> Iterator[Batch]:
    """Copying and checksums run outside Python's lock, so threads do for local
    tars, and share one page cache."""
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[Batch]] = deque()
        try:
            for turn in islice(turns, AHEAD * workers):
                waiting.append(pool.submit(read, turn))
            while True:
                batch = waiting.popleft().result()
                waiting.append(pool.submit(read, next(turns)))
                yield batch
        finally:
            for future in waiting:
                future.cancel()
