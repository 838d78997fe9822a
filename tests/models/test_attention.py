"""Joint attention on one device: how tokens are joined and split, what is kept for a
second run, and who is chosen."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from hvtrain.errors import ConfigError
from hvtrain.models import kernels
from hvtrain.models.attend_op import BACKWARD_OP, OP, attend
from hvtrain.models.attention import (
    Attention,
    join,
    local_attend,
    rows_of_equal_length,
    split,
    stack_rows,
)
from hvtrain.models.dit import Joint
from hvtrain.models.kernels import KERNELS, Grads, Kernel, pick_kernel
from hvtrain.parallel.recompute import keeping_attention
from hvtrain.rng import generator

CPU = torch.device("cpu")
SDPA = KERNELS["sdpa"]
N, D = 2, 8


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def softmax(q, k, v):  # [B S N D], float64
    scores = torch.einsum("bsnd,btnd->bnst", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bnst,btnd->bsnd", scores.softmax(-1), v), scores.logsumexp(-1)


def test_samples_of_equal_length_share_a_call():
    assert rows_of_equal_length((3, 3, 5, 3)) == [(slice(0, 2), 3), (slice(2, 3), 5), (slice(3, 4), 3)]
    assert rows_of_equal_length((7,)) == [(slice(0, 1), 7)] and rows_of_equal_length(()) == []
    assert rows_of_equal_length((0, 0)) == [(slice(0, 2), 0)]


def test_join_takes_the_valid_tokens_and_split_puts_zeros_where_the_others_were():
    x = Joint(draw(3, 5, N, D), draw(3, 4, N, D, seed=1))
    whole = join(x, slice(1, 3), n_img=4, n_txt=2)
    assert torch.equal(whole, torch.cat([x.img[1:3, :4], x.txt[1:3, :2]], 1))
    assert torch.equal(join(x, slice(0, 1), n_img=3, n_txt=0), x.img[:1, :3])
    back = split(whole, n_img=4, pad_img=5, pad_txt=4)
    assert torch.equal(back.img[:, :4], x.img[1:3, :4]) and torch.equal(back.txt[:, :2], x.txt[1:3, :2])
    assert back.img.shape[1] == 5 and back.txt.shape[1] == 4
    assert not back.img[:, 4:].any() and not back.txt[:, 2:].any()
    exact = split(whole, n_img=4, pad_img=4, pad_txt=2)
    assert exact.img.data_ptr() == whole.data_ptr()  # nothing to pad: nothing is copied
    (one,) = [stack_rows([back])]
    assert one is back
    both = stack_rows([back, exact._replace(img=back.img, txt=back.txt)])
    assert (
        torch.equal(both.img, torch.cat([back.img] * 2)) and torch.equal(both.txt, torch.cat([back.txt] * 2))
    )


def test_each_sample_attends_to_its_own_valid_tokens():
    lengths, n_img = (3, 0, 4), 5
    q, k, v = (Joint(draw(3, 6, N, D, seed=s), draw(3, 4, N, D, seed=s + 9)) for s in range(3))
    calls = []

    def counted(*tensors):
        calls.append([tuple(t.shape) for t in tensors])
        return SDPA.attend(*tensors)

    out = local_attend(q, k, v, txt_len=lengths, n_img=n_img, kernel=replace(SDPA, attend=counted))
    assert calls == [[(1, n_img + n, N, D)] * 3 for n in lengths]
    for b, n in enumerate(lengths):
        want, _ = (
            softmax(
                *(torch.cat([x.img[b : b + 1, :n_img], x.txt[b : b + 1, :n]], 1).double() for x in (q, k, v))
            )
        )
        torch.testing.assert_close(out.img[b, :n_img].double(), want[0, :n_img], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(out.txt[b, :n].double(), want[0, n_img:], atol=1e-6, rtol=1e-5)
        assert not out.img[b, n_img:].any() and not out.txt[b, n:].any()
    same = local_attend(q, k, v, txt_len=lengths, n_img=n_img)  # PyTorch's kernel where none is named
    assert torch.equal(same.img, out.img) and torch.equal(same.txt, out.txt)


def test_an_attention_is_that_of_its_kernel():
    calls = []

    def counted(*tensors):
        calls.append([tuple(t.shape) for t in tensors])
        return SDPA.attend(*tensors)

    q, k, v = (Joint(draw(2, 6, N, D, seed=s), draw(2, 4, N, D, seed=s + 9)) for s in range(3))
    found = Attention(replace(SDPA, attend=counted)).joint(q, k, v, txt_len=(3, 1), n_img=5)
    assert calls == [[(1, 5 + n, N, D)] * 3 for n in (3, 1)]
    want = local_attend(q, k, v, txt_len=(3, 1), n_img=5)
    assert torch.equal(found.img, want.img) and torch.equal(found.txt, want.txt)
    assert Attention().kernel is SDPA


def test_across_each_sample_attends_to_its_own_valid_keys():
    """Those of equal length in one call, whose result is not copied where it is the only one;
    zeros where there are none."""
    q, k, v = (draw(3, n, N, D, seed=n) for n in (6, 4, 4))
    given = torch.full((3, 6, N, D), 5.0)
    shapes = []

    def attend(*tensors):
        shapes.append([tuple(t.shape) for t in tensors])
        return given[: len(tensors[0])]

    attention = Attention(replace(SDPA, attend=attend))
    assert attention.cross(q, k, v, lengths=(2, 2, 2)).data_ptr() == given.data_ptr()
    assert shapes == [[(3, 6, N, D), (3, 2, N, D), (3, 2, N, D)]]
    found = Attention().cross(q, k, v, lengths=(3, 0, 4))
    for b, n in ((0, 3), (2, 4)):
        want, _ = softmax(*(x[b : b + 1].double() for x in (q, k[:, :n], v[:, :n])))
        torch.testing.assert_close(found[b].double(), want[0], atol=1e-6, rtol=1e-5)
    assert found.shape == q.shape and not found[1].any()


def test_layers_of_what_has_no_keys_get_gradients_of_zero():
    """On this rank as on those whose samples have some: an engine that reduces gradients as
    they come would wait for them."""
    leaves = [draw(2, n, N, D, seed=n).requires_grad_() for n in (6, 4, 5)]
    out = Attention().cross(*leaves, lengths=(0, 0))
    out.sum().backward()
    assert out.shape == (2, 6, N, D) and not out.any()
    assert all(x.grad is not None and x.grad.shape == x.shape and not x.grad.any() for x in leaves)


@pytest.mark.parametrize("n_q, n_k", [(5, 7), (33, 20)])
def test_partial_results_and_their_gradients(n_q, n_k):
    q, k, v, d_out = (draw(2, n, N, D, seed=n + i) for i, n in enumerate((n_q, n_k, n_k, n_q)))
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    out, lse = softmax(*wide)
    found = SDPA.partial(q, k, v)
    torch.testing.assert_close(found.out.double(), out, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.lse.double(), lse, atol=1e-5, rtol=1e-5)
    assert found.out.shape == q.shape and found.lse.shape == (2, N, n_q) and found.lse.dtype == torch.float32
    wanted = torch.autograd.grad(out, wide, d_out.double())
    assert SDPA.backward is not None
    for have, want in zip(SDPA.backward(d_out, q, k, v, found), wanted):
        torch.testing.assert_close(have.double(), want, atol=1e-5, rtol=1e-4)


def test_the_operator_is_computed_once_where_it_is_kept_and_has_its_gradients():
    calls = []

    def partial(q, k, v):
        calls.append(q.dtype)
        return SDPA.partial(q, k, v)

    kernel = replace(SDPA, partial=partial)
    q, k, v, d_out = (draw(1, 4, N, D, seed=s) for s in range(4))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    want = torch.autograd.grad(softmax(*leaves)[0], leaves, d_out)

    def twice(q, k, v):
        return attend(kernel, attend(kernel, q, k, v) * 0.5, k, v)

    plain = torch.autograd.grad(twice(*leaves), leaves, d_out)
    assert calls == [torch.float32] * 2
    kept = checkpoint(twice, *leaves, use_reentrant=False, context_fn=keeping_attention)
    for have, ref in zip(torch.autograd.grad(kept, leaves, d_out), plain, strict=True):
        assert torch.equal(have, ref)
    assert calls == [torch.float32] * 4, "computed again in the backward"
    for have, ref in zip(torch.autograd.grad(attend(kernel, *leaves), leaves, d_out), want, strict=True):
        torch.testing.assert_close(have, ref, atol=1e-5, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert attend(kernel, *leaves).dtype == torch.bfloat16
    assert calls[5:] == [torch.bfloat16]
    sampling = replace(kernel, backward=None)
    attend(sampling, q, k, v)
    with torch.no_grad():
        attend(kernel, *leaves)
    # the kernel's own way where nothing is learnt
    assert len(calls) == 6 and not sampling.trains and kernel.trains


def test_the_log_sum_exp_alone_teaches_nothing():
    asked = []
    kernel = replace(SDPA, backward=lambda *a: asked.append(1) or SDPA.backward(*a))
    q, k, v = (draw(1, 4, N, D, seed=s).requires_grad_() for s in range(3))
    out, lse = OP(q, k, v, kernel.number)
    assert (
        torch.autograd.grad(lse.sum(), (q, k, v), allow_unused=True, retain_graph=True) == (None, None, None)
        and asked == []
    )
    assert torch.autograd.grad((out.sum(), lse.sum()), q)[0].shape == q.shape and asked == [1]


@pytest.mark.parametrize("which", range(3))
def test_the_operator_is_used_where_one_of_three_is_learnt(which):
    calls = []

    def partial(*qkv):
        calls.append(1)
        return SDPA.partial(*qkv)

    q, k, v = (draw(1, 4, N, D, seed=s).requires_grad_(s == which) for s in range(3))
    want = torch.autograd.grad(softmax(q, k, v)[0].sum(), (q, k, v)[which])[0]
    attend(replace(SDPA, partial=partial), q, k, v).sum().backward()
    assert len(calls) == 1
    torch.testing.assert_close((q, k, v)[which].grad, want, atol=1e-5, rtol=1e-4)


def test_the_operators_are_what_pytorch_wants_of_them():
    """Schemas, shapes without values, layouts and gradients, also traced with open sizes."""
    q, k, v = (draw(2, n, N, D, seed=n).requires_grad_() for n in (5, 7, 7))
    torch.library.opcheck(OP.default, (q, k, v, SDPA.number))
    with torch.no_grad():
        out, lse = OP(q, k, v, SDPA.number)
        torch.library.opcheck(BACKWARD_OP.default, (draw(2, 5, N, D, seed=1), q, k, v, out, lse, SDPA.number))


def test_flop_are_counted():
    q, k, v = (draw(2, n, N, D, seed=n).requires_grad_() for n in (5, 7, 7))
    with FlopCounterMode(display=False) as counter:
        attend(SDPA, q, k, v).sum().backward()
    product = 2 * 2 * N * 5 * 7 * D
    assert counter.get_flop_counts()["Global"] == {OP: 2 * product, BACKWARD_OP: 5 * product}


def test_the_backward_gets_the_merged_result():
    """In a ring it is that of all blocks, not of the one at hand: the kernel's formula needs it."""
    got = []

    def backward(dout, q, k, v, merged):
        got.append(merged)
        return Grads(q * 1, k * 2, v * 3)

    kernel = Kernel("probe", SDPA.attend, SDPA.partial, backward, SDPA.missing)
    q, k, v = (draw(1, 3, N, D, seed=s).requires_grad_() for s in range(3))
    attend(kernel, q, k, v).sum().backward()
    want = SDPA.partial(q.detach(), k.detach(), v.detach())
    assert torch.equal(got[0].out, want.out) and torch.equal(got[0].lse, want.lse)
    assert [torch.equal(x.grad, x.detach() * n) for n, x in enumerate((q, k, v), start=1)] == [True] * 3


