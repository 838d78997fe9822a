"""The gradients of any architecture's model, under any layout and engine."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hvtrain.config import ZeroConfig
from hvtrain.models import find
from hvtrain.models.dit import ModelInput
from hvtrain.models.spec import Flavor, ModelSpec
from hvtrain.parallel.apply import parallelize
from hvtrain.parallel.context import ParallelContext, start
from hvtrain.train.engine import Step, build_engine
from tests.models.any_model import an_input, batch, random_model
from tests.parallel.tiny_run import Case

Inputs = Callable[..., ModelInput]  # (spec, flavor, seed=number of the micro-batch)
RATE = 2.0**14  # so large that the parameter's own rounding vanishes


def gradients(
    spec: ModelSpec, flavor: Flavor, case: Case, ctx: ParallelContext, inputs: Inputs = an_input
) -> dict[str, Tensor]:
    """Every parameter's gradient as the optimizer gets it, of two micro-batches of random samples: one step of SGD."""
    model = random_model(spec, flavor).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    params = dict(model.named_parameters())
    parallelize(model, ctx, recompute=case.recompute)
    mine = range(ctx.dp_rank, case.micro, ctx.dp)
    zero, step = ZeroConfig(case.engine, case.stage, case.offload), Step(len(mine), 0.0)
    sgd = torch.optim.SGD(list(params.values()), lr=RATE)
    engine = build_engine(model, params, zero, ctx, optimizer=sgd, schedule=lambda n: 1.0, step=step)
    for micro in mine:
        inp, target = inputs(spec, flavor, seed=micro), batch(flavor, seed=10 + micro)[0]
        engine.accumulate((engine.model(inp) - target).square().mean(), last=micro == mine[-1])
    return {name: (before[name] - p) / RATE for name, p in engine.export_params().items()}


def of_layouts(
    which: list[tuple[str, str]], cases: list[Case], inputs: Inputs = an_input
) -> dict[tuple[str, Case], dict[str, Tensor]]:
    """On each of several ranks."""
    found = {}
    for name, flavor in which:
        spec = find(name)
        for case in cases:
            ctx = start(case.ulysses, case.ring)
            found[f"{name}-{flavor}", case] = gradients(spec, spec.flavor(flavor), case, ctx, inputs)
    return found
