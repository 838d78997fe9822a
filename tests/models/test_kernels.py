"""Optional attention packages are called before they are chosen: stand-ins for them, good and bad, on a pretended GPU."""

from __future__ import annotations

import importlib.machinery
import logging
import sys
import types
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from hvtrain.errors import ConfigError
from hvtrain.models import kernels, measure
from hvtrain.models.kernels import KERNELS, pick_kernel
from hvtrain.parallel import xfuser_path
from hvtrain.parallel.context import ParallelContext

GPU, BF16 = torch.device("cuda", 0), torch.bfloat16
SDPA = KERNELS["sdpa"]


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[tuple[int, int], int], None]:
    """No packages, and a GPU of a capability with a cuDNN; what a trial computes is computed on the CPU."""
    little = kernels._little_attention
    monkeypatch.setattr(kernels, "_little_attention", lambda device, dtype: little(torch.device("cpu"), dtype))
    for name in ("flash_attn", "flash_attn.flash_attn_interface", "flash_attn_interface", "sageattention", "xfuser"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    find = kernels.importlib.util.find_spec
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda n: find(n) if n in sys.modules else None)

    def make(capability: tuple[int, int], cudnn: int = 91501) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)

    make((9, 0))
    kernels._trial.cache_clear()
    monkeypatch.setattr(measure, "fastest", lambda candidates, device, dtype: candidates[0])  # nothing can be timed here
    parts = {"attend": SDPA.attend, "partial": SDPA.partial, "backward": SDPA.backward}
    monkeypatch.setitem(KERNELS, "cudnn", replace(KERNELS["cudnn"], **parts))  # as if PyTorch had it for the CPU
    yield make
    kernels._trial.cache_clear()


def module(monkeypatch: pytest.MonkeyPatch, name: str, **contents: object) -> types.ModuleType:
    made = types.ModuleType(name)
    made.__spec__ = importlib.machinery.ModuleSpec(name, None)
    made.__path__ = []  # a package
    vars(made).update(contents)
    monkeypatch.setitem(sys.modules, name, made)
    return made


def attend(q, k, v, **_):
    return SDPA.attend(q, k, v)


def flash2_forward(q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
                   return_softmax):  # fmt: skip
    assert (dropout_p, softmax_scale, causal, softcap) == (0.0, q.shape[-1] ** -0.5, False, 0.0)
    return *SDPA.partial(q, k, v), None, None


def flash2_backward(dout, q, k, v, out, lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
                    window_size_right, softcap, alibi_slopes, deterministic):  # fmt: skip
    for into, grad in zip((dq, dk, dv), SDPA.backward(dout, q, k, v, kernels.Partial(out, lse))):
        into.copy_(grad)


def install_flash2(monkeypatch: pytest.MonkeyPatch, *, attend: Callable = attend, forward: Callable = flash2_forward) -> None:
    module(monkeypatch, "flash_attn", flash_attn_func=attend)
    inside = {"_flash_attn_forward": forward, "_flash_attn_backward": flash2_backward}
    module(monkeypatch, "flash_attn.flash_attn_interface", **inside)


def flash3_forward(q, k, v, softmax_scale=None):
    return *SDPA.partial(q, k, v), None, None


def flash3_backward(dout, q, k, v, out, lse, dq=None, dk=None, dv=None, softmax_scale=None):
    flash2_backward(dout, q, k, v, out, lse, dq, dk, dv, 0, 0, 0, 0, 0, 0, 0, 0)


def install_flash3(monkeypatch: pytest.MonkeyPatch, **other: Callable) -> None:
    inside = {"flash_attn_func": attend, "_flash_attn_forward": flash3_forward, "_flash_attn_backward": flash3_backward}
    module(monkeypatch, "flash_attn_interface", **{**inside, **other})


def auto() -> str:
    return pick_kernel("auto", device=GPU, dtype=BF16).name


