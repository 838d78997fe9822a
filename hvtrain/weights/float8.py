"""Frozen Linear weights in float8 (E4M3), dequantised per use, or multiplied as they are
where that was chosen (parallel/products.py).

Three ways to quantise: `fp8` casts; `fp8_scaled` divides every 64 neighbours of a row by their largest value
/ 448 and keeps that factor as `scale_weight` [out, in/64, 1], which is musubi-tuner's layout (one factor a
row, [out, 1], where 64 does not divide); `fp8_rows` has one float32 factor a row, for weights whose factors
float16 could not hold. A file that is float8 already keeps its own values and factors. Training goes through:
the backward needs only the weight, which does not change.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvtrain.weights.float8_tokens import DTYPE, LARGEST, quantize_tokens

BLOCK = 64
_SMALLEST_SCALE = 1e-8
_MULTIPLE = 16  # of the sizes that torch's float8 product takes


class Products(NamedTuple):
    """Which of a layer's products are in float8; the others are made with the weight dequantised."""

    forward: bool = False
    backward: bool = False


DEQUANTISED = Products()
Chosen = Mapping[tuple[int, int], Products]  # by a layer's shape, [out, in]
NO_PRODUCTS: Chosen = MappingProxyType({})


def quantize(weight: Tensor, how: str) -> tuple[Tensor, Tensor | None]:
    """(float8 values [out, in], factors or None) of a weight; `how`: fp8, fp8_scaled or fp8_rows."""
    if how == "fp8":
        # beyond the largest a plain cast gives NaN
        return weight.float().clamp(-LARGEST, LARGEST).to(DTYPE), None
    n_out, n_in = weight.shape
    in_blocks = how == "fp8_scaled" and n_in % BLOCK == 0
    width = BLOCK if in_blocks else n_in
    kept = weight.dtype if how == "fp8_scaled" else torch.float32
    blocks = weight.float().view(n_out, n_in // width, width)
    scale = (blocks.abs().amax(dim=2, keepdim=True) / LARGEST).clamp_min(_SMALLEST_SCALE).to(kept)
    values = (blocks / scale.float()).clamp(-LARGEST, LARGEST).to(DTYPE).view(n_out, n_in)
    return values, scale if in_blocks else scale.view(n_out, 1)


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
    products = DEQUANTISED  # see use_products

    def forward(self, x: Tensor) -> Tensor:
        return linear(
            x, self.weight, self.bias, self.scale_weight, products=self.products, fast=not self.training
        )


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None, *,
    products: Products = DEQUANTISED, fast: bool = False,
) -> Tensor:
    """F.linear for a float8 or an ordinary weight.

    `fast`: a float8 product may sum coarsely, which Hopper's does faster; never the backward's. It must be
    the same in all passes of a training step (the block that is computed again, the samples that ask for the
    model without its adapter), so it is told by the model's mode and not by whether gradients are asked.
    """
    if weight.dtype != DTYPE:
        return F.linear(x, weight, bias)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    bias = None if bias is None else bias.to(x.dtype)
    flat = x.reshape(-1, x.shape[-1])
    out = _Linear.apply(flat, weight, bias, scale, products.forward, products.backward, fast)
    # here, not in the Function: what it gave as a view could not be added to in place
    return out if x.ndim == 2 else out.view(*x.shape[:-1], weight.shape[0])


def use_products(model: nn.Module, chosen: Chosen) -> None:
    """Which of the layers' products are in float8; those that are not named, or cannot, are dequantised.
    Float8 products round activations and gradients, too. A LoRA that is put on a layer later keeps the
    layer's way."""
    for module in model.modules():
        if isinstance(module, Fp8Linear):
            way = chosen.get((module.out_features, module.in_features), DEQUANTISED)
            module.products = way if takes_product(module.weight, module.scale_weight) else DEQUANTISED


def has_matmul(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def fits_matmul(n_out: int, n_in: int) -> bool:
    """Whether torch's float8 product takes a weight of this shape."""
    return n_out % _MULTIPLE == n_in % _MULTIPLE == 0


def takes_product(weight: Tensor, scale: Tensor | None) -> bool:
    """Whether a float8 product can be made with it: factors within a row cannot leave the sum."""
    return (scale is None or scale.ndim < 3) and fits_matmul(weight.shape[0], weight.shape[1])


def _multiplies(x: Tensor, weight: Tensor, scale: Tensor | None) -> bool:
    return x.dtype == torch.bfloat16 and takes_product(weight, scale)  # torch's kernel gives bfloat16


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, forward: bool,
        backward: bool, fast: bool,
    ) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.float8 = backward
        if forward and _multiplies(x, weight, scale):
            return multiply(x, weight, scale, bias, fast=fast)
        return F.linear(x, dequantize(weight, scale, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight, scale = ctx.saved_tensors
        back = None
        if ctx.needs_input_grad[0]:
            if ctx.float8 and _multiplies(grad, weight, scale):
                back = multiply_back(grad, weight, scale)
            else:
                back = grad @ dequantize(weight, scale, grad.dtype)
        return back, None, None, None, None, None, None


def multiply(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None = None, *, fast: bool = False
) -> Tensor:
    """bfloat16 x [tokens, in] times the float8 weight [out, in], plus bias [out], by torch's float8 product;
    each token of x gets a factor of its own."""
    values, own = quantize_tokens(x)
    return _product(values, own, weight, scale, bias, fast=fast)


def multiply_back(grad: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    """bfloat16 grad [tokens, out] times the float8 weight [out, in] as it is: its columns are summed over, so
    that a copy of it is turned each time (a byte a value; one that is kept would double the weights)."""
    by = None
    if scale is not None and scale.numel() > 1:
        # a factor a row is one of each number that is summed: it goes in before the gradient is rounded
        by, scale = scale.float().view(-1), None
    values, own = quantize_tokens(grad, by)
    return _product(values, own, weight.t().contiguous(), scale)


def _product(
    values: Tensor, own: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None = None, *,
    fast: bool = False,
) -> Tensor:
    """values [tokens, n] (own), by weight [m, n] (a factor, or one a row): bfloat16 [tokens, m]."""
    n = len(weight)
    factors = torch.ones(1, 1, device=values.device) if scale is None else scale.float().reshape(1, -1)
    return torch._scaled_mm(
        values, weight.t(), scale_a=own, scale_b=factors.expand(1, n).contiguous(), bias=bias,
        out_dtype=torch.bfloat16, use_fast_accum=fast,
    )


def replace_linear(model: nn.Module, name: str, weight: Tensor, scale: Tensor | None) -> None:
    parent, _, leaf = name.rpartition(".")
    owner = model.get_submodule(parent)
    base = getattr(owner, leaf)
    setattr(owner, leaf, Fp8Linear(base, weight, scale))
