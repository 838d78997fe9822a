"""Held-out losses around a merge: of the base, of each LoRA alone, and of all together.

On a GPU the model lies there once, in bfloat16, and computes under autocast as in training. No weight
is copied aside: what a LoRA touches is read from the model's file again, changed in float32 and
rounded once, as the merged file is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from hvtrain.config import EvalConfig, FlowConfig
from hvtrain.lorafiles.overlap import by_layer, labels
from hvtrain.lorafiles.pairs import add_pairs
from hvtrain.merge.inputs import Inputs, expert_of
from hvtrain.merge.policies import Dense, Result
from hvtrain.models.load import Identified, LoadedDit, load_found
from hvtrain.models.spec import Expert
from hvtrain.parallel.apply import parallelize
from hvtrain.parallel.context import ParallelContext
from hvtrain.train.data import open_shards
from hvtrain.train.evaluate import HeldOut, held_out_loss
from hvtrain.train.objective import objective_of
from hvtrain.train.setup import flow_of

MAX_BATCHES = 32


def losses_of(
    found: Identified, inputs: Inputs, combined: Mapping[str, Result], sets: Sequence[str],
    ctx: ParallelContext, name: str | None = None,
) -> dict[str, float]:
    """Name -> loss at fixed noise levels and seeds, all on the same samples of these shard sets.
    `name`: of the expert that the model is, of several (`expert_of`): on its own noise levels."""
    expert = expert_of(found.flavor, inputs, name)
    dtype = compute_dtype(ctx.device)
    loaded = load_found(found, dtype=dtype, device=ctx.device)
    parallelize(loaded.model, ctx, kernel="auto", recompute="none", dtype=dtype)
    result = {"base": _loss(sets, loaded, ctx, expert)}
    alone = {name: by_layer([one]) for name, one in zip(labels(inputs.loras), inputs.loras, strict=True)}
    for name, changes in (*alone.items(), ("merged", combined)):
        with changed(loaded, found, changes):
            result[name] = _loss(sets, loaded, ctx, expert)
    return result


def compute_dtype(device: torch.device) -> torch.dtype:
    """A 13B model in float32 leaves no room on a GPU of 80 GB."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@contextmanager
def changed(loaded: LoadedDit, found: Identified, changes: Mapping[str, Result]) -> Iterator[None]:
    """The model with these layers' changes, for a while. `found`: the file that its weights come from."""
    _write(loaded, found, changes)
    try:
        yield
    finally:
        _write(loaded, found, {module: [] for module in changes})


@torch.no_grad()
def _write(loaded: LoadedDit, found: Identified, changes: Mapping[str, Result]) -> None:
    for module, change in changes.items():
        name = f"{module}.weight"
        there = loaded.model.get_parameter(name)
        weight = found.read(name, dtype=torch.float32, device=there.device)
        if isinstance(change, Dense):
            weight += change.delta().to(weight)
        else:
            add_pairs(weight, [(c.pair, c.multiplier) for c in change])
        there.copy_(weight)


def _loss(sets: Sequence[str], loaded: LoadedDit, ctx: ParallelContext, expert: Expert | None) -> float:
    flavor, fixed = loaded.flavor, EvalConfig()
    flow = flow_of(FlowConfig(), flavor, expert)
    autocast = compute_dtype(ctx.device) != torch.float32
    objective = objective_of(flow, loaded.spec, flavor, device=ctx.device, autocast=autocast)
    held = HeldOut(
        open_shards(sets, flavor, key="--evaluate"), 1, fixed.quantiles, MAX_BATCHES, flavor.columns
    )
    model = loaded.model.eval()
    return held_out_loss(lambda sigma: model, objective, held, ctx=ctx)["eval/loss"]