def test_the_fastest_that_works_is_taken(gpu, monkeypatch):
    assert auto() == "cudnn"
    install_flash2(monkeypatch)
    gpu((8, 0))
    assert auto() == "flash2" == pick_kernel("flash2", device=GPU, dtype=BF16).name
    gpu((9, 0), cudnn=91500)
    assert auto() == "flash2"
    for newer in ((9, 0), (10, 0)):  # said to be faster than FlashAttention 2 there
        gpu(newer, cudnn=91501)
        assert auto() == "cudnn" and pick_kernel("flash2", device=GPU, dtype=BF16).name == "flash2"
    gpu((9, 0))
    install_flash3(monkeypatch)
    assert auto() == "flash3"
    assert pick_kernel("auto", device=GPU, dtype=torch.float32).name == "sdpa"
    assert pick_kernel("auto", device=torch.device("cpu"), dtype=BF16).name == "sdpa"


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_flash3_is_for_hopper_alone(gpu, monkeypatch, capability):
    install_flash3(monkeypatch)
    gpu(capability)
    assert auto() == ("cudnn" if capability >= (9, 0) else "sdpa")
    with pytest.raises(ConfigError, match=rf"'flash3' cannot be used: it needs compute capability 9.x, this is {capability[0]}"):
        pick_kernel("flash3", device=GPU, dtype=BF16)


def test_an_old_gpu_and_a_wide_dtype_are_refused(gpu, monkeypatch):
    install_flash2(monkeypatch)
    with pytest.raises(ConfigError, match="computes in bfloat16 or float16, not float32"):
        pick_kernel("flash2", device=GPU, dtype=torch.float32)
    gpu((7, 5))
    with pytest.raises(ConfigError, match=r"compute capability 8.0 or newer, this is 7.5"):
        pick_kernel("flash2", device=GPU, dtype=BF16)


def broken(*_, **__):
    raise ImportError("libflash.so: undefined symbol: _ZN3c10\nand more")


def wrong(q, k, v, **_):
    return SDPA.attend(q, v, k)


def nothing(q, k, v, **_):
    return torch.full_like(q, float("nan"))


@pytest.mark.parametrize(
    "install, says",
    [
        (lambda m: module(m, "flash_attn", cute=None), "No module named 'flash_attn.flash_attn_interface'"),  # flash-attn-4
        (lambda m: install_flash2(m, attend=broken), "ImportError: libflash.so: undefined symbol: _ZN3c10$"),
        (lambda m: install_flash2(m, attend=wrong), "it computes something else"),
        (lambda m: install_flash2(m, attend=nothing), "it computes something else"),
        (lambda m: install_flash2(m, forward=lambda q, k, v: None), "TypeError: .* unexpected keyword|TypeError: .* positional"),
        (lambda m: install_flash2(m, forward=lambda *a, **k: (SDPA.attend(*a[:3]), torch.zeros(2, 2, 64))), "something else"),
    ],
    ids=["flash-attn-4", "another ABI", "wrong numbers", "NaN", "another signature", "wrong log-sum-exp"],
)
def test_a_package_that_does_not_work_is_named_and_passed_by(gpu, monkeypatch, caplog, install, says):
    gpu((8, 0))
    install(monkeypatch)
    with caplog.at_level(logging.WARNING):
        assert auto() == "sdpa"
        assert auto() == "sdpa"
    assert [r.levelname for r in caplog.records] == ["WARNING"] and "flash2 is installed, but" in caplog.text  # once
    reason = f"'flash2' cannot be used: the Python package 'flash_attn' is installed, but .*({says})"
    with pytest.raises(ConfigError, match=reason):
        pick_kernel("flash2", device=GPU, dtype=BF16)


