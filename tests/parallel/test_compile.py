"""Compiled blocks compute what plain ones do, also where they run twice. Traced by torch.compile,
without its code generator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch._dynamo.utils
from torch import Tensor

from hvtrain.adapters.attach import inject, linear_shapes
from hvtrain.models import all_specs, find
from hvtrain.models.dit import DiT
from hvtrain.parallel.apply import parallelize
from hvtrain.parallel.context import ParallelContext, start
from hvtrain.parallel.swap import BlockSwap
from hvtrain.slices.plan import Cut, make_plan
from tests.models.any_model import an_input, random_model, smallest
from tests.parallel.any_model import architectures, shrunk
from tests.parallel.ranks import run_ranks
from tests.parallel.tiny_run import ARCH, Case, build_model, make_batch

ALONE = ParallelContext()
SMALL = replace(ARCH, double=1, single=1)
POLICIES = ["none", "full", "selective", "offload"]
Gradients = dict[str, Tensor]


def counted() -> dict:
    return torch._dynamo.utils.counters


def gradients(
    recompute: str, compiler: str | None, *, lora: bool = False, arch=SMALL, swap: int = 0,
    ctx: ParallelContext = ALONE, steps: int = 1,
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
    same(
        gradients(recompute, "aot_eager", lora=lora, arch=deep, steps=3),
        gradients("none", None, lora=lora, arch=deep, steps=3)
    )
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


# all that compute otherwise, small
EACH = pytest.mark.parametrize("which", architectures(all_specs()), ids="-".join)
KINDS = ["full", "lora", "slice"]


def _trained(which: tuple[str, str], kind: str) -> DiT:
    """With a LoRA on each layer, on one of three slices of them (LORAID), which are
    cut through rows, or whole."""
    spec = find(which[0])
    flavor = shrunk(spec, spec.flavor(which[1]))
    model = random_model(spec, flavor).train()
    if kind == "full":
        return model
    targets, rows = spec.lora_targets(model), None
    if kind == "slice":
        shapes = {name: shape for name, shape in linear_shapes(model).items() if name in targets}
        plan = make_plan(
            shapes, Cut(n=3, granularity="rows", order="interleaved"), model=spec.name, flavor=flavor.name
        )
        rows = {slot.module: (slot.begin, slot.end) for slot in plan.slice(2).slots}
        targets = list(rows)
    inject(model.requires_grad_(False), targets, rank=2, alpha=2.0, dropout=0.0, rows=rows)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return model


def _gradients_of(
    which: tuple[str, str], recompute: str, compiler: str | None, *, kind: str, ctx: ParallelContext = ALONE
) -> Gradients:
    torch._dynamo.reset()
    counted().clear()
    model, spec = _trained(which, kind), find(which[0])
    parallelize(model, ctx, recompute=recompute, compiler=compiler)
    model(an_input(spec, shrunk(spec, spec.flavor(which[1])))).square().mean().backward()
    assert compiler is None or (counted()["stats"]["unique_graphs"] and not counted()["graph_break"])
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@EACH
def test_every_architecture(which: tuple[str, str], kind: str) -> None:
    want = _gradients_of(which, "none", None, kind=kind)
    for recompute in POLICIES:
        same(_gradients_of(which, recompute, "aot_eager", kind=kind), want)


@pytest.mark.slow
@pytest.mark.parametrize("which", [(spec.name, smallest(spec).name) for spec in all_specs()], ids="-".join)
def test_generated_code_of_every_model(which: tuple[str, str]) -> None:
    same(
        _gradients_of(which, "selective", "inductor", kind="lora"),
        _gradients_of(which, "none", None, kind="lora")
    )


def _of_ranks(
    which: tuple[str, str], kinds: Sequence[str], policies: Sequence[str]
) -> list[tuple[Gradients, Gradients]]:
    """Compiled and not, with Ulysses and with a ring."""
    found = []
    for ctx, kind in product((start(2, 1), start(1, 2)), kinds):
        want = _gradients_of(which, "none", None, kind=kind, ctx=ctx)
        found += [
            (_gradients_of(which, policy, "aot_eager", kind=kind, ctx=ctx), want) for policy in policies
        ]
    return found


def test_ulysses_and_ring_are_compiled_without_a_break() -> None:
    for found in run_ranks(2, _of_ranks, ("hunyuan-video", "t2v"), ["lora"], ["selective"]):
        for got, want in found:
            same(got, want)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@EACH
def test_every_architecture_on_two_ranks(which: tuple[str, str]) -> None:
    for found in run_ranks(2, _of_ranks, which, KINDS, ["full", "selective"], timeout_s=1500):
        assert len(found) == 2 * 3 * 2
        for got, want in found:
            same(got, want)


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
                inp, x=inp.x[:1], t=inp.t[:1], cond={n: c[:1] for n, c in inp.cond.items()},
                lengths={"text": (length,)}
            )
            (model(one) - target[:1]).square().mean().backward()
            seen.append(counted()["stats"]["unique_graphs"])
    kinds, first, last = 2, seen[1], seen[-1]
    assert seen[4] == first <= 2 * kinds, f"every text length is compiled: {seen}"
    assert last <= first + 2 * kinds and not counted()["graph_break"], seen
