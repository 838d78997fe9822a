"""Weights that one process reads for the others: broadcast to their devices, or laid
into memory that a machine shares.

A job of many processes then reads a file once, and its host memory holds one copy of
the model, not one for each GPU.
"""

from __future__ import annotations

import logging
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hvtrain.parallel.context import ParallelContext

log = logging.getLogger(__name__)
Make = Callable[[], Sequence[Tensor | None]]
# `make` is called where the file is read; everyone gets what it gave
Spread = Callable[[Make], Sequence[Tensor | None]]


class Outline(NamedTuple):
    """A tensor without its values."""

    shape: torch.Size
    dtype: torch.dtype

    @property
    def n_bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


@contextmanager
def spread_weights(
    ctx: ParallelContext, *, frozen: bool, device: torch.device, cut: bool = False
) -> Iterator[Spread | None]:
    """How this job's processes get the weights that are to lie on `device`. None: each reads for itself.

    `cut`: ZeRO-3 sends every tensor from rank 0 itself, so the others need only room, whose pages nobody
    touches. On the CPU, `frozen` weights are shared; what is trained is every process's own. Collective.
    """
    if ctx.world == 1:
        yield None
    elif device.type == "cpu" and frozen and not cut:
        memory = _SharedMemory.of_this_machine(ctx)
        try:
            yield memory
        finally:
            if memory is not None:
                memory.close()
    else:
        yield lambda make: _from_first(ctx, make, device, send=not cut)


def _from_first(
    ctx: ParallelContext, make: Make, device: torch.device, *, send: bool
) -> Sequence[Tensor | None]:
    tensors: list[Tensor | None] = []

    def read() -> Sequence[Tensor | None]:
        tensors.extend(t if t is None else t.contiguous() for t in make())
        return tensors

    told = _outlines(read if ctx.is_main else None, source=0)
    if not ctx.is_main:
        tensors = [o if o is None else torch.empty(o.shape, dtype=o.dtype, device=device) for o in told]
    for tensor in tensors if send else ():
        if tensor is not None and tensor.numel():
            dist.broadcast(tensor.view(-1).view(torch.uint8), 0)  # as bytes: float8 has no collectives
    return tensors


def _outlines(
    make: Make | None, *, source: int, group: dist.ProcessGroup | None = None
) -> list[Outline | None]:
    """Of what `make` gives on the process that has it, for all. Its mistakes are raised on
    all: they would wait for ever."""
    said: list[Any] = [None]
    if make is not None:
        try:
            said = [[t if t is None else Outline(t.shape, t.dtype) for t in make()]]
        except Exception as error:
            said = [error]
    dist.broadcast_object_list(said, src=source, group=group)
    if isinstance(said[0], Exception):
        raise said[0]
    return said[0]


class _SharedMemory:
    """An unnamed file in memory that grows by every tensor and that all processes of this machine map: unlike
    /dev/shm, it knows no limit of its own (64 MB in a container)."""

    def __init__(self, file: int, reader: int, group: dist.ProcessGroup | None, *, reads: bool) -> None:
        self.file, self.reader, self.group, self.reads, self.end = file, reader, group, reads, 0

    @classmethod
    def of_this_machine(cls, ctx: ParallelContext) -> _SharedMemory | None:
        """Its first process reads. None, and said, where processes do not see each other's files."""
        reader = ctx.rank - ctx.local_rank
        machines = sorted({*ctx.gather_objects(reader)})
        group = None
        for first, after in zip(machines, [*machines[1:], ctx.world]) if len(machines) > 1 else ():
            made = dist.new_group(list(range(first, after)))  # every process makes every group
            group = made if first == reader else group
        file = os.memfd_create("hvtrain-weights") if ctx.rank == reader else -1
        path = ctx.gather_objects(f"/proc/{os.getpid()}/fd/{file}")[reader]
        try:
            file = os.open(path, os.O_RDWR) if file < 0 else file
        except OSError as error:
            log.warning(
                "the weights are not shared between this machine's processes: %s; each reads them", error
            )
        if ctx.any(file < 0):
            if file >= 0:
                os.close(file)
            return None
        return cls(file, reader, group, reads=ctx.rank == reader)

    def __call__(self, make: Make) -> list[Tensor | None]:
        start = self.end
        told = _outlines(
            partial(self._read, make) if self.reads else None, source=self.reader, group=self.group
        )
        self.end = start
        return [o if o is None else self._view(o) for o in told]

    def _read(self, make: Make) -> list[Tensor | None]:
        return [t if t is None else self._place(t) for t in make()]

    def _place(self, value: Tensor) -> Tensor:
        os.ftruncate(self.file, self.end + max(1, value.nbytes))
        return self._view(Outline(value.shape, value.dtype)).copy_(value)

    def _view(self, what: Outline) -> Tensor:
        """The next tensor of the file."""
        n = max(1, what.n_bytes)
        mapped = mmap.mmap(self.file, n, offset=self.end)
        self.end += -(-n // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        if not what.n_bytes:
            return torch.empty(what.shape, dtype=what.dtype)
        return torch.frombuffer(mapped, dtype=what.dtype, count=what.shape.numel()).view(what.shape)

    def close(self) -> None:
        os.close(self.file)  # what is mapped stays