def test_an_early_flash3_with_other_signatures_is_passed_by(monkeypatch):
    install_flash3(monkeypatch, _flash_attn_forward=lambda q, k, v, k_new, v_new, qv, softmax_scale: None)
    assert auto() == "cudnn"
    kernels._trial.cache_clear()
    install_flash3(monkeypatch, _flash_attn_backward=lambda dout, q, k, v, out, lse, cu_seqlens_q, **_: None)
    with pytest.raises(ConfigError, match="'flash3' cannot be used: .* a call of it fails: TypeError"):
        pick_kernel("flash3", device=GPU, dtype=BF16)
    kernels._trial.cache_clear()
    install_flash3(monkeypatch, flash_attn_func=lambda q, k, v: (SDPA.attend(q, k, v), None))  # out and log-sum-exp
    assert auto() == "flash3"


def test_sage_may_round_but_must_give_its_log_sum_exp(monkeypatch):
    def rounded(q, k, v, tensor_layout, return_lse=False):
        assert tensor_layout == "NHD"
        out, lse = SDPA.partial((q * 16).round() / 16, k, v)
        return (out, lse) if return_lse else out

    module(monkeypatch, "sageattention", sageattn=rounded)
    assert pick_kernel("sage", device=GPU, dtype=BF16, training=False).name == "sage"
    assert auto() == "cudnn"  # never by itself
    with pytest.raises(ConfigError, match="^parallel.kernel: 'sage' cannot be used: it has no backward; train with 'auto'$"):
        pick_kernel("sage", device=GPU, dtype=BF16)
    kernels._trial.cache_clear()
    module(monkeypatch, "sageattention", sageattn=lambda q, k, v, tensor_layout, **_: SDPA.attend(q, k, v))  # 1.0
    with pytest.raises(ConfigError, match="'sage' cannot be used: .*'sageattention' is installed, but"):
        pick_kernel("sage", device=GPU, dtype=BF16, training=False)


def test_who_is_asked_about_which_device(gpu, monkeypatch):
    second, asked = torch.device("cuda", 1), []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: asked.append(device) or (9, 0))

    def missing(device, dtype):
        asked.append((device, dtype))

    monkeypatch.setitem(KERNELS, "flash3", replace(KERNELS["flash3"], missing=missing))
    assert pick_kernel("auto", device=second, dtype=BF16).name == "flash3"
    assert pick_kernel("flash3", device=second, dtype=torch.float16).name == "flash3"
    assert set(asked) == {second, (second, BF16), (second, torch.float16)}
    asked.clear()
    assert kernels._package_missing("none", "none", since=(8, 0))(second, BF16) == "the Python package 'none' is not installed"
    assert asked == [second]


@pytest.mark.parametrize(
    "capability, until, says",
    [
        ((8, 5), None, "it needs compute capability 8.6 or newer, this is 8.5"), ((8, 6), None, "it computes in"),
        ((12, 1), None, "it computes in"), ((8, 5), (9, 0), "it needs compute capability 8.x, this is 8.5"),
        ((8, 9), (9, 0), "it computes in"), ((9, 0), (9, 0), "it needs compute capability 8.x, this is 9.0"),
    ],
)  # fmt: skip
def test_which_gpus_a_package_is_for(gpu, capability, until, says):
    gpu(capability)
    missing = kernels._package_missing("none", "none", since=(8, 6), until=until)
    assert missing(GPU, torch.float32) == says.replace("computes in", "computes in bfloat16 or float16, not float32")
    assert missing(torch.device("cpu"), BF16) == "it needs a CUDA device, this is cpu"


@pytest.mark.parametrize("found", [None, "a call of it fails"])
def test_an_installed_package_is_tried_where_it_will_run(monkeypatch, found):
    tried = []
    module(monkeypatch, "some")
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "_trial", lambda *asked: tried.append(asked) or found)
        reason = kernels._package_missing("some", "flash9", since=(8, 0))(GPU, BF16)
    assert tried == [("flash9", GPU, BF16)]
    assert reason == (found and "the Python package 'some' is installed, but a call of it fails")


