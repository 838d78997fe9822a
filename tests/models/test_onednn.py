"""Attention on a CPU by oneDNN's products: values, gradients, parts of the keys, and where it is for."""

from __future__ import annotations

import pytest
import torch

from hvtrain.models import onednn
from hvtrain.models.attend_op import attend
from hvtrain.models.kernels import KERNELS
from hvtrain.models.measure import Size, drawn, wrongs
from hvtrain.models.precision import autocast

CPU, BF16 = torch.device("cpu"), torch.bfloat16
ONEDNN, SDPA = KERNELS["onednn"], KERNELS["sdpa"]


def test_it_is_right_at_every_length():
    assert list(wrongs(ONEDNN, CPU, BF16)) == []


def test_it_is_as_near_as_pytorch_s_own():
    """In norm: what is rounded is rounded at the same places."""
    q, k, v, g = drawn(Size(600, 530, batch=2, dim=64), CPU, BF16)

    def gradients(kernel, *inputs):
        with torch.enable_grad():
            inputs = [x.clone().requires_grad_() for x in inputs]
            out = attend(kernel, *inputs)
            return [out.detach(), *torch.autograd.grad(out, inputs, g.to(out))]

    true = gradients(SDPA, *(x.float() for x in (q, k, v)))
    for have, pytorch, want in zip(gradients(ONEDNN, q, k, v), gradients(SDPA, q, k, v), true, strict=True):
        error, common = ((x.float() - want).norm() / want.norm() for x in (have, pytorch))
        assert have.dtype == BF16 and 0 < error < 1.5 * common + 1e-3


@pytest.mark.parametrize("scores", [1, 1000, 10**6])
def test_how_many_rows_at_a_time_changes_nothing(scores, monkeypatch):
    # in float32, where sums show their order
    q, k, v, g = drawn(Size(70, 90, heads=3, dim=32), CPU, torch.float32)
    whole = onednn.forward(q, k, v)
    gradients = onednn.backward(g, q, k, v, *whole)
    monkeypatch.setattr(onednn, "_SCORES", scores)
    for have, want in zip(
        (*onednn.forward(q, k, v), *onednn.backward(g, q, k, v, *whole)), (*whole, *gradients), strict=True
    ):
        torch.testing.assert_close(have, want, atol=2e-5, rtol=1e-5)


def test_parts_of_the_keys_make_the_whole():
    """As a ring computes: partial results merged by their log-sum-exp, and each part's
    gradients from the merged one."""
    q, k, v, g = drawn(Size(65, 96, batch=2, dim=40), CPU, BF16)
    whole = SDPA.partial(*(x.float() for x in (q, k, v)))
    wanted = SDPA.backward(g.float(), *(x.float() for x in (q, k, v)), whole)
    parts = [slice(0, 33), slice(33, 96)]
    found = [ONEDNN.partial(q, k[:, part], v[:, part]) for part in parts]
    lse = torch.logaddexp(found[0].lse, found[1].lse)
    out = sum(p.out.float() * (p.lse - lse).exp().transpose(1, 2)[..., None] for p in found)
    assert (lse - whole.lse).abs().max() < 1e-4 and (out - whole.out).norm() / whole.out.norm() < 5e-3
    grads = [
        ONEDNN.backward(g, q, k[:, part], v[:, part], whole._replace(out=out, lse=lse)) for part in parts
    ]
    joined = (grads[0].q.float() + grads[1].q, *(torch.cat([getattr(x, n) for x in grads], 1) for n in "kv"))
    for have, want in zip(joined, wanted, strict=True):
        assert (have.float() - want).norm() / want.norm() < 1e-2


def test_autocast_is_heeded_where_nothing_is_learnt_too():
    q, k, v, _ = drawn(Size(20, 30, dim=32), CPU, torch.float32)
    with autocast("cpu", enabled=True):
        there = ONEDNN.attend(q, k, v)
        learnt = attend(ONEDNN, q.clone().requires_grad_(), k, v)
    narrow = ONEDNN.attend(*(x.to(BF16) for x in (q, k, v)))
    assert there.dtype == BF16 and torch.equal(there, learnt) and torch.equal(there, narrow)
    exact = ONEDNN.attend(q, k, v)  # no autocast inside either
    assert exact.dtype == torch.float32 and (exact - SDPA.attend(q, k, v)).abs().max() < 1e-5


def test_where_it_is_for(monkeypatch):
    assert onednn.missing(CPU, BF16) is None
    assert onednn.missing(torch.device("cuda", 0), BF16) == "it is for CPUs, this is cuda"
    assert onednn.missing(CPU, torch.float32) == "it computes in bfloat16, not float32"
    for instructions, unit, faster in ((True, False, True), (True, True, False), (False, False, False)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda yes=instructions: yes)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda yes=unit: yes)
        assert onednn.is_faster() is faster
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert onednn.missing(CPU, BF16) == "this PyTorch is built without oneDNN"
