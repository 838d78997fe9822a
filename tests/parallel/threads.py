"""Ranks as threads of one process: the messages of parallel/usp.py without
processes, for tests that must be fast.

What the collectives are is said here once more, in the plainest way; that the real ones are the same,
`test_attention.py` shows with processes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import Queue
from typing import Any

import pytest
import torch
from torch import Tensor

from hvtrain.parallel import usp
from hvtrain.parallel.context import ParallelContext

Group = tuple[int, ...]
_me = threading.local()
WAIT_S = 60.0


class Wires:
    """What connects the threads; everything sent round a ring is noted."""

    def __init__(self, world: int) -> None:
        self.queues: dict[tuple[int, int], Queue[Tensor | None]] = {
            (a, b): Queue() for a in range(world) for b in range(world)
        }
        self.slots: dict[Group, list[Any]] = {}
        self.barriers: dict[Group, threading.Barrier] = {}
        self.lock = threading.Lock()
        self.sent: list[tuple[int, Tensor]] = []  # (by rank, what)
        self.exchanged: list[Tensor] = []  # what went through all-to-alls, of all ranks

    def exchange(self, group: Group, x: Any) -> list[Any]:
        """Everyone's x, in the group's order."""
        with self.lock:
            slots = self.slots.setdefault(group, [None] * len(group))
            barrier = self.barriers.setdefault(group, threading.Barrier(len(group)))
        slots[group.index(_me.rank)] = x
        barrier.wait(WAIT_S)
        everyone = list(slots)
        barrier.wait(WAIT_S)
        return everyone

    def cut(self) -> None:
        """Let nobody wait for a rank that failed."""
        for barrier in self.barriers.values():
            barrier.abort()
        for queue in self.queues.values():
            queue.put(None)


class Ring:
    """yunchang's RingComm: to the next rank of the group, from the one before; received when waited for."""

    def __init__(self, wires: Wires, group: Group) -> None:
        i = group.index(_me.rank)
        self.wires, self.to, self.of = wires, group[(i + 1) % len(group)], group[i - 1]
        self.coming: list[Tensor] = []
        self.going: list[Tensor] = []
        self.committed = False

    def send_recv(self, x: Tensor) -> Tensor:
        self.going.append(x.clone())
        self.coming.append(torch.full_like(x, float("nan")))  # not to be read before it is there
        return self.coming[-1]

    def commit(self) -> None:
        assert not self.committed, "committed twice"
        self.committed = True
        for x in self.going:
            self.wires.sent.append((_me.rank, x))
            self.wires.queues[_me.rank, self.to].put(x)

    def wait(self) -> None:
        assert self.committed, "waited before it was committed"
        for x in self.coming:
            arrived = self.wires.queues[self.of, _me.rank].get(timeout=WAIT_S)
            if arrived is None:
                raise threading.BrokenBarrierError
            x.copy_(arrived)
        self.coming, self.going, self.committed = [], [], False


def run_threads(
    monkeypatch: pytest.MonkeyPatch, function: Callable[[ParallelContext], Any], *, ulysses: int, ring: int
) -> tuple[list[Any], Wires]:
    """[function(ctx of rank 0), ...] of one sequence-parallel group, and the wires."""
    world = ulysses * ring
    wires = Wires(world)
    grid = torch.arange(world).reshape(ring, ulysses)

    class Gather(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, dim, group):
            ctx.dim, ctx.group = dim, group
            return torch.cat(wires.exchange(group, x), dim)

        @staticmethod
        def backward(ctx, grad):
            whole = torch.stack(wires.exchange(ctx.group, grad)).sum(0)
            return whole.chunk(len(ctx.group), ctx.dim)[ctx.group.index(_me.rank)], None, None

    class Trade(torch.autograd.Function):
        """Cut along `cut`, a piece to each rank; those that arrive are joined along `join`."""

        @staticmethod
        def forward(ctx, x, group, cut, join):
            ctx.group, ctx.cut, ctx.join = group, cut, join
            wires.exchanged.append(x)
            mine = group.index(_me.rank)
            return torch.cat([y.chunk(len(group), cut)[mine] for y in wires.exchange(group, x)], join)

        @staticmethod
        def backward(ctx, grad):
            return Trade.apply(grad, ctx.group, ctx.join, ctx.cut), None, None, None

    monkeypatch.setattr(
        usp, "gather", lambda x, dim, group: x if group is None else Gather.apply(x, dim, group)
    )
    monkeypatch.setattr(usp, "heads_to_ranks", lambda x, group: Trade.apply(x, group, 2, 1))
    monkeypatch.setattr(usp, "tokens_to_ranks", lambda x, group: Trade.apply(x, group, 1, 2))
    monkeypatch.setattr(usp, "RingComm", lambda group: Ring(wires, group))
    results: list[Any] = [None] * world
    errors: list[BaseException] = []

    def work(rank: int) -> None:
        _me.rank = rank
        row, column = rank // ulysses, rank % ulysses
        groups = tuple(grid[row].tolist()), tuple(grid[:, column].tolist()), tuple(range(world))
        ulysses_group, ring_group, sp_group = (g if len(g) > 1 else None for g in groups)
        ctx = ParallelContext(
            world=world, rank=rank, ulysses=ulysses, ring=ring, sp_rank=rank, ulysses_group=ulysses_group,
            ring_group=ring_group, sp_group=sp_group,
        )  # type: ignore[arg-type]  # fmt: skip
        try:
            results[rank] = function(ctx)
        except BaseException as error:
            errors.append(error)
            wires.cut()

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * WAIT_S)
    if errors:
        raise errors[0]
    return results, wires
