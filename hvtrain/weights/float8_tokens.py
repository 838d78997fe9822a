"""Activations in float8: each token gets a factor of its own, in one pass over the tokens.

The formula is `plain`. In eager mode on a GPU, torch.compile makes one kernel of it for each width; inside a
block that is compiled anyway it is traced as it stands, and fused with what is around it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from types import FunctionType

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

log = logging.getLogger(__name__)
DTYPE = torch.float8_e4m3fn
LARGEST = 448.0
SMALLEST_FACTOR = 1e-30  # a mean over millions of values has gradients of 1e-9 and less
FUSED_ON = "cuda"  # a CPU's float8 products are for tests

Quantize = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]
_refused: dict[int, str] = {}  # width -> why torch.compile could not make the kernel


def quantize_tokens(x: Tensor, by: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """float8 values [tokens, n] of x [tokens, n] * by [n], and each token's factor, float32 [tokens, 1]."""
    if torch.compiler.is_compiling():
        return plain(x, by)
    if isinstance(x, FakeTensor):  # hvtrain/fit counts what is allocated
        return x.new_empty(x.shape, dtype=DTYPE), x.new_empty((len(x), 1), dtype=torch.float32)
    # of one token another kernel would have to be made
    return fused(x, by) if x.device.type == FUSED_ON and len(x) > 1 and not _watched() else plain(x, by)


def plain(x: Tensor, by: Tensor | None = None) -> tuple[Tensor, Tensor]:
    x = x.contiguous()  # what is made of it lies as it does, and a float8 product takes rows alone
    wide = x.float() if by is None else x.float() * by
    factors = (wide.abs().amax(dim=1, keepdim=True) / LARGEST).clamp_min(SMALLEST_FACTOR)
    return (wide / factors).clamp(-LARGEST, LARGEST).to(DTYPE), factors


def fused(x: Tensor, by: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The same in one kernel; at most one step of float8 away where the compiler divides in another way."""
    width = x.shape[1]
    if in_passes(width):
        return plain(x, by)
    x = x.detach().contiguous().view(-1, width)  # a tensor of our own: the mark below stays on it
    torch._dynamo.maybe_mark_dynamic(x, 0)
    try:
        # of every state that it is called in, a kernel would be made
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False, cache_enabled=False):
            return _compiled(width)(x, by)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of any kind: it is not our code
        error = getattr(error, "inner_exception", error)  # the compiler's, in one of torch.compile
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        if not _refused:
            log.warning(
                "float8: torch.compile cannot make the kernel that rounds activations (%s); they are rounded "
                "in several passes, which is slower", reason
            )
        _refused[width] = reason
        return plain(x, by)


def in_passes(width: int) -> bool:
    """Whether tokens of this width are rounded in several passes, for want of a compiler."""
    return width in _refused


def _watched() -> bool:
    """Whether somebody wants to see every operation (a FLOP counter): then nothing is compiled."""
    modes = _get_current_dispatch_mode_stack()
    return any(not getattr(mode, "ignore_compile_internals", bool)() for mode in modes)


@cache
def _compiled(width: int) -> Quantize:
    """Of a width that the kernel knows, for any number of tokens. Its code is its own: torch.compile counts
    how often it compiles one, and would give up after a model's eighth width."""
    code = plain.__code__.replace(co_name=f"quantize_{width}")
    made = FunctionType(code, globals(), argdefs=plain.__defaults__)
    # made for a text's few tokens, it would be cut into three kernels to fill a GPU, for a video's too
    return torch.compile(made, fullgraph=True, options={"split_reductions": False})
