"""Frozen Linear weights in float8 (E4M3), computed as float8 matmul where the device has
one, else dequantised per use.

Three ways to quantise: `fp8` casts; `fp8_scaled` divides every 64 neighbours of a row by their largest value
/ 448 and keeps that factor as `scale_weight` [out, in/64, 1], which is musubi-tuner's layout (one factor a
row, [out, 1], where 64 does not divide); `fp8_rows` has one float32 factor a row, for weights whose factors
float16 could not hold. A file that is float8 already keeps its own values and factors. Training goes through:
the backward needs only the weight, which does not change.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DTYPE = torch.float8_e4m3fn
LARGEST = 448.0
BLOCK = 64
_SMALLEST_SCALE = 1e-8


def quantize(weight: Tensor, how: str) -> tuple[Tensor, Tensor | None]:
    """(float8 values [out, in], factors or None) of a weight; `how`: fp8, fp8_scaled or fp8_rows."""
    if how == "fp8":
        # beyond the largest a plain cast gives NaN
        return weight.float().clamp(-LARGEST, LARGEST).to(DTYPE), None
    n_out, n_in = weight.shape
    width = BLOCK if how == "fp8_scaled" and n_in % BLOCK == 0 else n_in
    kept = weight.dtype if how == "fp8_scaled" else torch.float32
    blocks = weight.float().view(n_out, n_in // width, width)
    scale = (blocks.abs().amax(dim=2, keepdim=True) / LARGEST).clamp_min(_SMALLEST_SCALE).to(kept)
    values = (blocks / scale.float()).clamp(-LARGEST, LARGEST).to(DTYPE).view(n_out, n_in)
    return values, scale if width == BLOCK else scale.view(n_out, 1)


def dequantize(values: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[out, in] in `dtype`; one factor for the tensor, one a row, or one for each block of a row's
    columns."""
    if scale is None:
        return values.to(dtype)
    scale = scale.to(values.device, torch.float32)
    if scale.ndim == 3:  # [out, blocks, 1]
        blocks = values.float().view(values.shape[0], scale.shape[1], -1)
        return (blocks * scale).view_as(values).to(dtype)
    return (values.float() * (scale if scale.numel() > 1 else scale.reshape(()))).to(dtype)


class Fp8Linear(nn.Linear):
    """A frozen Linear whose weight is float8. Weight and factors are buffers: no
    optimizer or collective sees them."""

    def __init__(self, base: nn.Linear, weight: Tensor, scale: Tensor | None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.register_buffer("weight", weight)
        self.register_buffer("scale_weight", scale)
        self.bias = base.bias

    weight: Tensor  # type: ignore[assignment]
    scale_weight: Tensor | None
    matmul = True  # see use_matmul

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, self.scale_weight, matmul=self.matmul)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None, *, matmul: bool = True
) -> Tensor:
    """F.linear for a float8 or an ordinary weight. `matmul`: in float8 where the device can."""
    if weight.dtype != DTYPE:
        return F.linear(x, weight, bias)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return _Linear.apply(x, weight, None if bias is None else bias.to(x.dtype), scale, matmul)


def use_matmul(model: nn.Module, allowed: bool) -> None:
    """Whether float8 matmul may be used where the device has it; it also rounds activations and gradients. A
    LoRA that is put on a layer later keeps the layer's way."""
    for module in model.modules():
        if isinstance(module, Fp8Linear):
            module.matmul = allowed


def has_matmul(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def _multiplies(x: Tensor, scale: Tensor | None, allowed: bool) -> bool:
    """Factors within a row cannot leave the sum; torch's kernel wants sizes in sixteens and bfloat16 out."""
    fits = allowed and has_matmul(x.device) and x.dtype == torch.bfloat16
    return fits and (scale is None or scale.ndim < 3)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx, x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, matmul: bool
    ) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.matmul = matmul
        if _multiplies(x, scale, matmul) and not any(n % 16 for n in weight.shape):
            out = multiply(x, weight, scale)
            return out if bias is None else out + bias
        return F.linear(x, dequantize(weight, scale, x.dtype), bias)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        weight, scale = ctx.saved_tensors
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        if _multiplies(grad, scale, ctx.matmul) and not any(n % 16 for n in weight.shape):
            # a factor a row is one a column of the transposed weight
            if scale is not None and scale.numel() > 1:
                grad, scale = grad * scale.view(-1).to(grad.dtype), None
            return multiply(grad, weight.t().contiguous(), scale), None, None, None, None
        return grad @ dequantize(weight, scale, grad.dtype), None, None, None, None


def multiply(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    """x [... in] times the float8 weight [out, in], by torch's float8 matmul; each token of
    x gets a factor of its own."""
    flat = x.reshape(-1, x.shape[-1])
    own = (flat.abs().amax(dim=1, keepdim=True).float() / LARGEST).clamp_min(_SMALLEST_SCALE)  # [tokens, 1]
    values = (flat.float() / own).clamp(-LARGEST, LARGEST).to(DTYPE)
    factors = torch.ones(1, len(weight), device=x.device) if scale is None else scale.float().reshape(1, -1)
    if factors.shape[1] == 1:
        factors = factors.expand(1, len(weight)).contiguous()
    out = torch._scaled_mm(values, weight.t(), scale_a=own, scale_b=factors, out_dtype=torch.bfloat16)
    return out.view(*x.shape[:-1], len(weight))


def replace_linear(model: nn.Module, name: str, weight: Tensor, scale: Tensor | None) -> None:
    parent, _, leaf = name.rpartition(".")
    owner = model.get_submodule(parent)
    base = getattr(owner, leaf)
    setattr(owner, leaf, Fp8Linear(base, weight, scale))
