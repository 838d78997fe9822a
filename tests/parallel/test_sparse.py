"""Sparse attention under recompute policies, swapped and compiled blocks, and shared by ranks: the
gradients of the plain run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch._dynamo.utils
from torch import Tensor

from hvtrain.config import SparseConfig
from hvtrain.errors import ConfigError
from hvtrain.models import sparse
from hvtrain.parallel.apply import parallelize
from hvtrain.parallel.context import ParallelContext
from hvtrain.parallel.swap import BlockSwap
from tests.parallel.ranks import run_ranks
from tests.parallel.tiny_run import ARCH, Case, build_model, make_batch, place

ALONE = ParallelContext()
SPARSE = SparseConfig("tiles", tile=(2, 2, 3), window=(1, 1, 2), exact_layers=1)
RADIAL = SparseConfig("radial", block=7, width=0.1)
Gradients = dict[str, Tensor]


def gradients(
    cfg: SparseConfig, *, ctx: ParallelContext = ALONE, recompute: str = "none", compiler: str | None = None,
    swap: int = 0, lora: bool = False, deep: int = 2, steps: int = 3,
) -> Gradients:
    """Of a sum over three sizes of video, of which no layout divides all. Over ranks: the sum of theirs."""
    torch._dynamo.reset()
    model, params = build_model(Case(arch=replace(ARCH, double=deep, single=deep), lora=lora))
    for module in model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    visits = BlockSwap(model.blocks, swap, ctx.device) if swap else None
    parallelize(model, ctx, recompute=recompute, compiler=compiler, visits=visits, sparse=cfg)
    for step in range(steps):
        inp, target = make_batch(step, 0)
        (model(inp) - target).square().mean().backward()
    found = {name: p.grad for name, p in params.items() if p.grad is not None}
    if ctx.sp > 1:  # each has the gradient of the whole loss to its own tokens
        for grad in found.values():
            torch.distributed.all_reduce(grad, group=ctx.sp_group)
            grad /= ctx.sp
    return found


def same(got: Gradients, want: Gradients) -> None:
    assert got.keys() == want.keys() and want
    for name, grad in want.items():
        assert (got[name] - grad).norm() <= 1e-5 * grad.norm() + 1e-7, name


def test_it_is_another_gradient() -> None:
    """Else all that follows would hold of exact attention too."""
    exact, *others = (
        torch.cat([g.flatten() for g in gradients(c).values()]) for c in (SparseConfig(), SPARSE, RADIAL)
    )
    assert all((other - exact).norm() > 0.01 * exact.norm() for other in others)


@pytest.mark.parametrize("recompute", ["full", "selective", "offload"])
def test_recompute_policies(recompute: str) -> None:
    same(gradients(SPARSE, recompute=recompute), gradients(SPARSE))


def test_selective_computes_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, gather = [], sparse.WAYS["gather"]
    counted = replace(gather, partial=lambda *args: calls.append(1) or gather.partial(*args))
    monkeypatch.setitem(sparse.WAYS, "gather", counted)
    n_sparse, samples = 3, 2  # blocks; each sample has its own length of text
    for policy, times in (("selective", 1), ("full", 2)):
        calls.clear()
        gradients(SPARSE, recompute=policy, steps=1)
        assert len(calls) == times * n_sparse * samples, policy


def test_a_lora_with_swapped_blocks() -> None:
    want = gradients(SPARSE, lora=True, deep=3, steps=1)
    same(gradients(SPARSE, lora=True, deep=3, steps=1, recompute="full", swap=2), want)


def test_compiled_blocks() -> None:
    cfg = replace(SPARSE, exact_layers=0)
    torch._dynamo.utils.counters.clear()
    got = gradients(cfg, recompute="selective", compiler="aot_eager", deep=1, steps=1)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] and not counters["graph_break"]
    same(got, gradients(cfg, deep=1, steps=1))


@pytest.mark.slow
@pytest.mark.parametrize("cfg", [SPARSE, RADIAL], ids=lambda c: c.pattern)
def test_compiled_blocks_over_changing_clips(cfg: SparseConfig) -> None:
    """Exact blocks are compiled apart, as are those of two streams and of one; and no
    size of clips more than once."""
    torch._dynamo.utils.counters.clear()
    got = gradients(cfg, recompute="selective", compiler="aot_eager")
    counters = torch._dynamo.utils.counters
    kinds = 2 + bool(cfg.exact_layers)
    assert counters["stats"]["unique_graphs"] <= 3 * kinds and not counters["graph_break"]
    same(got, gradients(cfg))


def _on_two() -> list[tuple[Gradients, Gradients]]:
    ctx = place(2, 1)
    return [(gradients(cfg, ctx=ctx, recompute="selective"), gradients(cfg)) for cfg in (SPARSE, RADIAL)]


def test_ulysses_is_one_process() -> None:
    for found in run_ranks(2, _on_two):
        for got, want in found:
            same(got, want)


def _around_a_ring() -> str:
    try:
        gradients(SPARSE, ctx=place(1, 2))
    except ConfigError as error:
        return str(error)
    return "taken"


def test_no_ring() -> None:
    said = run_ranks(2, _around_a_ring)
    assert all(one.startswith("sparse.pattern 'tiles' cannot be used: parallel.ring is 2") for one in said)
