"""What is passed to attention functions that need a card, value by value."""

from __future__ import annotations

import types

import pytest
import torch

from hvtrain.models import kernels
from hvtrain.models.kernels import KERNELS
from tests.models.packages import (
    BF16,
    GPU,
    SDPA,
    module,
)

pytestmark = pytest.mark.usefixtures("gpu")  # no packages but those that a test installs


class Noted:
    """A function that notes what it is given."""

    def __init__(self, gives: object = None) -> None:
        self.gives, self.args, self.options = gives, (), {}

    def __call__(self, *args: object, **options: object) -> object:
        self.args, self.options = args, options
        return self.gives


class OnCard(torch.Tensor):
    """In main memory, but says that it is on a card."""

    device = GPU


def draw(*shape: int, dtype: torch.dtype = BF16, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same(have: tuple, want: tuple) -> bool:
    """Equal one by one; tensors in value, type and layout."""

    def one(a, b) -> bool:
        if isinstance(b, torch.Tensor):
            return a.dtype == b.dtype and a.stride() == b.stride() and a.tolist() == b.tolist()
        return type(a) is type(b) and a == b

    return len(have) == len(want) and all(map(one, have, want))


def inputs() -> tuple[torch.Tensor, ...]:
    """q, k, v, the gradient and the merged result of 3 queries and 5 keys; those
    not always come contiguous."""
    q, k, v = draw(2, 3, 4, 16), draw(2, 5, 4, 16, seed=1), draw(2, 5, 4, 16, seed=2)
    d_out, out = draw(2, 4, 3, 16, seed=3).transpose(1, 2), draw(2, 3, 4, 16, dtype=torch.float32, seed=4)
    return q, k, v, d_out, out, draw(2, 3, 4, dtype=torch.float32, seed=5).transpose(1, 2)


EVERYTHING = {
    "causal": False, "window_size_left": -1, "window_size_right": -1, "softcap": 0.0, "alibi_slopes": None
}


@pytest.mark.parametrize("name", ["flash2", "flash3", "sage"])
def test_what_a_package_is_called_with(name, monkeypatch):
    kernel, (q, k, v, d_out, out, lse) = KERNELS[name], inputs()
    attend, forward, back = Noted(out), Noted((out, lse, None, None)), Noted()
    inside = {"_flash_attn_forward": forward, "_flash_attn_backward": back}
    module(monkeypatch, "flash_attn", flash_attn_func=attend)
    module(monkeypatch, "flash_attn.flash_attn_interface", **inside)
    module(monkeypatch, "flash_attn_interface", flash_attn_func=attend, **inside)
    module(monkeypatch, "sageattention", sageattn=attend)
    assert kernel.attend(q, k, v) is out and same(attend.args, (q, k, v))
    assert attend.options == ({"tensor_layout": "NHD"} if name == "sage" else {})
    if name == "sage":
        attend.gives = out, lse
        assert kernel.partial(q, k, v) == (out, lse) and same(attend.args, (q, k, v))
        assert attend.options == {"tensor_layout": "NHD", "return_lse": True} and kernel.backward is None
        return
    found = kernel.partial(q, k, v)
    assert found.out is out and found.lse is lse
    grads = kernel.backward(d_out, q, k, v, found)
    assert same(back.args[:6], (d_out.contiguous(), q, k, v, out.bfloat16(), lse.contiguous()))
    assert [(g.shape, g.dtype) for g in grads] == [(x.shape, BF16) for x in (q, k, v)]
    if name == "flash2":
        assert (
            same(forward.args, (q, k, v, 0.0, 0.25))
            and forward.options == {**EVERYTHING, "return_softmax": False}
        )
        assert all(a is b for a, b in zip(back.args[6:9], grads)) and same(back.args[9:], (0.0, 0.25))
        assert back.options == {**EVERYTHING, "deterministic": False}
    else:
        assert same(forward.args, (q, k, v)) and forward.options == {"softmax_scale": 0.25}
        assert all(back.options.pop(x) is g for x, g in zip(("dq", "dk", "dv"), grads, strict=True))
        assert back.options == {"softmax_scale": 0.25} and len(back.args) == 6


def heads_first(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(t.transpose(1, 2) for t in tensors)


@pytest.fixture
def ops(monkeypatch: pytest.MonkeyPatch) -> dict[str, Noted]:
    """Stand-ins for torch's operators of attention; on a card, zeros too come from main memory."""
    base = "_scaled_dot_product_"
    kinds = ("flash_attention", "efficient_attention", "flash_attention_for_cpu")
    made = {name: Noted() for kind in kinds for name in (base + kind, base + kind + "_backward")}
    monkeypatch.setattr(kernels, "aten", types.SimpleNamespace(**made))
    zeros = torch.zeros

    def on_card(*shape, device, dtype):
        assert device == GPU
        return zeros(*shape, dtype=dtype)

    monkeypatch.setattr(torch, "zeros", on_card)
    return {name.removeprefix(base): noted for name, noted in made.items()}


@pytest.mark.parametrize("where", ["flash_attention", "efficient_attention", "flash_attention_for_cpu"])
def test_what_torch_s_operators_are_called_with(where, ops, gpu, monkeypatch):
    """On a card flash where it fits; the other's log-sum-exp comes padded, to a multiple of 32, and goes back
    so, with infinity: exp(score - lse) is then zero there."""
    gpu((8, 0) if where == "flash_attention" else (7, 5))
    q, k, v, d_out, out, lse = inputs()
    if where != "flash_attention_for_cpu":
        q, k, v = (x.as_subclass(OnCard) for x in (q, k, v))
    shown, padded = heads_first(q, k, v), torch.nn.functional.pad(lse, (0, 29), value=float("inf"))
    forward, back = ops[where], ops[where + "_backward"]
    gives = {
        "flash_attention": (lse, None, None), "efficient_attention": (padded, None),
        "flash_attention_for_cpu": (lse,)
    }
    forward.gives = (*heads_first(out), *gives[where])
    found = SDPA.partial(q, k, v)
    assert (
        same(forward.args, (*shown, None, True) if where == "efficient_attention" else shown)
        and not forward.options
    )
    assert torch.equal(found.out, out) and torch.equal(found.lse, lse)
    back.gives = heads_first(q * 2, k * 3, v * 4) + (None,) * (where == "efficient_attention")
    grads = SDPA.backward(d_out, q, k, v, kernels.Partial(out, lse))
    assert (
        all(torch.equal(g, x * n) for n, g, x in zip((2, 3, 4), grads, (q, k, v), strict=True))
        and not back.options
    )
    bias = (None,) * (where == "efficient_attention")
    shown = *heads_first(d_out, q, k, v), *bias, *heads_first(out)
    none = torch.tensor([0, 0], dtype=torch.uint64) if where == "flash_attention" else torch.tensor(0)
    rest = {
        "flash_attention": (lse.contiguous(), None, None, 3, 5, 0.0, False, none, none),
        "efficient_attention": (padded.contiguous(), none, none, 0.0, [True, True, True, False], False),
        "flash_attention_for_cpu": (lse.contiguous(), 0.0, False),
    }
    assert same(back.args, (*shown, *rest[where]))


def test_the_heads_go_first_only_for_torch():
    q, k, v = (x.float() for x in inputs()[:3])
    want = torch.einsum("bsnd,btnd->bnst", q, k).div(4.0).softmax(-1)
    torch.testing.assert_close(SDPA.attend(q, k, v), torch.einsum("bnst,btnd->bsnd", want, v))