# --- what is passed to functions that need a card, value by value -------------------------------------------------


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
    """q, k, v, the gradient and the merged result of 3 queries and 5 keys; those not always come contiguous."""
    q, k, v = draw(2, 3, 4, 16), draw(2, 5, 4, 16, seed=1), draw(2, 5, 4, 16, seed=2)
    d_out, out = draw(2, 4, 3, 16, seed=3).transpose(1, 2), draw(2, 3, 4, 16, dtype=torch.float32, seed=4)
    return q, k, v, d_out, out, draw(2, 3, 4, dtype=torch.float32, seed=5).transpose(1, 2)


EVERYTHING = {"causal": False, "window_size_left": -1, "window_size_right": -1, "softcap": 0.0, "alibi_slopes": None}


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
        assert same(forward.args, (q, k, v, 0.0, 0.25)) and forward.options == {**EVERYTHING, "return_softmax": False}
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
    """On a card flash where it fits; the other's log-sum-exp comes padded, to a multiple of 32, and goes back so, with
    infinity: exp(score - lse) is then zero there."""
    gpu((8, 0) if where == "flash_attention" else (7, 5))
    q, k, v, d_out, out, lse = inputs()
    if where != "flash_attention_for_cpu":
        q, k, v = (x.as_subclass(OnCard) for x in (q, k, v))
    shown, padded = heads_first(q, k, v), torch.nn.functional.pad(lse, (0, 29), value=float("inf"))
    forward, back = ops[where], ops[where + "_backward"]
    gives = {"flash_attention": (lse, None, None), "efficient_attention": (padded, None), "flash_attention_for_cpu": (lse,)}
    forward.gives = (*heads_first(out), *gives[where])
    found = SDPA.partial(q, k, v)
    assert same(forward.args, (*shown, None, True) if where == "efficient_attention" else shown) and not forward.options
    assert torch.equal(found.out, out) and torch.equal(found.lse, lse)
    back.gives = heads_first(q * 2, k * 3, v * 4) + (None,) * (where == "efficient_attention")
    grads = SDPA.backward(d_out, q, k, v, kernels.Partial(out, lse))
    assert all(torch.equal(g, x * n) for n, g, x in zip((2, 3, 4), grads, (q, k, v), strict=True)) and not back.options
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


class Chosen:
    def __init__(self, attn_type: object = None) -> None:
        self.attn_type = attn_type


def install_xfuser(monkeypatch: pytest.MonkeyPatch, layer: type) -> None:
    module(monkeypatch, "xfuser")
    state = types.SimpleNamespace(model_parallel_is_initialized=lambda: True)
    module(monkeypatch, "xfuser.core", distributed=state)
    module(monkeypatch, "xfuser.core.distributed", **vars(state))
    module(monkeypatch, "xfuser.core.long_ctx_attention", xFuserLongContextAttention=layer)


def test_xfuser_is_told_its_kernel(gpu, monkeypatch):
    """What it takes by itself is None in one release and FlashAttention, installed or not, in another."""
    ctx = ParallelContext(world=2, ulysses=2, device=GPU)
    install_xfuser(monkeypatch, Chosen)
    xfuser_path.refuse(ctx, training=False)
    assert xfuser_path._layer(ctx).attn_type.name == "TORCH_FLASH"
    install_flash2(monkeypatch)
    assert xfuser_path._layer(ctx).attn_type.name == "FA"
    install_flash3(monkeypatch)
    assert xfuser_path._layer(ctx).attn_type.name == "FA3"


def test_an_xfuser_that_cannot_be_told_or_imported_is_refused(monkeypatch):
    ctx = ParallelContext(world=2, ulysses=2, device=GPU)
    install_xfuser(monkeypatch, type("Old", (), {"__init__": lambda self, scatter_idx=2: None}))
    with pytest.raises(ConfigError, match="does not let one choose its kernel; install a newer xfuser"):
        xfuser_path.refuse(ctx, training=False)
    monkeypatch.delitem(sys.modules, "xfuser.core.long_ctx_attention")
    with pytest.raises(ConfigError, match="'xfuser' is installed, but ModuleNotFoundError"):
        xfuser_path.refuse(ctx, training=False)
