"""Kernels of attention: PyTorch's own and those of optional packages, which are tried with
values before they are chosen.

A `Kernel` also yields the log-sum-exp and a backward that takes it, which is what a ring needs to merge
partial results (parallel/usp.py).
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hvtrain.errors import ConfigError
from hvtrain.models import onednn
from hvtrain.registry import Registry
from hvtrain.rng import generator

if TYPE_CHECKING:
    from hvtrain.models.measure import Workload

aten = torch.ops.aten
log = logging.getLogger(__name__)


class Partial(NamedTuple):
    """Attention over some of the keys: the output normalised over them, and the log of its denominator."""

    out: Tensor  # [B S N D]
    lse: Tensor  # [B N S] fp32


class Grads(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor


_NUMBERED: list[Kernel] = []


def numbered(number: int) -> Kernel:
    return _NUMBERED[number]


@dataclass(frozen=True)
class Kernel:
    """One implementation of softmax(q k' / sqrt(D)) v; every tensor is [B S N D]."""

    name: str
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]  # differentiable if `trains`
    partial: Callable[[Tensor, Tensor, Tensor], Partial]  # not differentiable
    # (dout, q, k, v, merged result)
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Partial], Grads] | None
    missing: Callable[[torch.device, torch.dtype], str | None]  # why it cannot run there, or None
    # by which an operator, whose arguments are numbers, names it
    number: int = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "number", len(_NUMBERED))
        _NUMBERED.append(self)

    @property
    def trains(self) -> bool:
        return self.backward is not None


KERNELS: Registry[Kernel] = Registry("attention kernel", also=("auto", "xfuser"))
_CUDNN = 91501  # 9.15.1: before, its attention was wrong for some lengths, and PyTorch passes it by


def pick_kernel(
    name: str, *, device: torch.device, dtype: torch.dtype = torch.float32, training: bool = True,
    work: Workload | None = None
) -> Kernel:
    """The kernel called `name`; "auto" takes the fastest that runs on this device with this dtype, as
    measured there for such `work`, or without it the one that is said to be.

    SageAttention quantises q and k, so "auto" never chooses it: it changes the result.
    """
    if name == "auto":
        runs = [KERNELS[n] for n in _candidates(device, dtype) if KERNELS[n].missing(device, dtype) is None]
        if len(runs) == 1 or work is None:
            return runs[0]
        from hvtrain.models import measure

        return measure.fastest(runs, device, dtype, work=work)
    kernel = KERNELS.find(name, key="parallel.kernel")
    reason = kernel.missing(device, dtype)
    if reason is None and training and not kernel.trains:
        reason = "it has no backward; train with 'auto'"
    if reason:
        raise ConfigError(f"parallel.kernel: '{name}' cannot be used: {reason}")
    return kernel


def _candidates(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """By how fast they are said to be: PyTorch's own, which everyone has, last."""
    if device.type == "cuda":
        return "flash4", "flash3", "cudnn", "flash2", "sdpa"
    return ("onednn",) if onednn.is_faster() and onednn.missing(device, dtype) is None else ("sdpa",)


# --- torch's own kernels: CPU flash, CUDA flash, CUDA memory-efficient --------------------------------------

_ALIGN_LSE = 32  # the CUDA memory-efficient kernel pads its log-sum-exp to a multiple of this


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    return [t.transpose(1, 2) for t in tensors]  # [B S N D] -> [B N S D], the layout of torch's kernels


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = _heads_first(q, k, v)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _flash_fits(q: Tensor) -> bool:
    """Whether CUDA flash takes this tensor; else the memory-efficient kernel, which also does float32."""
    fits = q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    return fits and torch.cuda.get_device_capability(q.device) >= (8, 0)


def _sdpa_partial(q: Tensor, k: Tensor, v: Tensor) -> Partial:
    q, k, v = _heads_first(q, k, v)
    if q.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    elif _flash_fits(q):
        out, lse = aten._scaled_dot_product_flash_attention(q, k, v)[:2]
    else:
        out, lse = aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[:2]
        lse = lse[..., : q.shape[2]]
    return Partial(out.transpose(1, 2), lse.float())


def _sdpa_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, merged: Partial) -> Grads:
    if q.device.type != "cpu" and _flash_fits(q):
        return _flash_backward(dout, q, k, v, merged)
    dout, q, k, v, out = _heads_first(dout, q, k, v, merged.out)
    lse = merged.lse.contiguous()
    if q.device.type == "cpu":
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(dout, q, k, v, out, lse, 0.0, False)
    else:
        # +inf on the padding makes exp(score - lse) zero there, as the kernel's own forward leaves it.
        lse = F.pad(lse, (0, -lse.shape[-1] % _ALIGN_LSE), value=float("inf"))
        unused = torch.zeros((), dtype=torch.int64, device=q.device)
        wanted = [True, True, True, False]
        grads = aten._scaled_dot_product_efficient_attention_backward(
            dout, q, k, v, None, out, lse, unused, unused, 0.0, wanted, False
        )[:3]
    return Grads(*_heads_first(*grads))


