"""Which products of a model with float8 weights are in float8 (`model.fp8_matmul`): what is faster on the
device at hand.

A float8 product rounds the activations, and in the backward the gradients, on its way. It must earn that:
`auto` measures, once for each shape of a layer and class of token counts, forward and backward apart, beside
the product with the weight dequantised to bfloat16, after comparing both with float32. The choice is kept in
~/.cache/hvtrain/products.json.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvtrain.errors import ConfigError
from hvtrain.models.measure import Answer, machine, remembered, timed, tokens_class
from hvtrain.parallel.context import ParallelContext
from hvtrain.weights.float8 import (
    DTYPE,
    Chosen,
    Products,
    dequantize,
    fits_matmul,
    has_matmul,
    multiply,
    multiply_back,
)
from hvtrain.weights.float8_tokens import in_passes

log = logging.getLogger(__name__)
KEPT = Path("~/.cache/hvtrain/products.json")
GAIN = 1.05  # how much faster a float8 product must be
# norm of what is off over the norm of the right result: one factor a token, three bits behind the point, make
# .026 of it
TOLERANCE = 0.05
_FEW = (17, 1)  # tokens, besides those that are measured: kernels have been wrong where a tile was not full
_ROWS = 64  # that are compared
_WORDS = {
    "both": Products(True, True), "forward": Products(True, False), "backward": Products(False, True),
    "none": Products(),
}  # fmt: skip
Setting = bool | str  # true, false or auto


class Layer(NamedTuple):
    """One product to measure: a weight [out, in], and as many tokens."""

    n_out: int
    n_in: int
    tokens: int
    learns: bool  # gradients go back through it, and the forward sums with care
    factors: bool  # one a row; else none, and to dequantise is a cast


def missing(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why there are no float8 products, or None. `dtype`: what the model computes in."""
    if device.type != "cuda":
        return "this device, a CPU, has no float8 products"
    if not has_matmul(device):
        here = ".".join(map(str, torch.cuda.get_device_capability(device)))
        name = torch.cuda.get_device_name(device)
        return f"{name} (compute capability {here}) has no float8 products, which begin with 8.9"
    if dtype != torch.bfloat16:
        return "float8 products give bfloat16, and precision is fp32"
    return None


def check_products(setting: Setting, quantize: str, *, device: torch.device, dtype: torch.dtype) -> None:
    """Raises ConfigError where float8 products are wanted and cannot be had."""
    reason = missing(device, dtype)
    if setting is True and quantize != "none" and reason:
        raise ConfigError(
            f"model.fp8_matmul is true, but {reason}; use auto, which takes them only where they are there "
            "and faster, or false"
        )


def pick_products(
    setting: Setting, shapes: Collection[tuple[int, int]], ctx: ParallelContext, *, dtype: torch.dtype,
    tokens: int, learns: bool, factors: bool, kept: Path = KEPT,
) -> Chosen:
    """Of layers of these shapes [out, in] that a rank runs over about so many tokens; the same on every rank:
    the first one measures. `factors`: whether their weights usually have some. Collective."""
    able = sorted(shape for shape in shapes if fits_matmul(*shape))
    if setting is False or not able or ctx.any(missing(ctx.device, dtype) is not None):
        return {}
    if setting is True:
        return dict.fromkeys(able, Products(True, learns))
    asked = [Layer(*shape, tokens_class(tokens), learns, factors) for shape in able]
    mine = [_faster(layer, ctx.device, kept) for layer in asked] if ctx.is_main else None
    if ctx.device.type == "cuda":
        torch.cuda.empty_cache()
    return dict(zip(able, ctx.gather_objects(mine)[0], strict=True))


def note(model: nn.Module) -> str:
    """For people: what its float8 layers do; nothing where it has none."""
    layers: list[Any] = [m for m in model.modules() if hasattr(m, "products") and m.weight.dtype == DTYPE]
    if not layers:
        return ""
    forward, back = sum(m.products.forward for m in layers), sum(m.products.backward for m in layers)
    if not forward + back:
        return f", {len(layers)} float8 layers dequantised"
    return f", float8 products in the forward of {forward} and the backward of {back} of {len(layers)} layers"


def _faster(layer: Layer, device: torch.device, kept: Path) -> Products:
    key = " | ".join([machine(device), "float8", str(tuple(layer))])
    return _WORDS[remembered(key, _WORDS, lambda: _measured(layer, device), kept=kept)]


