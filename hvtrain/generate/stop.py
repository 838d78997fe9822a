"""Leaving in time: a signal is noted at once and obeyed at the end of a sampling
step, by all ranks of the job."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from hvtrain.parallel.context import ParallelContext
from hvtrain.stopping import arrived

_POLL_S = 0.2


class Stopped(Exception):
    """Asked to stop by a signal. What is finished is kept, and the same command goes on from there."""


class Stop:
    """SIGTERM or SIGUSR1, if `hvtrain.stopping.remember` was called. Ranks that share a video
    decide together; the other groups are told through the job's key-value store, because they
    are at other videos and steps."""

    def __init__(self, ctx: ParallelContext) -> None:
        self.ctx, self.raised = ctx, False
        self.store = dist.distributed_c10d._get_default_store() if ctx.world > 1 else None
        self.key = ""
        if self.store is not None:  # every rank counts its runs, and all count the same
            self.key = f"hvtrain/generate/{self.store.add(f'hvtrain/generate/runs/{ctx.rank}', 1)}"

    @property
    def noted(self) -> bool:
        """Whether this rank knows of a signal."""
        if not self.raised and arrived():
            self.raised = True
            if self.store is not None:
                self.store.set(f"{self.key}/stop", "1")
        return self.raised

    def check(self) -> None:
        """Raises Stopped on all ranks of a video if one knows of a signal. Collective among them."""
        if self.agreed():
            raise Stopped

    def agreed(self) -> bool:
        if not self.noted and self.store is not None:
            self.raised = self.store.check([f"{self.key}/stop"])
        self.raised = self.any_peer(self.raised)
        return self.raised

    def any_peer(self, flag: bool) -> bool:
        """Whether any rank that shares this one's videos says so. Collective among them."""
        if self.ctx.sp_group is None:
            return flag
        found = torch.tensor(float(flag))  # on the CPU: it does not wait for the GPU's queue
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.ctx.sp_group)
        return found.item() > 0

    def wait_for_all(self) -> None:
        """For every rank to come here, however long it takes: a collective would
        give up after its time limit."""
        if self.store is None:
            return
        self.store.set(f"{self.key}/done/{self.ctx.rank}", "1")
        while not self.store.check([f"{self.key}/done/{rank}" for rank in range(self.ctx.world)]):
            time.sleep(_POLL_S)