def _flash_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, merged: Partial) -> Grads:
    dout, q, k, v, out = _heads_first(dout, q, k, v, merged.out)
    unused = torch.zeros(2, dtype=torch.uint64, device=q.device)  # dropout's random state
    grads = aten._scaled_dot_product_flash_attention_backward(
        dout, q, k, v, out, merged.lse.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, False, unused,
        unused
    )
    return Grads(*_heads_first(*grads))


def _cudnn_partial(q: Tensor, k: Tensor, v: Tensor) -> Partial:
    out, lse = aten._scaled_dot_product_cudnn_attention(*_heads_first(q, k, v), None, True)[:2]
    return Partial(out.transpose(1, 2), lse.reshape(q.shape[0], q.shape[2], q.shape[1]))


def _cudnn_attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return _sdpa(q, k, v)


def _cudnn_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, merged: Partial) -> Grads:
    # Its graph is built for the layout that the forward's output has: that of q. The
    # log-sum-exp comes as [B N S 1].
    dout, q, k, v, out = _heads_first(dout.contiguous(), q, k, v, merged.out.to(q.dtype).contiguous())
    unused = torch.zeros((), dtype=torch.int64, device=q.device)  # dropout's random state
    grads = aten._scaled_dot_product_cudnn_attention_backward(
        dout, q, k, v, out, merged.lse.contiguous().unsqueeze(-1), unused, unused, None, None, None,
        q.shape[2], k.shape[2], 0.0, False,
    )
    return Grads(*_heads_first(*grads))