@pytest.mark.parametrize(
    "dtype, dim, capability, fits",
    [
        (torch.bfloat16, 128, (8, 0), True), (torch.float16, 256, (9, 0), True),
        (torch.bfloat16, 8, (8, 6), True), (torch.float32, 128, (9, 0), False),
        (torch.bfloat16, 264, (9, 0), False), (torch.bfloat16, 100, (9, 0), False),
        (torch.bfloat16, 128, (7, 5), False),
    ],
)  # fmt: skip
def test_what_cuda_flash_takes(dtype, dim, capability, fits, monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: capability if device == CPU else None
    )
    assert kernels._flash_fits(torch.empty(1, 1, 1, dim, dtype=dtype)) is fits


def test_near_is_within_a_tenth_of_the_largest():
    want = torch.tensor([10.0, 0.0])
    assert kernels._near(torch.tensor([9.0, -1.0], dtype=torch.bfloat16), want)
    assert kernels._near(torch.tensor([11.0, 1.0]), want) and kernels._near(torch.zeros(1), torch.zeros(1))
    for off in ([11.25, 0.0], [8.75, 0.0], [10.0, -1.25], [10.0, float("nan")]):
        assert not kernels._near(torch.tensor(off), want)
    assert not kernels._near(torch.tensor([10.0]), torch.tensor([10.0, 10.0]))


