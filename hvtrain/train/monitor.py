"""What a run says of its steps: one gather over the ranks, then numbers, and a line for who watches."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from hvtrain.parallel.context import ParallelContext
from hvtrain.train.loop import StepReport
from hvtrain.train.metrics import Metrics, loss_by_set, loss_by_sigma
from hvtrain.train.mfu import Work
from hvtrain.train.progress import ProgressLine

HISTOGRAM = 20  # entries in one


@dataclass
class Monitor:
    """`log` is called by every rank after every step, and speaks every so many."""

    ctx: ParallelContext
    metrics: Metrics
    line: ProgressLine
    steps: int  # of the run
    every: int  # steps between entries
    sets: Sequence[str] = ()  # names, by number
    work: Work | None = None  # what the device could do; None: not known, or nobody asked
    profile: int = 0  # steps between profiled ones, of several processes
    n_bad: int = 0  # samples that this rank skipped
    # seconds of this rank since the last entry, by what for
    spent: dict[str, float] = field(default_factory=dict)
    sigmas: list[np.ndarray] = field(default_factory=list)  # since the last histogram
    flops: float = 0.0
    since: float = field(default_factory=time.monotonic)

    @contextmanager
    def spending(self, what: str) -> Iterator[None]:
        begun = time.monotonic()
        try:
            yield
        finally:
            self.spent[what] = self.spent.get(what, 0.0) + time.monotonic() - begun

    @contextmanager
    def measured(self, step: int) -> Iterator[None]:
        """Around a step. Every `profile` steps, the time in collectives is measured: where they run beside
        the computing, it is not the time that they cost."""
        if not self.profile or self.ctx.world == 1 or step % self.profile:
            yield
            return
        gpu = self.ctx.device.type == "cuda"
        with torch.autograd.profiler.profile(use_device="cuda" if gpu else None, use_kineto=gpu) as seen:
            begun = time.monotonic()
            yield
            seconds = time.monotonic() - begun
        self.spent["collectives"] = collective_seconds(seen.function_events or ()) / seconds

    def log(self, r: StepReport) -> None:
        self.spent["data"] = self.spent.get("data", 0.0) + r.waited
        if self.work is not None:
            kept = r.kept or (1.0,) * len(r.work)
            self.flops += sum(
                self.work.flops(n, k) * samples for (samples, n), k in zip(r.work, kept, strict=True)
            )
        step, ctx = r.progress.step, self.ctx
        if step % self.every and step != self.steps:
            return
        wall = time.monotonic() - self.since
        collectives = self.spent.pop("collectives", None)
        shares = {what: seconds / wall for what, seconds in self.spent.items()}
        mine = (
            r.seconds, r.n_tokens, self.n_bad, self.flops, shares, r.sigma, r.sample_loss, np.array(r.sets)
        )
        everyone = ctx.gather_objects(mine)
        self.spent, self.flops, self.since = {}, 0.0, time.monotonic()
        if not ctx.is_main:
            return
        seconds, _, _, flops, waits, *_ = zip(*everyone, strict=True)
        # peers hold the same samples
        _, tokens, bad, _, _, sigma, loss, sets = zip(*everyone[:: ctx.sp], strict=True)
        values = {
            "train/loss": r.loss, "train/lr": r.result.lr, "train/grad_norm": r.result.grad_norm or 0.0,
            "train/epoch": float(r.progress.epoch), "train/samples": float(r.progress.cursor),
            "train/bad_steps": float(r.progress.bad_steps), "run/restarts": float(ctx.restarts),
            "data/bad_samples": float(sum(bad)),
            "speed/tokens_per_s": sum(tokens) / max(seconds), "speed/step_s": r.seconds,
            "speed/slowest_rank_s": max(seconds), "speed/slowest_rank": float(np.argmax(seconds)),
            "speed/data_wait_s": r.waited, "speed/memory_gib": memory_gib(ctx.device),
            **{
                f"speed/{what}_share": sum(w.get(what, 0.0) for w in waits) / len(waits)
                for what in ("data", "save")
            },
        }
        if collectives is not None:
            values["speed/collectives_share"] = collectives
        if self.work is not None:
            values["speed/mfu"] = sum(flops) / ctx.sp / (wall * ctx.world * self.work.peak)
        both = np.concatenate(sigma), np.concatenate(loss)
        parts = {**loss_by_sigma(*both), **loss_by_set(self.sets, np.concatenate(sets), both[1])}
        parts |= {f"grad_norm/{part}": norm for part, norm in r.result.norms.items()}
        self.metrics.scalars(step, values | {f"train/{name}": value for name, value in parts.items()})
        self.sigmas.append(both[0])
        if step % (HISTOGRAM * self.every) == 0 or step == self.steps:  # to make one takes a millisecond
            self.metrics.histogram("train/sigma", step, np.concatenate(self.sigmas))
            self.sigmas = []
        self.line.update(step, loss=r.loss, lr=r.result.lr, seconds=max(seconds), speed=_speed(values))


def _speed(values: dict[str, float]) -> str:
    mfu = f"  MFU {values['speed/mfu']:.1%}" if "speed/mfu" in values else ""
    waits = f"  waits for data {values['speed/data_share']:.0%}" if values["speed/data_share"] > 0.1 else ""
    return f"{values['speed/tokens_per_s']:.3g} tokens/s{mfu}{waits}"


def collective_seconds(events: Sequence) -> float:
    """In NCCL's kernels, or in gloo's own functions."""
    named: Callable = lambda event: event.name.lower().startswith(("nccl", "gloo:"))  # noqa: E731
    return sum(max(event.device_time_total, event.cpu_time_total) for event in events if named(event)) / 1e6


def memory_gib(device: torch.device) -> float:
    """Peak memory so far: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
