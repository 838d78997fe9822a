"""Attention with its log-sum-exp as an operator of PyTorch: torch.compile passes it by, selective
recomputation keeps its result, a count of FLOP finds it, and a trace without values knows its shapes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from hvtrain.models.kernels import Kernel, Partial, numbered
from hvtrain.models.precision import under_autocast


@torch.library.custom_op("hvtrain::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor, kernel: int) -> tuple[Tensor, Tensor]:
    """Of [B S N D] and [B T N D]: the output [B S N D] and the log-sum-exp [B N S]
    fp32. `kernel`: Kernel.number."""
    out, lse = numbered(kernel).partial(q, k, v)
    return out.contiguous(), lse.float().contiguous()


@torch.library.custom_op("hvtrain::attention_backward", mutates_args=())
def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, kernel: int
) -> tuple[Tensor, Tensor, Tensor]:
    backward = numbered(kernel).backward
    assert backward is not None
    dq, dk, dv = (x.contiguous() for x in backward(dout, q, k, v, Partial(out, lse)))
    return dq, dk, dv


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, kernel: int) -> tuple[Tensor, Tensor]:
    b, s, n, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(b, n, s, dtype=torch.float32)


@attention_backward.register_fake
def _(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, kernel: int
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.kernel = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output)


def _backward(ctx: Any, dout: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return None, None, None, None
    return *attention_backward(dout, *ctx.saved_tensors, ctx.kernel), None


attention.register_autograd(_backward, setup_context=_keep)

OP, BACKWARD_OP = torch.ops.hvtrain.attention, torch.ops.hvtrain.attention_backward


def _products(q: tuple[int, ...], k: tuple[int, ...]) -> int:
    """FLOP of one matrix product of queries [B S N D] and keys [B T N D]."""
    b, s, n, d = q
    return 2 * b * n * s * k[1] * d


@register_flop_formula(OP)
def _(q: Any, k: Any, v: Any, *args: Any, **options: Any) -> int:
    return 2 * _products(q, k)


@register_flop_formula(BACKWARD_OP)
def _(dout: Any, q: Any, k: Any, *args: Any, **options: Any) -> int:
    return 5 * _products(q, k)  # the scores again, dV, dP, dQ, dK


def attend(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B S N D], differentiable. Where nothing is learnt, the kernel's own way, which
    need not give a log-sum-exp."""
    learns = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if not (kernel.trains and learns):
        return kernel.attend(q, k, v)
    if under_autocast(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    return attention(q, k, v, kernel.number)[0]