def test_the_trial_s_attention_is_the_same_each_time():
    drawn = kernels._little_attention(CPU, torch.bfloat16)
    draw = generator(0, stream="kernel-trial")
    assert len(drawn) == 4 and all(x.dtype == torch.bfloat16 for x in drawn)
    assert all(torch.equal(x, torch.randn(2, 64, 2, 128, generator=draw).bfloat16()) for x in drawn)
    meta = kernels._little_attention(torch.device("meta"), torch.float16)
    assert {(x.device.type, x.dtype) for x in meta} == {("meta", torch.float16)}


def test_who_is_chosen_and_who_is_refused():
    assert pick_kernel("auto", device=CPU).name == pick_kernel("sdpa", device=CPU).name == "sdpa"
    names = "auto, cudnn, flash2, flash3, flash4, onednn, sage, sdpa, xfuser"
    for name, hint in (("flash_2", "did you mean 'flash2'?"), ("?", f"choose one of: {names}")):
        with pytest.raises(
            ConfigError, match="^" + re.escape(f"parallel.kernel: no attention kernel '{name}'; {hint}") + "$"
        ):
            pick_kernel(name, device=CPU)
    for name in ("flash2", "flash3", "sage"):
        with pytest.raises(
            ConfigError,
            match=f"^parallel.kernel: '{name}' cannot be used: it needs a CUDA device, this is cpu"
        ):
            pick_kernel(name, device=CPU, training=False)
    assert {name: kernel.trains for name, kernel in KERNELS.items()} == {
        "sdpa": True, "onednn": True, "cudnn": True, "flash2": True, "flash3": True, "flash4": True,
        "sage": False,
    }  # fmt: skip
    assert all(kernel.name == name for name, kernel in KERNELS.items())
