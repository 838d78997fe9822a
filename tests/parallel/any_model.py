"""The gradients of any architecture's model, under any layout and engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from hvtrain.adapters.attach import inject
from hvtrain.config import ZeroConfig
from hvtrain.models import find
from hvtrain.models.dit import ModelInput
from hvtrain.models.spec import Flavor, ModelSpec
from hvtrain.parallel.apply import parallelize
from hvtrain.parallel.context import ParallelContext
from hvtrain.rng import generator
from hvtrain.train.engine import Step, build_engine
from tests.models.any_model import an_input, batch, random_model, smallest
from tests.parallel.tiny_run import Case, place

Inputs = Callable[..., ModelInput]  # (spec, flavor, seed=number of the micro-batch)
RATE = 2.0**14  # so large that the parameter's own rounding vanishes


def gradients(
    spec: ModelSpec, flavor: Flavor, case: Case, ctx: ParallelContext, inputs: Inputs = an_input
) -> dict[str, Tensor]:
    """Every trained parameter's gradient as the optimizer gets it, of two micro-batches of
    random samples: one step of SGD."""
    model = random_model(spec, flavor).train()
    if case.lora:
        inject(model, spec.lora_targets(model), rank=3, alpha=6.0, seed=0)
        for name, p in model.named_parameters():
            if p.requires_grad:  # the up-projections are zero at first
                p.data.normal_(generator=generator(0, stream=name)).mul_(0.1)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in params.items()}
    parallelize(model, ctx, recompute=case.recompute)
    mine = range(ctx.dp_rank, case.micro, ctx.dp)
    zero, step = ZeroConfig(case.engine, case.stage, case.offload), Step(len(mine), 0.0)
    sgd = torch.optim.SGD(list(params.values()), lr=RATE)
    engine = build_engine(model, params, zero, ctx, optimizer=sgd, schedule=lambda n: 1.0, step=step)
    for micro in mine:
        inp, target = inputs(spec, flavor, seed=micro), batch(flavor, seed=10 + micro)[0]
        engine.accumulate((engine.model(inp) - target).square().mean(), last=micro == mine[-1])
    return {name: (before[name] - p) / RATE for name, p in engine.export_params().items()}


# Smaller than any flavor: a matrix of layouts is long. An architecture that is not named here
# takes its smallest flavor's.
SIZES: Mapping[str, Mapping[str, object]] = {
    "hunyuan-video": {
        "hidden_size": 48, "heads_num": 4, "double": 1, "single": 2, "rope_dims": (4, 4, 4), "text_dim": 20,
        "pooled_dim": 12, "refiner_depth": 1,
    },
    "wan": {
        "dim": 48, "ffn_dim": 80, "n_heads": 4, "n_layers": 2, "text_dim": 20, "freq_dim": 32, "text_len": 16,
        "clip_dim": 24,
    },
}


def shrunk(spec: ModelSpec, flavor: Flavor) -> Flavor:
    """Small, with all that makes this one another model: what it takes in, and what the
    smallest flavor does not have."""
    small, sizes = smallest(spec).arch, SIZES.get(spec.name, {})
    own = {
        f.name: getattr(flavor.arch, f.name) for f in fields(small)
        # bools too
        if f.name in spec.kind or f.name.endswith("_channels") or getattr(small, f.name) in (0, 1, None)
    }
    smaller = {name: size for name, size in sizes.items() if getattr(flavor.arch, name)}
    return spec.fitted(flavor, replace(small, **{**own, **smaller}))


def architectures(specs: Sequence[ModelSpec]) -> list[tuple[str, str]]:
    """(model, flavor) of each that computes otherwise than those before it: of
    other sizes, or on other inputs."""
    found: dict[object, tuple[str, str]] = {}
    for spec in specs:
        for flavor in (shrunk(spec, spec.flavor(name)) for name in spec.flavors):
            seen = [
                (f.name, _outline(getattr(inp, f.name)))
                for inp in [an_input(spec, flavor)] for f in fields(inp)
            ]
            found.setdefault((spec.name, flavor.arch, str(seen)), (spec.name, flavor.name))
    return list(found.values())


def _outline(value: object) -> object:
    if isinstance(value, Mapping):
        return {name: _outline(one) for name, one in sorted(value.items())}
    return tuple(value.shape) if isinstance(value, Tensor) else value


def of_pairs(pairs: Sequence[tuple[tuple[str, str], Case]]) -> list[dict[str, Tensor]]:
    """On each of several ranks; an architecture's sizes are the smallest."""
    found = []
    for (name, flavor), case in pairs:
        spec = find(name)
        ctx = ParallelContext() if case.engine == "torch" else place(case.ulysses, case.ring)
        found.append(gradients(spec, shrunk(spec, spec.flavor(flavor)), case, ctx))
    return found


def of_layouts(
    which: list[tuple[str, str]], cases: list[Case], inputs: Inputs = an_input
) -> dict[tuple[str, Case], dict[str, Tensor]]:
    """On each of several ranks."""
    found = {}
    for name, flavor in which:
        spec = find(name)
        for case in cases:
            ctx = place(case.ulysses, case.ring)
            found[f"{name}-{flavor}", case] = gradients(spec, spec.flavor(flavor), case, ctx, inputs)
    return found
