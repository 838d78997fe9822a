"""Compiled blocks compute what plain ones do, also where they run twice. Traced by torch.compile, without its code generator."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch._dynamo.utils
from torch import Tensor

from hvtrain.adapters.attach import inject
from hvtrain.models import all_specs
from hvtrain.models.dit import DiT
from hvtrain.models.spec import Flavor, ModelSpec
from hvtrain.parallel.apply import parallelize
from hvtrain.parallel.context import ParallelContext, start
from hvtrain.parallel.swap import BlockSwap
from tests.models.any_model import an_input, meta, random_model
from tests.parallel.ranks import run_ranks
from tests.parallel.tiny_run import ARCH, Case, build_model, make_batch

ALONE = ParallelContext()
SMALL = replace(ARCH, double=1, single=1)
POLICIES = ["none", "full", "selective", "offload"]
Gradients = dict[str, Tensor]


def counted() -> dict:
    return torch._dynamo.utils.counters


def gradients(
    recompute: str, compiler: str | None, *, lora: bool = False, arch=SMALL, swap: int = 0, ctx: ParallelContext = ALONE,
    steps: int = 1,
) -> Gradients:
    torch._dynamo.reset()
    counted().clear()
    model, params = build_model(Case(arch=arch, lora=lora))
    for module in model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    swapped = BlockSwap(model.blocks, swap, ctx.device) if swap else None
    parallelize(model, ctx, recompute=recompute, compiler=compiler, visits=swapped)
    for step in range(steps):
        inp, target = make_batch(step, 0)
        (model(inp) - target).square().mean().backward()
    return {name: p.grad for name, p in params.items() if p.grad is not None}


def same(got: Gradients, want: Gradients) -> None:
    assert got.keys() == want.keys() and want
    for name, grad in want.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-5, atol=1e-5 * float(grad.abs().max()), msg=name)


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_compiled_blocks_have_the_same_gradients(recompute: str) -> None:
    want = gradients("none", None)
    got = gradients(recompute, "aot_eager")
    assert counted()["stats"]["unique_graphs"] >= 2, "nothing was compiled"
    assert not counted()["graph_break"]
    same(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("recompute", POLICIES)
def test_every_policy_over_changing_clips(recompute: str, lora: bool) -> None:
    deep = replace(ARCH, double=2, single=3)
    same(gradients(recompute, "aot_eager", lora=lora, arch=deep, steps=3), gradients("none", None, lora=lora, arch=deep, steps=3))
    assert not counted()["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_with_swapped_blocks(recompute: str) -> None:
    deep = replace(ARCH, double=3, single=5)
    want = gradients("none", None, lora=True, arch=deep)
    same(gradients(recompute, "aot_eager", lora=True, arch=deep, swap=4), want)


@pytest.mark.slow
def test_generated_code_computes_the_same() -> None:
    """With the compiler's own code generator, as in a run."""
    same(gradients("selective", "inductor", lora=True, steps=2), gradients("none", None, lora=True, steps=2))


def _of_ranks() -> list[tuple[Gradients, Gradients, int]]:
    found = []
    for ulysses, ring in ((2, 1), (1, 2)):
        ctx = start(ulysses, ring)
        for recompute in ("full", "selective"):
            want = gradients(recompute, None, lora=True, ctx=ctx)
            got = gradients(recompute, "aot_eager", lora=True, ctx=ctx)
            found.append((got, want, sum(counted()["graph_break"].values())))
    return found


@pytest.mark.slow
def test_ulysses_and_ring_are_compiled_without_a_break() -> None:
    for found in run_ranks(2, _of_ranks):
        for got, want, breaks in found:
            same(got, want)
            assert breaks == 0


TINY = [
    pytest.param(spec, flavor, id=f"{spec.name}-{flavor.name}")
    for spec in all_specs() for flavor in spec.flavors.values() if sum(p.numel() for p in meta(spec, flavor).parameters()) < 5e6
]  # fmt: skip


def _model(spec: ModelSpec, flavor: Flavor, *, lora: bool) -> DiT:
    model = random_model(spec, flavor).train()
    if lora:
        inject(model.requires_grad_(False), spec.lora_targets(model), rank=2, alpha=2.0, dropout=0.0)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.requires_grad:
                    p.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return model


def _gradients_of(spec: ModelSpec, flavor: Flavor, recompute: str, compiler: str | None, *, lora: bool) -> Gradients:
    torch._dynamo.reset()
    counted().clear()
    model = _model(spec, flavor, lora=lora)
    parallelize(model, ALONE, recompute=recompute, compiler=compiler)
    model(an_input(spec, flavor)).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("recompute", POLICIES)
@pytest.mark.parametrize(("spec", "flavor"), TINY)
def test_every_architecture(spec: ModelSpec, flavor: Flavor, recompute: str, lora: bool) -> None:
    got = _gradients_of(spec, flavor, recompute, "aot_eager", lora=lora)
    assert counted()["stats"]["unique_graphs"] and not counted()["graph_break"]
    same(got, _gradients_of(spec, flavor, "none", None, lora=lora))


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_other_lengths_and_sizes_are_compiled_at_most_once_for_each_frame_count(recompute: str) -> None:
    torch._dynamo.reset()
    counted().clear()
    model, _ = build_model(Case(arch=SMALL, lora=True))
    for module in model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    parallelize(model, ALONE, recompute=recompute, compiler="aot_eager")
    seen = []
    for size in range(3):
        for length in (3, 5, 9, 4, 7):
            inp, target = make_batch(size, 0)
            one = replace(
                inp, x=inp.x[:1], t=inp.t[:1], cond={n: c[:1] for n, c in inp.cond.items()}, lengths={"text": (length,)}
            )
            (model(one) - target[:1]).square().mean().backward()
            seen.append(counted()["stats"]["unique_graphs"])
    kinds, first, last = 2, seen[1], seen[-1]
    assert seen[4] == first <= 2 * kinds, f"every text length is compiled: {seen}"
    assert last <= first + 2 * kinds and not counted()["graph_break"], seen
