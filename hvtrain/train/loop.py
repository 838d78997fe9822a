"""The training loop: what happens when is read from top to bottom. It knows neither
model nor loss nor DeepSpeed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from hvtrain.errors import HvtrainError
from hvtrain.parallel.context import ParallelContext
from hvtrain.stopping import StopFlag
from hvtrain.train.checkpoint import Progress
from hvtrain.train.engine import Engine, StepResult
from hvtrain.train.objective import Where


@dataclass(frozen=True)
class Cadence:
    """How long, and how often what happens. 0: never."""

    steps: int
    grad_accum: int
    save: int
    save_samples: int  # of all ranks together
    evaluate: int
    preview: int
    max_bad_steps: int
    preview_samples: int = 0  # of all ranks together
    preview_first: bool = False  # before the first step


@dataclass(frozen=True)
class StepReport:
    """One optimizer step, as this rank saw it."""

    progress: Progress
    result: StepResult
    loss: float
    sample_loss: np.ndarray
    sigma: np.ndarray
    n_tokens: int
    keys: tuple[str, ...]
    seconds: float
    waited: float  # of these, for data
    sets: tuple[int, ...] = ()  # of each sample: the number of its shard set
    work: tuple[tuple[int, int], ...] = ()  # of each micro-step: samples, and image tokens of one
    # of each micro-step: share of attention's pairs of image tokens that were computed
    kept: tuple[float, ...] = ()


@dataclass(frozen=True)
class Hooks:
    """What the loop does to the world; each is called by every rank."""

    micro_step: Callable  # (batch, Where) -> (MicroResult, n_tokens)
    after_update: Callable[[], None]
    log: Callable[[StepReport], None]
    save: Callable[[Progress], None]
    evaluate: Callable[[Progress], None]
    preview: Callable[[int], None]
    at: Callable[[int, str], None] = lambda step, phase: None  # what this rank is doing, for whoever watches
    measured: Callable[[int], AbstractContextManager] = lambda step: nullcontext()  # around a step


def train(
    engine: Engine, batches: Iterator, hooks: Hooks, *, cadence: Cadence, start: Progress, seed: int,
    ctx: ParallelContext, folder: Path | None = None,
) -> bool:
    """Run from `start` to cadence.steps. True: finished; False: stopped early by a
    signal, with everything saved."""
    progress, bad_in_a_row = start, 0
    with StopFlag(folder, show=ctx.is_main) as stop:
        if cadence.preview_first and not progress.step:
            hooks.preview(0)
        while progress.step < cadence.steps:
            with hooks.measured(progress.step + 1):
                report = _step(engine, batches, hooks, cadence=cadence, progress=progress, seed=seed, ctx=ctx)
            before, progress = progress, report.progress  # the same on all ranks
            bad_in_a_row = bad_in_a_row + 1 if report.result.skipped else 0
            hooks.after_update()
            hooks.log(report)
            if bad_in_a_row >= cadence.max_bad_steps > 0:
                raise _not_finite(report, bad_in_a_row, ctx)
            if _due(progress.step, cadence.evaluate):
                hooks.evaluate(progress)
            if _due(progress.step, cadence.preview) or _passed(before, progress, cadence.preview_samples):
                hooks.preview(progress.step)
            stopping = stop.agreed(ctx) and progress.step < cadence.steps
            passed = _passed(before, progress, cadence.save_samples)
            asked = stop.asked_to_save(ctx)
            if (
                _due(progress.step, cadence.save) or passed or asked or stopping
                or progress.step == cadence.steps
            ):
                hooks.save(progress)
            if stopping:
                return False
    return True


def _step(
    engine: Engine, batches: Iterator, hooks: Hooks, *, cadence: Cadence, progress: Progress, seed: int,
    ctx: ParallelContext,
) -> StepReport:
    started, waited, results, keys, sets, work = time.monotonic(), 0.0, [], [], [], []
    outcome = None
    for micro in range(cadence.grad_accum):
        asked = time.monotonic()
        hooks.at(progress.step + 1, "reading data")
        batch = next(batches)
        waited += time.monotonic() - asked
        where = Where(seed, progress.step, micro, cadence.grad_accum, ctx.dp_rank, ctx.dp)
        hooks.at(progress.step + 1, "in the forward pass")
        result, tokens = hooks.micro_step(batch, where)
        hooks.at(progress.step + 1, "in the backward pass")
        outcome = engine.accumulate(result.loss, last=micro == cadence.grad_accum - 1)
        results.append(result)
        keys += list(batch.keys)
        sets += list(batch.sets)
        work.append((len(batch.keys), tokens // len(batch.keys)))
    assert outcome is not None
    losses = torch.cat([r.per_sample for r in results]).float().cpu().numpy()
    after = replace(
        progress, step=progress.step + 1, cursor=batch.cursor, epoch=batch.epoch,
        bad_steps=progress.bad_steps + outcome.skipped,
    )
    hooks.at(progress.step + 1, "averaging the loss")
    mean = ctx.all_reduce_mean(sum(r.loss.item() for r in results) / len(results))
    return StepReport(
        progress=after, result=outcome, loss=mean, sample_loss=losses,
        sigma=torch.cat([r.sigma for r in results]).float().cpu().numpy(),
        n_tokens=sum(n * of_one for n, of_one in work), keys=tuple(keys), seconds=time.monotonic() - started,
        waited=waited, sets=tuple(sets), work=tuple(work), kept=tuple(r.kept for r in results),
    )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _passed(before: Progress, after: Progress, every_samples: int) -> bool:
    return every_samples > 0 and after.cursor // every_samples > before.cursor // every_samples


def _not_finite(report: StepReport, n: int, ctx: ParallelContext) -> HvtrainError:
    """Names the samples of all ranks: the one that prints may have had none of the bad ones. Collective."""
    losses: dict[str, float] = {}
    for mine in ctx.gather_objects(dict(zip(report.keys, report.sample_loss.tolist(), strict=True))):
        losses |= mine
    guilty = {key: loss for key, loss in losses.items() if not math.isfinite(loss)} or losses
    return HvtrainError(
        f"step {report.progress.step}: {n} steps in a row had no finite gradient (samples of the last: "
        + ", ".join(f"{key} loss {loss:g}" for key, loss in guilty.items())
        + "); lower optim.lr, or check these samples; the newest checkpoint is from before"
    )