def _measured(layer: Layer, device: torch.device) -> Answer:
    """One of _WORDS. It does not last if the device had no memory left to tell by, or no compiler was there
    for the kernel that rounds: tomorrow there may be."""
    what = f"{layer.n_in} -> {layer.n_out} at {layer.tokens:,} tokens"
    try:
        with torch.no_grad():
            forward = _wins("forward", layer, device)
            backward = layer.learns and _wins("backward", layer, device)
    except torch.OutOfMemoryError:
        log.warning("float8 products, %s: no memory to measure them; dequantised", what)
        return Answer("none", lasts=False)
    word = next(word for word, p in _WORDS.items() if p == Products(forward, backward))
    return Answer(word, lasts=not in_passes(layer.n_in) and not (layer.learns and in_passes(layer.n_out)))


def _check_works(device: torch.device, what: str) -> None:
    """A kernel that reads where nothing is ends all that a process does on a GPU. Raises ConfigError."""
    try:
        torch.zeros(1, device=device).item()
    except RuntimeError as error:
        raise ConfigError(
            f"float8 product, {what}: it fails so that nothing can be computed after it; set "
            "model.fp8_matmul to false"
        ) from error


class _Trial(NamedTuple):
    """A product in both ways, of tokens [n, ...]."""

    x: Tensor
    float8: Callable[[Tensor], Tensor]
    dequantised: Callable[[Tensor], Tensor]
    exact: Callable[[Tensor], Tensor]


def _wins(way: str, layer: Layer, device: torch.device) -> bool:
    trial = _trial(way, layer, device)
    what = f"{way} {layer.n_in} -> {layer.n_out} at {layer.tokens:,} tokens"
    try:
        errors = [_error(trial, n) for n in (layer.tokens, layer.tokens - 1, *_FEW)]
        worst = max(errors, key=lambda e: (e != e, e))
        times = [timed(partial(run, trial.x), device) for run in (trial.float8, trial.dequantised)]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of any kind: it is not our code
        reason = str(error).strip().partition("\n")[0]
        log.warning("float8 product, %s: fails: %s: %s", what, type(error).__name__, reason)
        _check_works(device, what)
        return False
    if not worst <= TOLERANCE:
        log.warning("float8 product, %s: wrong on this device: error %.3g", what, worst)
        return False
    log.info(
        "float8 product, %s: %.2f ms, dequantised %.2f, error %.3g", what, *(1000 * t for t in times), worst
    )
    return times[0] * GAIN <= times[1]


def _trial(way: str, layer: Layer, device: torch.device) -> _Trial:
    """Of tokens of unlike size; gradients as small as they are."""
    draw = torch.Generator(device).manual_seed(layer.n_out * 100_003 + layer.n_in)
    normal = partial(torch.randn, device=device, dtype=torch.bfloat16, generator=draw)
    weight = normal((layer.n_out, layer.n_in)).clamp(-4, 4).mul_(100).to(DTYPE)
    scale = None
    if layer.factors:
        scale = (torch.rand((layer.n_out, 1), device=device, generator=draw) + 0.1) / 100
    x = normal((layer.tokens, layer.n_in if way == "forward" else layer.n_out))
    x *= normal((layer.tokens, 1)) * (1 if way == "forward" else 1e-9)
    wide = dequantize(weight, scale, torch.float32)
    if way == "backward":
        return _Trial(
            x, lambda g: multiply_back(g, weight, scale), lambda g: g @ dequantize(weight, scale, g.dtype),
            lambda g: g @ wide,
        )
    bias = normal((layer.n_out,))
    return _Trial(
        x, lambda t: multiply(t, weight, scale, bias, fast=not layer.learns),
        lambda t: F.linear(t, dequantize(weight, scale, t.dtype), bias),
        lambda t: F.linear(t, wide, bias.float()),
    )


def _error(trial: _Trial, n: int) -> float:
    """Of the worst among the first n tokens, whose first and last are compared; NaN where anything is."""
    x = trial.x[:n]
    rows = torch.cat([torch.arange(min(n, _ROWS)), torch.arange(max(0, n - _ROWS), n)]).to(x.device)
    found, want = trial.float8(x)[rows].float(), trial.exact(x[rows].float())
    return float(((found - want).norm(dim=1) / want.norm(dim=1)).max())
