"""What stands around the matrix products of a block, in few passes over the tokens and
with little kept for the backward.

Each is equal to the plain formula in its docstring, with its rounding. That itself is computed where the
vectors in it are learnt, and by torch.compile, which fuses by itself.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hvtrain.models.precision import without_autocast


def modulated_norm(x: Tensor, *, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """layer_norm(x) * (1 + scale) + shift in float32, rounded once; x [B S E], shift and scale [B 1 E] or per
    token [B S E]. In the dtype of x where that is narrower than float32."""
    weight = 1 + scale
    one = shift.shape[1] == scale.shape[1] == 1  # of all tokens of a sample
    kinds = {weight.dtype, shift.dtype}
    kernel = (
        kinds == {x.dtype}
        or (x.device.type == "cpu" and x.dtype == torch.bfloat16 and kinds == {torch.float32})
    )
    learnt = weight.requires_grad or shift.requires_grad
    if learnt or torch.compiler.is_compiling() or not (one and kernel):
        return F.layer_norm(x.float(), x.shape[-1:], eps=eps) * weight + shift
    # on GPUs it would make a float32 copy first; the kernel computes in float32 anyway
    with without_autocast(x.device.type):
        rows = [
            F.layer_norm(x[i : i + 1], x.shape[-1:], weight[i, 0], shift[i, 0], eps) if len(x) > 1
            else F.layer_norm(x, x.shape[-1:], weight[0, 0], shift[0, 0], eps) for i in range(len(x))
        ]  # fmt: skip
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def gated(x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    """x + update * gate; x and update [B S E], gate [B 1 E] or per token [B S E].

    A gate that is not learnt is no saved tensor: where a block ends with this, its recomputation can stop
    before the product that made `update`, since nothing after that is needed.
    """
    plain = gate.requires_grad or gate.shape[1] != 1 or not x.dtype == update.dtype == gate.dtype
    return x + update * gate if plain or torch.compiler.is_compiling() else _Gated.apply(x, update, gate)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, update: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        ctx.gate = gate
        return (update * gate).add_(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:  # type: ignore[override]
        return grad, grad * ctx.gate if ctx.needs_input_grad[1] else None, None


def root_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) in float32, cast back, then times weight [D]; x [... D]."""
    if weight.requires_grad or torch.compiler.is_compiling():
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight
    return _RootNorm.apply(x, weight, eps)


class _RootNorm(torch.autograd.Function):
    """Keeps x as it came and one number a row, not two float32 copies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        wide = x.float()
        root = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, root, weight)
        return (wide * root if wide is x else wide.mul_(root)).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        x, root, weight = ctx.saved_tensors
        normed = x.float() * root
        inner = (grad * weight).to(x.dtype).float()
        along = (inner * normed).mean(-1, keepdim=True)
        return (inner - normed.mul_(along)).mul_(root).to(x.dtype), None, None


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The pairs (x0, x1), (x2, x3), ... of x [B S N D] turned by each token's angles, whose cosine and sine
    come twice in a row [S D]; in the dtype of the tables, then cast back."""
    if torch.compiler.is_compiling() or x.device.type == "meta":
        wide = x.to(torch.promote_types(torch.float32, cos.dtype))
        even, odd = wide.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([-odd, even], dim=-1).flatten(-2)
        return (wide * cos[:, None] + turned * sin[:, None]).to(x.dtype)
    return _Turned.apply(x, cos, sin)


class _Turned(torch.autograd.Function):
    """A pair is a complex number, which is multiplied by another of length 1; backward turns back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, -sin), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(torch.float32, cos.dtype)).contiguous()
    by = torch.complex(cos[:, ::2], sin[:, ::2])[:, None]  # [S 1 D/2]
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
    out = pairs * by if wide is x else pairs.mul_(by)
    return torch.view_as_real(out).flatten(-2).to(x.dtype)
