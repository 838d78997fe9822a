"""Compiled blocks compute what plain ones do, also where they run twice. Traced by torch.compile, without its code generator."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hvtrain.parallel.apply import parallelize
from hvtrain.parallel.context import ParallelContext
from tests.parallel.tiny_run import ARCH, Case, build_model, make_batch

ALONE = ParallelContext()
SMALL = replace(ARCH, double=1, single=1)


def gradients(recompute: str, compiler: str | None) -> dict[str, torch.Tensor]:
    torch._dynamo.reset()
    model, params = build_model(Case(arch=SMALL))
    parallelize(model, ALONE, recompute=recompute, compiler=compiler)
    inp, target = make_batch(1, 0)
    (model(inp) - target).square().mean().backward()
    return {name: p.grad for name, p in params.items() if p.grad is not None}


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_compiled_blocks_have_the_same_gradients(recompute: str) -> None:
    import torch._dynamo.utils

    want = gradients("none", None)
    torch._dynamo.utils.counters.clear()
    got = gradients(recompute, "aot_eager")
    counted = torch._dynamo.utils.counters
    assert counted["stats"]["unique_graphs"] >= 2, "nothing was compiled"
    breaks = sum(counted["graph_break"].values())
    assert breaks == 0 or recompute == "selective", counted["graph_break"]
    assert got.keys() == want.keys()
    for name, grad in want.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-4, atol=1e-6, msg=name)
