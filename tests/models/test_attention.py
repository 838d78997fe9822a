"""Joint attention on one device: how tokens are joined and split, what is kept for a second run, and who is chosen."""

from __future__ import annotations

import re
import threading
from dataclasses import replace

import pytest
import torch

from hvtrain.errors import ConfigError
from hvtrain.models import attention, kernels
from hvtrain.models.attention import (
    Recalled,
    join,
    keeping,
    local_attend,
    recall,
    rows_of_equal_length,
    split,
    stack_rows,
)
from hvtrain.models.dit import Joint
from hvtrain.models.kernels import KERNELS, Grads, Kernel, Partial, pick_kernel
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
    assert torch.equal(both.img, torch.cat([back.img] * 2)) and torch.equal(both.txt, torch.cat([back.txt] * 2))


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
        want, _ = softmax(*(torch.cat([x.img[b : b + 1, :n_img], x.txt[b : b + 1, :n]], 1).double() for x in (q, k, v)))
        torch.testing.assert_close(out.img[b, :n_img].double(), want[0, :n_img], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(out.txt[b, :n].double(), want[0, n_img:], atol=1e-6, rtol=1e-5)
        assert not out.img[b, n_img:].any() and not out.txt[b, n:].any()
    same = local_attend(q, k, v, txt_len=lengths, n_img=n_img)  # PyTorch's kernel where none is named
    assert torch.equal(same.img, out.img) and torch.equal(same.txt, out.txt)


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


def test_what_is_recalled_is_the_first_run_s_in_its_order():
    kept: list = []
    made = iter(range(10))

    def compute():
        return [Partial(torch.tensor(float(next(made))), torch.zeros(1))]

    assert recall(compute)[0].out == 0  # outside: computed each time
    with keeping(kept, replay=False):
        assert [recall(compute)[0].out.item() for _ in range(3)] == [1, 2, 3]
    assert recall(compute)[0].out == 4 and len(kept) == 3
    with keeping(kept, replay=True):
        assert [recall(compute)[0].out.item() for _ in range(2)] == [1, 2]
        with keeping([], replay=False):  # another block inside
            assert recall(compute)[0].out == 5
        assert recall(compute)[0].out == 3
    with keeping(kept, replay=True):
        assert recall(compute)[0].out == 1  # from the beginning again
    assert recall(compute)[0].out == 6


def test_what_is_kept_is_each_thread_s_own_and_ends_with_an_error():
    seen = []
    with keeping([], replay=False):
        thread = threading.Thread(target=lambda: seen.append((attention._kept.results, attention._kept.next)))
        thread.start()
        thread.join()
    assert seen == [(None, None)]
    with pytest.raises(RuntimeError), keeping([], replay=True):
        raise RuntimeError
    assert attention._kept.results is None and attention._kept.next is None


def test_a_recalled_attention_is_computed_once_and_has_its_gradients():
    calls = []

    def partial(q, k, v):
        calls.append(q.dtype)
        return SDPA.partial(q, k, v)

    kernel = replace(SDPA, partial=partial)
    q, k, v, d_out = (draw(1, 4, N, D, seed=s) for s in range(4))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    want = torch.autograd.grad(softmax(*leaves)[0], leaves, d_out)
    kept: list = []
    with keeping(kept, replay=False):
        first = attention._attend(kernel, *leaves)
    with keeping(kept, replay=True):
        again = attention._attend(kernel, *leaves)
    assert calls == [torch.float32] and torch.equal(first, again)
    assert not kept[0][0].out.requires_grad  # else the graph of the first run would live on
    for have, ref in zip(torch.autograd.grad(again, leaves, d_out), want):
        torch.testing.assert_close(have, ref, atol=1e-5, rtol=1e-4)
    outside = attention._attend(kernel, *leaves)
    assert len(calls) == 1 and torch.allclose(outside, first)  # not kept: the kernel's own differentiable function
    with keeping([], replay=False), torch.autocast("cpu", torch.bfloat16):
        assert attention._attend(kernel, *leaves).dtype == torch.bfloat16
    assert calls[1:] == [torch.bfloat16]
    sampling = replace(kernel, backward=None)
    with keeping([], replay=False):
        attention._attend(sampling, q, k, v)
    assert len(calls) == 2 and not sampling.trains and kernel.trains


def test_the_backward_gets_the_merged_result():
    """In a ring it is that of all blocks, not of the one at hand: the kernel's formula needs it."""
    got = []

    def backward(dout, q, k, v, merged):
        got.append(merged)
        return Grads(q * 1, k * 2, v * 3)

    kernel = Kernel("probe", SDPA.attend, SDPA.partial, backward, SDPA.missing)
    q, k, v = (draw(1, 3, N, D, seed=s).requires_grad_() for s in range(3))
    Recalled.apply(q, k, v, kernel).sum().backward()
    want = SDPA.partial(q.detach(), k.detach(), v.detach())
    assert torch.equal(got[0].out, want.out) and torch.equal(got[0].lse, want.lse)
    assert [torch.equal(x.grad, x.detach() * n) for n, x in enumerate((q, k, v), start=1)] == [True] * 3


@pytest.mark.parametrize(
    "dtype, dim, capability, fits",
    [
        (torch.bfloat16, 128, (8, 0), True), (torch.float16, 256, (9, 0), True), (torch.bfloat16, 8, (8, 6), True),
        (torch.float32, 128, (9, 0), False), (torch.bfloat16, 264, (9, 0), False), (torch.bfloat16, 100, (9, 0), False),
        (torch.bfloat16, 128, (7, 5), False),
    ],
)  # fmt: skip
def test_what_cuda_flash_takes(dtype, dim, capability, fits, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability if device == CPU else None)
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
    names = "auto, flash2, flash3, sage, sdpa, xfuser"
    for name, hint in (("flash_2", "did you mean 'flash2'?"), ("?", f"choose one of: {names}")):
        with pytest.raises(ConfigError, match="^" + re.escape(f"parallel.kernel: no attention kernel '{name}'; {hint}") + "$"):
            pick_kernel(name, device=CPU)
    for name in ("flash2", "flash3", "sage"):
        with pytest.raises(ConfigError, match=f"^parallel.kernel: '{name}' cannot be used: it needs a CUDA device, this is cpu"):
            pick_kernel(name, device=CPU, training=False)
    assert {name: kernel.trains for name, kernel in KERNELS.items()} == {
        "sdpa": True, "flash2": True, "flash3": True, "sage": False,
    }  # fmt: skip
    assert all(kernel.name == name for name, kernel in KERNELS.items())
