"""Float8 products of the 13B's layers on the device at hand: right, how fast in each of their parts, and what
`model.fp8_matmul: auto` makes of it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hvtrain.models.measure import timed
from hvtrain.parallel.context import ParallelContext
from hvtrain.parallel.products import TOLERANCE, pick_products
from hvtrain.weights.float8 import (
    DTYPE,
    Fp8Linear,
    Products,
    dequantize,
    has_matmul,
    multiply,
    multiply_back,
    quantize,
    use_products,
)
from hvtrain.weights.float8_tokens import _refused, fused, plain
from tests.gpu.report import Row, Setup

ROWS = 64  # compared with float32, of the first and of the last tokens
BF16 = torch.bfloat16


def float8_products(here: Setup) -> Iterator[Row]:
    """An odd number of tokens too: kernels have crashed, and been wrong, where a tile was not full."""
    width, tokens = (3072, 119_056) if here.cuda else (64, 96)
    shapes = {"qkv": (3 * width, width), "fc2": (width, 4 * width), "linear2": (width, 5 * width)}
    able = has_matmul(here.device)
    for name, shape in shapes.items():
        weight = torch.randn(shape, device=here.device, dtype=BF16) / shape[1] ** 0.5
        values, scale = quantize(weight, "fp8_rows")
        for m in (tokens, tokens + 1):
            x = torch.randn(m, shape[1], device=here.device, dtype=BF16)
            own = timed(lambda: F.linear(x, weight), here.device)  # noqa: B023
            flop = 2 * m * weight.numel()
            yield Row(f"{name} bfloat16, M {m:,}", ms=1000 * own, tflops=flop / own / 1e12)
            if able:
                yield from _forward(here, f"{name}, M {m:,}", x, values, scale)
                yield from _backward(here, f"{name} backward, M {m:,}", values, scale, m)
            else:
                yield Row(f"{name} float8, M {m:,}", note="this device multiplies no float8")
    if able:
        yield _computed_again(here, width)
        yield from _chosen(here, list(shapes.values()), tokens)


def _forward(here: Setup, what: str, x: Tensor, values: Tensor, scale: Tensor | None) -> Iterator[Row]:
    bias = torch.randn(len(values), device=here.device, dtype=BF16)
    wide, flop = dequantize(values, scale, torch.float32), 2 * len(x) * values.numel()

    def exact(t: Tensor) -> Tensor:
        return F.linear(t, wide, bias.float())

    old = partial(_dequantised, x, values, scale, bias)
    yield (base := _row(here, f"{what}, dequantised", old, x, exact, flop))
    for fast in (False, True):
        run = partial(multiply, x, values, scale, bias, fast=fast)
        label = f"{what}, float8, {'fast' if fast else 'careful'} sums"
        yield _row(here, label, run, x, exact, flop, base)
    yield from _rounding(here, what, x)
    eight, own = plain(x)
    factors = torch.ones(1, len(values), device=here.device)
    for fast in (False, True):
        product = partial(
            torch._scaled_mm, eight, values.t(), scale_a=own, scale_b=factors, bias=bias, out_dtype=BF16,
            use_fast_accum=fast,
        )
        yield Row(
            f"{what}, the product alone", ms=1000 * timed(product, here.device), note=f"use_fast_accum {fast}"
        )


def _dequantised(x: Tensor, values: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    return F.linear(x, dequantize(values, scale, x.dtype), bias)


def _backward(here: Setup, what: str, values: Tensor, scale: Tensor | None, m: int) -> Iterator[Row]:
    grad = torch.randn(m, len(values), device=here.device, dtype=BF16) * 1e-9
    wide, flop = dequantize(values, scale, torch.float32), 2 * m * values.numel()
    base = _row(
        here, f"{what}, dequantised", lambda: grad @ dequantize(values, scale, BF16), grad,
        lambda g: g @ wide, flop
    )
    yield base
    run = partial(multiply_back, grad, values, scale)
    yield _row(here, f"{what}, float8", run, grad, lambda g: g @ wide, flop, base)
    seconds = timed(lambda: values.t().contiguous(), here.device)
    yield Row(f"{what}, the weight turned", ms=1000 * seconds)


def _row(
    here: Setup, what: str, run: Callable[[], Tensor], x: Tensor, exact: Callable[[Tensor], Tensor],
    flop: float, beside: Row | None = None,
) -> Row:
    """The error is of the worst token that is compared: norm of what is off over its norm."""
    rows = torch.cat([torch.arange(ROWS), torch.arange(len(x) - ROWS, len(x))]).to(x.device)
    rows = rows.clamp(min=0, max=len(x) - 1)
    want = exact(x[rows].float())
    error = float(((run()[rows].float() - want).norm(dim=1) / want.norm(dim=1)).max())
    seconds = timed(run, here.device)
    note = f"{beside.ms / (1000 * seconds):.2f}x dequantised" if beside is not None and beside.ms else ""
    return Row(
        what, passed=error <= (0.01 if beside is None else TOLERANCE), error=error, ms=1000 * seconds,
        tflops=flop / seconds / 1e12, note=note,
    )


def _rounding(here: Setup, what: str, x: Tensor) -> Iterator[Row]:
    """The one kernel beside the formula: how many of its values are another, and by how many steps."""
    eight, own = fused(x)
    reason = _refused.get(x.shape[1])
    want, factors = plain(x)
    # sign and magnitude: beside another of the same sign, the next number is the next byte
    apart = (eight.view(torch.uint8).int() - want.view(torch.uint8).int()).abs()
    steps, share = int(apart.max()), float((apart > 0).float().mean())
    near = bool(((own - factors).abs() <= 1e-6 * factors).all())
    for name, run in (("one kernel", fused), ("in passes", plain)):
        seconds = timed(partial(run, x), here.device)
        rate = x.numel() * (x.element_size() + DTYPE.itemsize) / seconds / 1e9
        good = name != "one kernel" or (reason is None and near and steps <= 1 and share < 1e-3)
        note = f"{rate:,.0f} GB/s" + (f"; {share:.1e} of the values a step away" if share else "")
        yield Row(f"{what}, rounding {name}", passed=good, ms=1000 * seconds, note=reason or note)


def _computed_again(here: Setup, width: int) -> Row:
    """A layer in training mode: its gradients where it is computed again, bit for bit."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(width, width, device=here.device, dtype=BF16)).train()
    base = model[0]
    assert isinstance(base, torch.nn.Linear)
    model[0] = Fp8Linear(base.requires_grad_(False), *quantize(base.weight.data, "fp8_rows"))
    use_products(model, {(width, width): Products(True, True)})
    found = []
    for again in (False, True):
        x = torch.linspace(-1, 1, 257 * width, device=here.device).view(257, width).to(BF16).requires_grad_()
        out = checkpoint(model, x, use_reentrant=True) if again else model(x)
        out.float().square().sum().backward()
        assert x.grad is not None
        found.append(x.grad)
    same = torch.equal(*found) and bool(found[0].isfinite().all()) and bool(found[0].any())
    return Row("computed again, bit for bit", passed=same, error=0.0 if same else 1.0)


def _chosen(here: Setup, shapes: list[tuple[int, int]], tokens: int) -> Iterator[Row]:
    ctx = ParallelContext(device=here.device)
    with tempfile.TemporaryDirectory() as folder:
        for learns in (True, False):
            found = pick_products(
                "auto", shapes, ctx, dtype=BF16, tokens=tokens, learns=learns, factors=True,
                kept=Path(folder, "products.json")
            )
            ways = {s: [name for name, on in way._asdict().items() if on] for s, way in found.items()}
            told = [f"{n[1]} -> {n[0]}: {' and '.join(way) or 'dequantised'}" for n, way in ways.items()]
            yield Row(f"auto, {'training' if learns else 'sampling'}", note="; ".join(told))
