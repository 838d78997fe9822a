"""The collectives with their adjoints in one process: what they call, also where torch
is older than the new names."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from hvtrain.parallel import collectives
from hvtrain.parallel.collectives import gather

NEW = {"all_gather_single": "all_gather_into_tensor", "reduce_scatter_single": "reduce_scatter_tensor"}


@pytest.mark.parametrize("newest", [True, False], ids=["torch 2.13", "torch 2.11"])
def test_gather_and_its_sum_by_either_name(newest: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ranks, of which the others hold ten and a hundred times as much; their gradients
    are two and three times ours."""
    calls: list[str] = []

    def all_gather(out: torch.Tensor, x: torch.Tensor, group: object) -> None:
        calls.append("gather")
        out.copy_(torch.cat([x, 10 * x, 100 * x]))

    def reduce_scatter(out: torch.Tensor, x: torch.Tensor, op: object, group: object) -> None:
        assert op == dist.ReduceOp.SUM
        calls.append("scatter")
        out.copy_(x.chunk(3)[0] * (1 + 2 + 3))

    for (name, before), function in zip(NEW.items(), (all_gather, reduce_scatter)):
        monkeypatch.delattr(dist, name, raising=False)
        monkeypatch.delattr(dist, before, raising=False)  # what torch is not asked for must not be needed
        monkeypatch.setattr(dist, name if newest else before, function, raising=False)
    monkeypatch.setattr(collectives.dist, "get_world_size", lambda group: 3)
    x = torch.arange(4.0).view(2, 2).requires_grad_()
    whole = gather(x, 1, "a group")  # type: ignore[arg-type]
    assert whole.tolist() == [[0, 1, 0, 10, 0, 100], [2, 3, 20, 30, 200, 300]]
    weight = torch.arange(12.0).view(2, 6)
    (whole * weight).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [[0, 6], [36, 42]]
    assert calls == ["gather", "scatter"]


def test_no_group_is_no_collective() -> None:
    x = torch.ones(2, 2)
    assert gather(x, 0, None) is x
