"""Held-out loss at fixed quantiles of the training distribution and fixed noise:
comparable from step to step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from hvtrain.parallel.context import ParallelContext
from hvtrain.rng import generator
from hvtrain.train.objective import Objective
from shards import ShardSet
from shards.loader import BatchLoader


@dataclass(frozen=True)
class HeldOut:
    sets: Sequence[ShardSet]
    batch_size: int
    quantiles: tuple[float, ...]
    max_batches: int
    columns: tuple[str, ...] | None = None  # that the model reads; None: all


@torch.no_grad()
def held_out_loss(
    models: Callable[[float], nn.Module], objective: Objective, held: HeldOut, *, ctx: ParallelContext
) -> dict[str, float]:
    """{"eval/loss": mean, "eval/loss_q0.1": ...}; the same on all ranks. Collective. `models`: who predicts
    at a noise level, in evaluation mode."""
    loader = BatchLoader(
        list(held.sets), batch_size=held.batch_size, dp_rank=ctx.dp_rank, dp_size=ctx.dp, seed=0, workers=0,
        columns=held.columns,
    )
    per_epoch = -(-sum(len(s) for s in held.sets) // (held.batch_size * ctx.dp))
    n_batches = max(1, min(held.max_batches, per_epoch))
    sums = dict.fromkeys(held.quantiles, 0.0)
    stream = iter(loader)
    for index in range(n_batches):
        batch = next(stream).tensors
        for q in held.quantiles:
            u = torch.full((len(batch["latents"]),), q, dtype=torch.float64)
            sigma = objective.quantile(u, batch["latents"].shape)
            draw = generator(0, step=index, dp_rank=ctx.dp_rank, stream=f"held-out-{q}")
            sums[q] += objective.compare(models(float(sigma[0])), batch, sigma=sigma, draw=draw).loss.item()
    means = {f"eval/loss_q{q:g}": ctx.all_reduce_mean(total / n_batches) for q, total in sums.items()}
    return {"eval/loss": sum(means.values()) / len(means), **means}
