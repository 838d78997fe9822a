"""A LoRA's layer in one buffer: values and gradients of the formula, no passes besides, no
product computed for nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from hvtrain.adapters.attach import inject, seed_dropout
from hvtrain.adapters.layer import How
from hvtrain.adapters.lora import LoraLinear
from hvtrain.models.precision import autocast
from hvtrain.parallel.apply import parallelize
from hvtrain.parallel.context import ParallelContext
from hvtrain.weights.float8 import Fp8Linear, dequantize, quantize
from tests.adapters.models import SPEC, adapted, an_input, build

IN, OUT, RANK = 24, 64, 4


def layer(
    *, bias: bool = True, quantized: bool = False, dtype: torch.dtype = torch.float32, **how
) -> LoraLinear:
    torch.manual_seed(0)
    base = nn.Linear(IN, OUT, bias=bias).to(dtype)
    if quantized:
        base = Fp8Linear(base, *quantize(base.weight.data, "fp8_rows"))
    model = nn.Module()
    model.fc = base
    options = {n: how.pop(n) for n in ("dropout", "rows") if n in how}
    rows = {"fc": options["rows"]} if "rows" in options else None
    inject(
        model, ["fc"], rank=RANK, alpha=2.0, dropout=options.get("dropout", 0.0), rows=rows, how=How(**how)
    )
    nn.init.normal_(model.fc.lora_up.weight)
    return model.fc.train()


def formula(own: LoraLinear, x: torch.Tensor) -> torch.Tensor:
    weight = dequantize(own.weight, own.scale_weight, x.dtype)
    found = F.linear(x, weight, own.bias) + F.linear(
        F.linear(x, own.lora_down.weight), own.lora_up.weight
    ) * 0.5
    if own.taken:
        found = found - F.linear(F.linear(x, own.start_down), own.start_up) * 0.5
    return found


def run(function, own: LoraLinear, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    out = function(x)
    return [out, *torch.autograd.grad(out.square().sum(), [x, own.lora_down.weight, own.lora_up.weight])]


@pytest.mark.parametrize("shape", [(5,), (2, 7), (2, 3, 5)])
@pytest.mark.parametrize(
    "kind", [{}, {"bias": False}, {"quantized": True}, {"start": "pissa"}],
    ids=["plain", "no bias", "fp8", "taken"]
)
def test_values_and_gradients_are_the_formula_s(kind, shape):
    own, x = layer(**kind), torch.randn(*shape, IN)
    assert own.joined(x, 0.5) is not None
    for have, want in zip(run(own, own, x), run(lambda x: formula(own, x), own, x), strict=True):
        assert (have - want).norm() <= 1e-6 * want.norm()


def test_a_capped_and_a_dropped_one_are_those_of_two_passes(monkeypatch):
    for kind in ({"max_norm": 0.1}, {"dropout": 0.5}, {"rank_dropout": 0.5}):
        own, x = layer(**kind), torch.randn(3, 9, IN)
        holder = nn.ModuleList([own])
        seed_dropout(holder, 1)
        found = run(own, own, x)
        with monkeypatch.context() as m:
            m.setattr(LoraLinear, "joined", lambda self, x, scale: None)
            wanted = run(own, own, x)
        for have, want in zip(found, wanted, strict=True):
            assert (have - want).norm() <= 1e-6 * want.norm(), kind


def test_rows_and_a_base_that_is_narrower_go_the_old_way():
    assert layer(rows=(8, 24))(torch.ones(2, IN)).shape == (2, OUT)
    own = layer(dtype=torch.bfloat16)
    x = torch.randn(3, IN).bfloat16()
    assert own.joined(x, 0.5) is None and own(x).dtype == torch.bfloat16
    with autocast("cpu", enabled=True):
        assert own.joined(x, 0.5).dtype == own(x.float()).dtype == torch.bfloat16


def test_under_autocast_it_is_as_near_as_two_passes(monkeypatch):
    own, x = layer(dtype=torch.bfloat16), torch.randn(2, 50, IN)
    wide = own.weight.float()
    true = F.linear(x, wide, own.bias.float()) + F.linear(
        F.linear(x, own.lora_down.weight), own.lora_up.weight
    ) * 0.5
    errors = []
    for joined in (LoraLinear.joined, lambda self, x, scale: None):
        monkeypatch.setattr(LoraLinear, "joined", joined)
        with autocast("cpu", enabled=True):
            out, *grads = run(own, own, x)
        assert out.dtype == torch.bfloat16 and {g.dtype for g in grads} == {torch.float32}
        errors.append((out.float() - true).norm() / true.norm())
    assert 0 < errors[0] < 1.1 * errors[1]


class Calls(TorchDispatchMode):
    """Operators whose result has so many columns, and how many products a base
    layer's weight takes part in."""

    def __init__(self, columns: int = OUT) -> None:
        super().__init__()
        self.columns, self.wide, self.onto = columns, [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        own = (
            not func.is_view and isinstance(out, torch.Tensor) and out.ndim > 1
            and out.shape[-1] == self.columns
        )
        if own and out.shape[-2] > RANK:
            self.wide.append(str(func))
        self.onto += func is torch.ops.aten.addmm_.default
        return out


def test_nothing_as_large_as_the_output_is_made_besides():
    own, x = layer(dtype=torch.bfloat16), torch.randn(1, 50, IN).bfloat16()
    with autocast("cpu", enabled=True), Calls() as calls:
        own(x)
    assert calls.wide == ["aten.addmm.default", "aten.addmm_.default"]


def test_operations_are_counted():
    own, x = layer(), torch.randn(10, IN)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        own(x)
    assert counter.get_total_flops() == 2 * 10 * (IN * OUT + RANK * (IN + OUT))


@pytest.mark.parametrize("policy", ["full", "selective", "offload"])
def test_the_last_product_of_a_block_is_not_computed_again(policy):
    """Of the image's stream in a double block, of the only stream in a single one; gradients are
    those without recomputation."""
    inp = an_input()
    inp = replace(inp, lengths={"text": (5, 5)})  # one call of attention, whatever the policy

    def gradients(policy):
        model = adapted()
        parallelize(model, ParallelContext(device=torch.device("cpu")), kernel="sdpa", recompute=policy)
        with Calls() as forward:
            loss = model(inp).square().mean()
        with Calls() as backward:
            loss.backward()
        return (
            {n: p.grad for n, p in model.named_parameters() if p.requires_grad}, forward.onto, backward.onto
        )

    wanted, once, none = gradients("none")
    found, forward, again = gradients(policy)
    blocks = sum(len(part) for part in (adapted().double_blocks, adapted().single_blocks))
    assert none == 0 and forward == once == len(SPEC.lora_targets(build())) and again == forward - blocks
    assert found.keys() == wanted.keys() and all(torch.equal(found[n], wanted[n]) for n in wanted)
