"""Batches for training: this rank's micro-batches of the global stream, read ahead by threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from shards.errors import ShardError
from shards.order import MicroBatch, stream
from shards.reader import Sample, ShardSet

AHEAD = 2  # batches in flight per worker


@dataclass(frozen=True)
class Batch:
    """Stacked samples of one bucket."""

    keys: tuple[str, ...]
    tensors: Mapping[str, Tensor]  # "latents" [B C T H W], "text" [B L E] zero-padded, "text_len" [B], "pooled" [B P]
    meta: tuple[Mapping[str, Any], ...]
    epoch: int  # whole epochs consumed by then, the same on every rank
    cursor: int  # samples consumed by all ranks once each has taken its micro-batch of this round


class BatchLoader:
    """Endless. `workers` threads read ahead (0: read when asked); the order does not depend on their number."""

    def __init__(
        self,
        sets: ShardSet | Sequence[ShardSet],
        *,
        batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        seed: int = 0,
        cursor: int = 0,
        workers: int = 0,
    ) -> None:
        self.sets = [sets] if isinstance(sets, ShardSet) else list(sets)
        self.batch_size, self.dp_rank, self.dp_size = batch_size, dp_rank, dp_size
        self.seed, self.cursor, self.workers = seed, cursor, workers
        self.places = [(s, i) for s in self.sets for i in range(len(s))]
        if not self.places:
            raise ShardError(f"no samples in {', '.join(str(s.root) for s in self.sets) or 'an empty list of shard sets'}")

    def state(self) -> int:
        """The cursor after the batch that was handed out last."""
        return self.cursor

    def __iter__(self) -> Iterator[Batch]:
        if not self.workers:
            for micro in self._mine():
                yield self._hand_out(self._read(micro))
            return
        with ThreadPoolExecutor(self.workers) as pool:
            waiting: deque[Future[Batch]] = deque()
            mine = self._mine()
            try:
                for micro in islice(mine, AHEAD * self.workers):
                    waiting.append(pool.submit(self._read, micro))
                while True:
                    batch = waiting.popleft().result()
                    waiting.append(pool.submit(self._read, next(mine)))
                    yield self._hand_out(batch)
            finally:
                for future in waiting:
                    future.cancel()

    def _hand_out(self, batch: Batch) -> Batch:
        self.cursor = batch.cursor
        return batch

    def _mine(self) -> Iterator[MicroBatch]:
        """This rank's micro-batches; `begin` and `epoch` become those after the whole round."""
        buckets = [bucket for s in self.sets for bucket in s.buckets]
        everyone = stream(buckets, batch_size=self.batch_size, seed=self.seed, cursor=self.cursor)
        while True:
            around = list(islice(everyone, self.dp_size))
            after = around[-1].begin + len(around[-1].samples)
            yield replace(around[self.dp_rank], begin=after, epoch=after // len(buckets))

    def _read(self, micro: MicroBatch) -> Batch:
        found = [self.places[index] for index in micro.samples]
        samples = [shard_set.get(index) for shard_set, index in found]
        return Batch(
            keys=tuple(s.key for s in samples), tensors=collate(samples), meta=tuple(s.meta for s in samples),
            epoch=micro.epoch, cursor=micro.begin,
        )


def collate(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Stack equal shapes; fields in RAGGED are padded with zeros and get a NAME_len."""
    names = list(samples[0].tensors)
    batch: dict[str, Tensor] = {}
    for name in names:
        values = [_field(sample, name) for sample in samples]
        if name in RAGGED:
            batch |= RAGGED[name](name, values)
        else:
            shapes = {tuple(v.shape) for v in values}
            if len(shapes) > 1:
                keys = ", ".join(s.key for s in samples)
                raise ShardError(f"samples {keys}: '{name}' has shapes {sorted(shapes)} in one bucket")
            batch[name] = torch.stack(values)
    return batch


def _field(sample: Sample, name: str) -> Tensor:
    if name not in sample.tensors:
        raise ShardError(f"sample {sample.key} lacks the field '{name}' that others have; encode that column again")
    return sample.tensors[name]


def _padded(name: str, values: Sequence[Tensor]) -> dict[str, Tensor]:
    return {
        name: torch.nn.utils.rnn.pad_sequence(list(values), batch_first=True),
        f"{name}_len": torch.tensor([len(v) for v in values]),
    }


RAGGED: dict[str, Callable[[str, Sequence[Tensor]], dict[str, Tensor]]] = {"text": _padded}
