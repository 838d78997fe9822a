"""A shard set as a `webdataset` pipeline, for people's own training code."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from torch import Tensor
from torch.utils.data import get_worker_info

from shards.collate import choose_caption, collate
from shards.order import mix, salt
from shards.reader import Sample, ShardSet, open_set


def pipeline(
    root: str | Path, *, batch_size: int | None = 1, columns: Sequence[str] | None = None, seed: int = 0,
    buffer: int = 64
) -> webdataset.DataPipeline:
    """Batches of one pass over a set (a directory or a URL), further stages of webdataset may follow.

    A batch is a dict: the fields stacked as `BatchLoader` does ("latents" [B C T H W], "text" [B L E]
    zero-padded, "text_len" [B], ...), "__key__" and "json", each a list. It holds one bucket; the last of a
    bucket may be short. `batch_size` None: samples, one by one. Columns are joined by key; None reads all.
    Nodes and DataLoader workers share the tars out among them as webdataset does, so they may have unequal
    numbers of batches. Tars come in an order of (seed, pass), their samples shuffled through `buffer` of them
    (0: as they lie). Of a URL, a tar is one request. Raises ShardError.
    """
    found = open_set(root)
    return webdataset.DataPipeline(
        _Tars(found),
        webdataset.split_by_node,
        webdataset.split_by_worker,
        _Samples(found, tuple(columns or found.manifest.columns), seed, buffer),
        _Batches(batch_size, found.manifest.ragged) if batch_size else None,
    )


class _Tars:
    """Each tar of an epoch by its number, as often as the manifest repeats it."""

    def __init__(self, found: ShardSet) -> None:
        self.numbers = [n for n, chunk in enumerate(found.manifest.chunks) for _ in range(chunk.repeats)]

    def __call__(self) -> Iterator[int]:
        return iter(self.numbers)


class _Samples:
    """Of the tars of this worker, each pass in its own order of tars and shuffled in its own way."""

    def __init__(self, found: ShardSet, columns: tuple[str, ...], seed: int, buffer: int) -> None:
        self.found, self.columns, self.seed, self.buffer, self.passes = found, columns, seed, buffer, 0

    def __call__(self, numbers: Iterable[int]) -> Iterable[dict[str, Any]]:
        # one that is new for each pass counts none, but torch gives it another seed
        worker = get_worker_info()
        turn = (self.passes, worker.seed if worker else 0)
        self.passes += 1
        rows = self._rows(numbers, turn)
        if not self.buffer:
            return rows
        rng = random.Random(salt(self.seed, *turn))
        return webdataset.shuffle(self.buffer, initial=self.buffer, rng=rng)(rows)

    def _rows(self, numbers: Iterable[int], turn: tuple[int, int]) -> Iterator[dict[str, Any]]:
        mine = np.array(list(numbers), dtype=np.int64)
        index = 0
        for number in mine[np.argsort(mix(np.arange(len(mine)), salt(self.seed, *turn)))].tolist():
            chunk = self.found.manifest.chunks[number]
            for sample in self.found.walk(chunk, self.columns):
                sample = choose_caption(sample, seed=self.seed, epoch=salt(*turn), index=index)
                yield {
                    "__key__": sample.key, "__bucket__": chunk.bucket, "json": sample.meta, **sample.tensors
                }
                index += 1


class _Batches:
    """Neighbours of one bucket; what is left of each at the end comes last."""

    def __init__(self, size: int, ragged: frozenset[str]) -> None:
        self.size, self.ragged = size, ragged

    def __call__(self, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        waiting: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            group = waiting.setdefault(row["__bucket__"], [])
            group.append(row)
            if len(group) == self.size:
                yield self._batch(waiting.pop(row["__bucket__"]))
        yield from map(self._batch, waiting.values())

    def _batch(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        tensors = [{name: value for name, value in row.items() if isinstance(value, Tensor)} for row in rows]
        samples = [Sample(row["__key__"], fields, row["json"]) for row, fields in zip(rows, tensors)]
        return {
            "__key__": [s.key for s in samples], "json": [s.meta for s in samples],
            **collate(samples, ragged=self.ragged)
        }