def _cudnn_missing(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"it needs a CUDA device, this is {device.type}"
    if (here := torch.cuda.get_device_capability(device)) < (9, 0):
        return f"it needs compute capability 9.0 or newer, this is {here[0]}.{here[1]}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
    if (version := torch.backends.cudnn.version() or 0) < _CUDNN:
        return f"it needs cuDNN 9.15.1 or newer, this is {version}"
    reason = _trial("cudnn", device, dtype)
    return reason and f"PyTorch has it, but {reason}"


# --- optional packages, imported when used ------------------------------------------------------------------


def _package_missing(
    package: str, name: str, *, since: tuple[int, int], until: tuple[int, int] | None = None
) -> Callable[[torch.device, torch.dtype], str | None]:
    """For a kernel that is made for GPUs of compute capability `since` up to, and without, `until`."""

    def missing(device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cuda":
            return f"it needs a CUDA device, this is {device.type}"
        here = torch.cuda.get_device_capability(device)
        if here < since or (until and here >= until):
            wanted = f"{since[0]}.x" if until else f"{since[0]}.{since[1]} or newer"
            return f"it needs compute capability {wanted}, this is {here[0]}.{here[1]}"
        if dtype not in (torch.float16, torch.bfloat16):
            return f"it computes in bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
        if not _installed(package):
            return f"the Python package '{package}' is not installed"
        reason = _trial(name, device, dtype)
        return reason and f"the Python package '{package}' is installed, but {reason}"

    return missing


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # nor the package that it is a part of
        return False


@cache
def _trial(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Call all of a kernel on a little attention and compare: what is wrong, or None.

    A package of that name may be another one (flash-attn-4 brings a `flash_attn` without FlashAttention 2),
    built for another PyTorch, or have changed its private functions; else the first step shows it.
    """
    kernel = KERNELS[name]
    q, k, v, d_out = _little_attention(device, dtype)
    with torch.enable_grad():
        wide = [x.float().requires_grad_() for x in (q, k, v)]
        scores = torch.einsum("bsnd,btnd->bnst", wide[0], wide[1]) / q.shape[-1] ** 0.5
        out = torch.einsum("bnst,btnd->bsnd", scores.softmax(-1), wide[2])
        wanted = [out, out, scores.logsumexp(-1), *torch.autograd.grad(out, wide, d_out.float())]
    try:
        with torch.no_grad():
            result = kernel.partial(q, k, v)
            grads = kernel.backward(d_out, q, k, v, result) if kernel.backward else ()
            found = [kernel.attend(q, k, v), *result, *grads]
        right = all(_near(have, want.detach()) for have, want in zip(found, wanted))
        reason = None if right else "it computes something else: it may be built for another PyTorch"
    except Exception as error:  # of any kind: it is not our code
        reason = f"a call of it fails: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    if reason:
        log.warning("attention kernel %s is installed, but %s", name, reason)
    return reason


def _little_attention(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and the output's gradient, [2 64 2 128]: the head dim of the real models."""
    draw = generator(0, stream="kernel-trial")
    return [torch.randn(2, 64, 2, 128, generator=draw).to(device, dtype) for _ in range(4)]


def _near(have: Tensor, want: Tensor) -> bool:
    """Within what the coarsest kernel rounds (int8); false for NaN."""
    return have.shape == want.shape and bool((have.float() - want).abs().max() <= 0.1 * want.abs().max())


def _flash2(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(q, k, v)


def _flash2_partial(q: Tensor, k: Tensor, v: Tensor) -> Partial:
    from flash_attn.flash_attn_interface import _flash_attn_forward

    out, lse, *_ = _flash_attn_forward(
        q, k, v, 0.0, q.shape[-1] ** -0.5, causal=False, window_size_left=-1, window_size_right=-1,
        softcap=0.0, alibi_slopes=None, return_softmax=False,
    )  # fmt: skip
    return Partial(out, lse)


def _flash2_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, merged: Partial) -> Grads:
    from flash_attn.flash_attn_interface import _flash_attn_backward

    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    _flash_attn_backward(
        dout.contiguous(), q, k, v, merged.out.to(q.dtype), merged.lse.contiguous(), dq, dk, dv, 0.0,
        q.shape[-1] ** -0.5, causal=False, window_size_left=-1, window_size_right=-1, softcap=0.0,
        alibi_slopes=None, deterministic=False,
    )  # fmt: skip
    return Grads(dq, dk, dv)


def _flash3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn_interface import flash_attn_func

    out = flash_attn_func(q, k, v)
    return out[0] if isinstance(out, tuple) else out  # early releases return (out, lse)


def _flash3_partial(q: Tensor, k: Tensor, v: Tensor) -> Partial:
    from flash_attn_interface import _flash_attn_forward

    out, lse, *_ = _flash_attn_forward(q, k, v, softmax_scale=q.shape[-1] ** -0.5)
    return Partial(out, lse)


def _flash3_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, merged: Partial) -> Grads:
    from flash_attn_interface import _flash_attn_backward

    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    out, lse = merged.out.to(q.dtype), merged.lse.contiguous()
    _flash_attn_backward(
        dout.contiguous(), q, k, v, out, lse, dq=dq, dk=dk, dv=dv, softmax_scale=q.shape[-1] ** -0.5
    )
    return Grads(dq, dk, dv)


def _sage(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from sageattention import sageattn

    return sageattn(q, k, v, tensor_layout="NHD")


def _sage_partial(q: Tensor, k: Tensor, v: Tensor) -> Partial:
    from sageattention import sageattn

    return Partial(*sageattn(q, k, v, tensor_layout="NHD", return_lse=True))


def _flash4(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with _as_flash("FA4"), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return _sdpa(q, k, v)


def _flash4_partial(q: Tensor, k: Tensor, v: Tensor) -> Partial:
    with _as_flash("FA4"):
        out, lse = aten._scaled_dot_product_flash_attention(*_heads_first(q, k, v))[:2]
    return Partial(out.transpose(1, 2), lse)


def _flash4_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, merged: Partial) -> Grads:
    with _as_flash("FA4"):
        return _flash_backward(dout, q, k, v, merged)


@contextmanager
def _as_flash(name: str) -> Iterator[None]:
    """While entered, PyTorch's flash operators are this implementation: it registers for the whole process,
    so it is done only where the name changes."""
    from torch.nn import attention

    before = attention.current_flash_attention_impl()
    if before == name:
        yield
        return
    attention.activate_flash_attention_impl(name)
    try:
        yield
    finally:
        attention.restore_flash_attention_impl()


KERNELS |= {
    "sdpa": Kernel("sdpa", _sdpa, _sdpa_partial, _sdpa_backward, lambda device, dtype: None),
    "onednn": Kernel(
        "onednn", onednn.attend, lambda q, k, v: Partial(*onednn.forward(q, k, v)),
        lambda dout, q, k, v, merged: Grads(*onednn.backward(dout, q, k, v, merged.out, merged.lse)),
        onednn.missing,
    ),
    "cudnn": Kernel("cudnn", _cudnn_attend, _cudnn_partial, _cudnn_backward, _cudnn_missing),
    "flash4": Kernel(  # through PyTorch's own operators, which it takes over
        "flash4", _flash4, _flash4_partial, _flash4_backward,
        _package_missing("flash_attn.cute", "flash4", since=(9, 0), until=(11, 0)),
    ),
    "flash2": Kernel(
        "flash2", _flash2, _flash2_partial, _flash2_backward,
        _package_missing("flash_attn", "flash2", since=(8, 0))
    ),
    "flash3": Kernel(  # for Hopper alone
        "flash3", _flash3, _flash3_partial, _flash3_backward,
        _package_missing("flash_attn_interface", "flash3", since=(9, 0), until=(10, 0)),
    ),
    "sage": Kernel(
        "sage", _sage, _sage_partial, None, _package_missing("sageattention", "sage", since=(8, 0))
    ),
}
