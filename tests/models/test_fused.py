"""What stands around the matrix products: the plain formulas, in values and
gradients, with their rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hvtrain.models.fused import gated, modulated_norm, root_norm, turned
from hvtrain.models.precision import autocast

BF16, FP32 = torch.bfloat16, torch.float32


def compared(have, want, inputs: list[Tensor], **near) -> None:
    """Results and gradients of all inputs that want one, for one random gradient of the result."""
    found = []
    for function in (have, want):
        own = [x.clone().requires_grad_(x.requires_grad) for x in inputs]
        before = [x.detach().clone() for x in own]
        out = function(*own)
        g = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out)
        learnt = [x for x in own if x.requires_grad]
        found.append([out, *torch.autograd.grad(out, learnt, g)])
        assert all(torch.equal(a, b) for a, b in zip(before, own, strict=True)), "an input was written to"
    for a, b in zip(*found, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, **near)


def drawn(*shape: int, dtype: torch.dtype = FP32, learnt: bool = True) -> Tensor:
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(sum(shape))
    ).to(dtype).requires_grad_(learnt)


@pytest.mark.parametrize("learnt", [False, True])
@pytest.mark.parametrize("batch, per_token", [(1, False), (3, False), (2, True)])
def test_modulated_norm(batch, per_token, learnt):
    n = 5 if per_token else 1
    x, shift, scale = (
        drawn(batch, 5, 16), drawn(batch, n, 16, learnt=learnt), drawn(batch, n, 16, learnt=learnt)
    )
    compared(
        lambda x, shift, scale: modulated_norm(x, shift=shift, scale=scale * 0.5),
        lambda x, shift, scale: F.layer_norm(x, (16,), eps=1e-6) * (1 + scale * 0.5) + shift,
        [x, shift, scale], atol=2e-6, rtol=1e-5,
    )  # fmt: skip


@pytest.mark.parametrize("wide", [False, True], ids=["modulation bf16", "modulation fp32"])
def test_modulated_norm_rounds_once(wide):
    """Half of bfloat16's last place from what float64 makes of the same vectors; two
    roundings would make it more."""
    x = drawn(2, 50, 64, dtype=BF16, learnt=False)
    shift, scale = (
        drawn(2, 1, 64 + i, dtype=FP32 if wide else BF16, learnt=False)[..., :64] for i in range(2)
    )
    with autocast("cpu", enabled=True):
        found = modulated_norm(x, shift=shift, scale=scale)
    true = F.layer_norm(x.double(), (64,), eps=1e-6) * (1 + scale).double() + shift.double()
    assert found.dtype == BF16
    place = 2.0 ** (true.abs().clamp(min=1e-30).log2().floor() - 7)  # of bfloat16's last bit
    assert ((found.double() - true).abs() / place.clamp(min=2**-10)).max() < 0.51


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("kind", ["given", "learnt", "per token", "wider"])
def test_gated(dtype, kind):
    x, update = drawn(2, 6, 8, dtype=dtype), drawn(2, 6, 9, dtype=dtype)[..., :8].detach().requires_grad_()
    gate = drawn(
        2, 6 if kind == "per token" else 1, 8, dtype=FP32 if kind == "wider" else dtype,
        learnt=kind == "learnt"
    )
    compared(gated, lambda x, update, gate: x + update * gate, [x, update, gate], atol=0, rtol=0)


def test_a_gate_that_is_given_is_not_saved():
    """So that a block's recomputation may end before it; one that is learnt needs what it multiplies."""
    for learnt, n in ((False, 0), (True, 2)):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x) or x, lambda x: x):
            gated(drawn(1, 3, 4), drawn(1, 3, 5)[..., :4], drawn(1, 1, 4, learnt=learnt))
        assert len(kept) == n


@pytest.mark.parametrize(
    "dtype, near", [(FP32, {"atol": 2e-6, "rtol": 1e-5}), (BF16, {"atol": 2e-2, "rtol": 2e-2})]
)
def test_root_norm(dtype, near):
    def plain(x, weight):
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight

    fused = drawn(2, 9, 3, 4, 32, dtype=dtype)
    weight, frozen = drawn(32, dtype=dtype), drawn(32, dtype=dtype, learnt=False)
    compared(
        lambda x, w: root_norm(x[:, :, 1], w, 1e-6), lambda x, w: plain(x[:, :, 1], w), [fused, frozen],
        **near
    )
    assert torch.equal(root_norm(fused, frozen, 1e-6), plain(fused, frozen))  # values to the bit
    for own in (weight, frozen):
        compared(lambda x, w: root_norm(x, w, 1e-6), plain, [fused, own], **near)


@pytest.mark.parametrize(
    "dtype, tables", [(FP32, FP32), (BF16, FP32), (FP32, torch.float64), (BF16, torch.float64)]
)
def test_turned(dtype, tables):
    def plain(x, cos, sin):
        wide = x.float()
        even, odd = wide.unflatten(-1, (-1, 2)).unbind(-1)
        return (
            wide * cos[:, None] + torch.stack([-odd, even], dim=-1).flatten(-2) * sin[:, None]
        ).to(x.dtype)

    angles = drawn(7, 8, learnt=False).to(tables).repeat_interleave(2, dim=-1)
    fused = drawn(2, 7, 3, 3, 16, dtype=dtype)
    for part in (lambda x: x[:, :, 1], lambda x: x[:, :, 1].contiguous()):
        compared(
            lambda x, c, s, part=part: turned(part(x), c, s), lambda x, c, s, part=part: plain(part(x), c, s),
            [fused, angles.cos(), angles.sin()], atol=1e-6, rtol=1e-2 if dtype == BF16 else 1e-5,
        )
