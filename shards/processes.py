"""Reading ahead in processes, for storage whose client holds Python's lock; torch's DataLoader carries the batches.

Worker w of n reads the turns w, w + n, ... of this rank, and the DataLoader hands their batches out in turn: the order is
that of no workers at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from shards.errors import ShardError
from shards.loader import AHEAD, Batch, BatchLoader


class _Turns(IterableDataset):
    def __init__(self, options: dict[str, Any], sets: list) -> None:
        self.options, self.sets = options, sets

    def __iter__(self) -> Iterator[Batch | str]:
        info = get_worker_info()
        assert info is not None
        loader = BatchLoader(self.sets, **self.options)
        for turn in islice(loader.turns(), info.id, None, info.num_workers):
            try:
                yield loader.read(turn)
            except ShardError as error:  # as text: torch would wrap it into a traceback
                yield str(error)
                return


def read_ahead(loader: BatchLoader) -> Iterator[Batch]:
    options = {
        "batch_size": loader.batch_size, "dp_rank": loader.dp_rank, "dp_size": loader.dp_size, "seed": loader.seed,
        "cursor": loader.cursor, "on_bad_sample": "skip" if loader.skip else "stop", "columns": loader.columns,
    }
    # forkserver: a fork of a process that holds a GPU and communication threads would inherit their locks.
    source = DataLoader(
        _Turns(options, loader.sets), batch_size=None, num_workers=loader.workers, prefetch_factor=AHEAD,
        multiprocessing_context="forkserver",
    )
    try:
        for batch in source:
            if isinstance(batch, str):
                raise ShardError(batch)
            if loader.pin:
                batch = replace(batch, tensors={name: t.pin_memory() for name, t in batch.tensors.items()})
            yield batch
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise ShardError(
            f"a reader process died ({str(error).splitlines()[0]}); out of memory? lower data.workers, or set "
            "data.worker_type=thread"
        ) from None
