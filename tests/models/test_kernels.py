"""Optional attention packages are called before they are chosen: stand-ins for them, good
and bad, on a pretended GPU."""

from __future__ import annotations

import logging
import sys
import types
from dataclasses import replace

import pytest
import torch

from hvtrain.errors import ConfigError
from hvtrain.models import kernels
from hvtrain.models.kernels import KERNELS, pick_kernel
from hvtrain.parallel import xfuser_path
from hvtrain.parallel.context import ParallelContext
from tests.models.packages import BF16, GPU, SDPA, install_flash2, install_flash3, module

pytestmark = pytest.mark.usefixtures("gpu")  # no packages but those that a test installs


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
    for faster, name in ((False, "sdpa"), (True, "onednn")):
        monkeypatch.setattr(kernels.onednn, "is_faster", lambda faster=faster: faster)
        assert pick_kernel("auto", device=torch.device("cpu"), dtype=BF16).name == name
        assert pick_kernel("auto", device=torch.device("cpu"), dtype=torch.float32).name == "sdpa"


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_flash3_is_for_hopper_alone(gpu, monkeypatch, capability):
    install_flash3(monkeypatch)
    gpu(capability)
    assert auto() == ("cudnn" if capability >= (9, 0) else "sdpa")
    with pytest.raises(
        ConfigError,
        match=rf"'flash3' cannot be used: it needs compute capability 9.x, this is {capability[0]}"
    ):
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
        # flash-attn-4
        (lambda m: module(m, "flash_attn", cute=None), "No module named 'flash_attn.flash_attn_interface'"),
        (lambda m: install_flash2(m, attend=broken), "ImportError: libflash.so: undefined symbol: _ZN3c10$"),
        (lambda m: install_flash2(m, attend=wrong), "it computes something else"),
        (lambda m: install_flash2(m, attend=nothing), "it computes something else"),
        (lambda m: install_flash2(m, forward=lambda q, k, v: None), "TypeError: .* unexpected "
        "keyword|TypeError: .* positional"),
        (
            lambda m: install_flash2(m, forward=lambda *a, **k: (SDPA.attend(*a[:3]), torch.zeros(2, 2, 64))),
            "something else"
        ),
    ],
    ids=["flash-attn-4", "another ABI", "wrong numbers", "NaN", "another signature", "wrong log-sum-exp"],
)
def test_a_package_that_does_not_work_is_named_and_passed_by(gpu, monkeypatch, caplog, install, says):
    gpu((8, 0))
    install(monkeypatch)
    with caplog.at_level(logging.WARNING):
        assert auto() == "sdpa"
        assert auto() == "sdpa"
    # once
    assert [r.levelname for r in caplog.records] == ["WARNING"] and "flash2 is installed, but" in caplog.text
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
    # out and log-sum-exp
    install_flash3(monkeypatch, flash_attn_func=lambda q, k, v: (SDPA.attend(q, k, v), None))
    assert auto() == "flash3"


def test_sage_may_round_but_must_give_its_log_sum_exp(monkeypatch):
    def rounded(q, k, v, tensor_layout, return_lse=False):
        assert tensor_layout == "NHD"
        out, lse = SDPA.partial((q * 16).round() / 16, k, v)
        return (out, lse) if return_lse else out

    module(monkeypatch, "sageattention", sageattn=rounded)
    assert pick_kernel("sage", device=GPU, dtype=BF16, training=False).name == "sage"
    assert auto() == "cudnn"  # never by itself
    with pytest.raises(
        ConfigError, match="^parallel.kernel: 'sage' cannot be used: it has no backward; train with 'auto'$"
    ):
        pick_kernel("sage", device=GPU, dtype=BF16)
    kernels._trial.cache_clear()
    # 1.0
    module(monkeypatch, "sageattention", sageattn=lambda q, k, v, tensor_layout, **_: SDPA.attend(q, k, v))
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
    assert kernels._package_missing(
        "none", "none", since=(8, 0)
    )(second, BF16) == "the Python package 'none' is not installed"
    assert asked == [second]


@pytest.mark.parametrize(
    "capability, until, says",
    [
        ((8, 5), None, "it needs compute capability 8.6 or newer, this is 8.5"),
        ((8, 6), None, "it computes in"), ((12, 1), None, "it computes in"),
        ((8, 5), (9, 0), "it needs compute capability 8.x, this is 8.5"), ((8, 9), (9, 0), "it computes in"),
        ((9, 0), (9, 0), "it needs compute capability 8.x, this is 9.0"),
    ],
)  # fmt: skip
def test_which_gpus_a_package_is_for(gpu, capability, until, says):
    gpu(capability)
    missing = kernels._package_missing("none", "none", since=(8, 6), until=until)
    assert missing(GPU, torch.float32) == says.replace(
        "computes in", "computes in bfloat16 or float16, not float32"
    )
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
