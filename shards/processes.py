"""Reading ahead in processes, for storage whose client holds Python's lock.

Turn n is worker n mod `workers`'s, and batches are handed out in turn: the order is that of no workers at
all. A worker collates a batch into memory that both processes map; only what lies where goes through the
pipe. The memory is used again when the last tensor that views it is gone: fresh pages cost more than the
reading, and so would torch's own way.
"""

from __future__ import annotations

import atexit
import mmap
import os
import signal
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shards.collate import New
from shards.errors import ShardError
from shards.loader import AHEAD, Batch, BatchLoader, Turn
from shards.reader import Sample, ShardSet

_ALIGNED = 64
# a worker ends when its reader does, not before
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


@dataclass(frozen=True)
class _Sent:
    """A batch whose tensors lie in a slot of shared memory."""

    batch: Batch  # without them
    fields: dict[str, tuple[torch.dtype, tuple[int, ...], int]]  # dtype, shape, offset into the slot
    slot: int
    fresh: int  # bytes, if the slot is new: its handle follows
    dropped: tuple[int, ...]  # slots that were too small


class _Slots:
    """A worker's side of the memory: each batch takes the smallest free slot that holds it, or a new one."""

    def __init__(self) -> None:
        self.memory: dict[int, np.ndarray] = {}
        self.free: set[int] = set()
        self.slot, self.n_made, self.handle = 0, 0, -1
        self.dropped: tuple[int, ...] = ()

    def place(self, samples: Sequence[Sample]) -> New:
        """Memory for a batch of these; which slot, its handle if it is new, and what it
        replaces are left in `self`."""
        n_bytes, self.handle, self.dropped = _room(samples), -1, ()
        fitting = [n for n in self.free if len(self.memory[n]) >= n_bytes]
        if fitting:
            self.slot = min(fitting, key=lambda n: len(self.memory[n]))
        else:
            self.dropped = tuple(self.free)
            for number in self.dropped:
                del self.memory[number]
            self.free.clear()
            self.slot, self.n_made = self.n_made, self.n_made + 1
            self.handle = os.memfd_create("batch")
            try:
                os.posix_fallocate(self.handle, 0, n_bytes)
            except OSError as error:
                raise ShardError(
                    f"no memory for a batch of {n_bytes} bytes ({error.strerror}); lower data.workers"
                ) from None
            self.memory[self.slot] = _mapped(self.handle, n_bytes)
        self.free.discard(self.slot)
        whole, at = torch.from_numpy(self.memory[self.slot]), 0

        def new(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            nonlocal at
            begin, at = at, at + -(-_size(shape, dtype) // _ALIGNED) * _ALIGNED
            return _view(whole, dtype, shape, begin)

        return new

    def send(self, batch: Batch, connection: Connection) -> None:
        base = self.memory[self.slot].ctypes.data
        fields = {name: (t.dtype, tuple(t.shape), t.data_ptr() - base) for name, t in batch.tensors.items()}
        fresh = len(self.memory[self.slot]) if self.handle >= 0 else 0
        connection.send(_Sent(replace(batch, tensors={}), fields, self.slot, fresh, self.dropped))
        if fresh:
            send_handle(connection, self.handle, None)
            os.close(self.handle)


def _work(connection: Connection, sets: list[ShardSet], options: dict[str, Any]) -> None:
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    slots, loader = _Slots(), BatchLoader(sets, **options)
    with suppress(EOFError, ConnectionError):  # nobody asks any more
        while True:
            turn, freed = connection.recv()
            slots.free |= freed
            try:
                batch = loader.read(turn, slots.place)
            except ShardError as error:
                connection.send(str(error))
                return
            slots.send(batch, connection)


class _Worker:
    """A process, seen from here."""

    def __init__(self, loader: BatchLoader) -> None:
        # forkserver: a fork of a process that holds a GPU and communication
        # threads would inherit their locks.
        context = get_context("forkserver")
        context.set_forkserver_preload([__name__])  # torch is imported once for all
        options = {
            "batch_size": loader.batch_size, "seed": loader.seed,
            "on_bad_sample": "skip" if loader.skip else "stop", "columns": loader.columns,
        }
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, loader.sets, options), daemon=True)
        self.process.start()
        theirs.close()
        self.slots: dict[int, np.ndarray] = {}
        self.freed: deque[int] = deque()

    def ask(self, turn: Turn) -> None:
        freed = {self.freed.popleft() for _ in range(len(self.freed))}
        with suppress(ConnectionError):  # `receive` says why
            self.connection.send((turn, freed))

    def receive(self) -> Batch:
        try:
            sent = self.connection.recv()
            if isinstance(sent, str):
                raise ShardError(sent)
            if sent.fresh:
                self.slots[sent.slot] = _mapped(handle := recv_handle(self.connection), sent.fresh)
                os.close(handle)
        except (EOFError, ConnectionError):
            self.process.join()
            raise ShardError(
                f"a reader process died (exit code {self.process.exitcode}); out of memory? lower "
                "data.workers, or set data.worker_type=thread"
            ) from None
        for number in sent.dropped:
            del self.slots[number]
        view = self.slots[sent.slot].view()  # the tensors hold this view, and nobody else does
        weakref.finalize(view, self.freed.append, sent.slot).atexit = False
        memory = torch.from_numpy(view)
        return replace(
            sent.batch, tensors={name: _view(memory, *field) for name, field in sent.fields.items()}
        )

    def close(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.join()


def read_ahead(loader: BatchLoader) -> Iterator[Batch]:
    workers: list[_Worker] = []

    def close() -> None:
        for worker in workers:
            worker.close()

    atexit.register(close)  # before multiprocessing's own waiting for its children
    try:
        workers += [_Worker(loader) for _ in range(loader.workers)]
        waiting: deque[_Worker] = deque()
        for number, turn in enumerate(loader.turns()):
            worker = workers[number % len(workers)]
            worker.ask(turn)
            waiting.append(worker)
            if len(waiting) >= AHEAD * len(workers):
                batch = waiting.popleft().receive()
                yield (
                    replace(batch, tensors={n: t.pin_memory() for n, t in batch.tensors.items()})
                    if loader.pin else batch
                )
                del batch  # its memory is free when the consumer's is
    finally:
        close()
        atexit.unregister(close)


def _mapped(handle: int, n_bytes: int) -> np.ndarray:
    return np.frombuffer(mmap.mmap(handle, n_bytes), dtype=np.uint8)


def _view(memory: Tensor, dtype: torch.dtype, shape: tuple[int, ...], at: int) -> Tensor:
    return memory[at : at + _size(shape, dtype)].view(dtype).view(shape)


def _size(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize


def _room(samples: Sequence[Sample]) -> int:
    """Bytes that a batch of these takes at most: each field as long as its longest, and its lengths."""
    longest: dict[str, int] = {}
    for sample in samples:
        for name, tensor in sample.tensors.items():
            longest[name] = max(longest.get(name, 0), tensor.nbytes)
    return max(1, sum(n * len(samples) + 8 * len(samples) + 2 * _ALIGNED for n in longest.values()))
