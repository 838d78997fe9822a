"""Sparse attention on the device at hand: against softmax over the pairs that are kept,
and beside exact attention."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from hvtrain.config import SparseConfig
from hvtrain.models.dit import Grid
from hvtrain.models.kernels import KERNELS, Kernel, pick_kernel
from hvtrain.models.measure import TOLERANCE, Size, drawn, timed
from hvtrain.models.sparse import WAYS, Sparse, pick_sparse
from hvtrain.models.sparse_masks import layout_of, pattern_of
from tests.bench.bench_step import ceiling
from tests.gpu.report import Row, Setup
from tests.gpu.work import dtype_of, peak, relative

# Tiles and blocks that do not divide the video, and a text that does not fill a block of 128.
LITTLE, N_TXT = Grid(5, 10, 14), 37
PATTERNS = [
    SparseConfig("tiles", tile=(2, 4, 4), window=(1, 3, 2)), SparseConfig("radial", block=64, width=0.1)
]


def sparse_attention(here: Setup) -> Iterator[Row]:
    """Every way that runs here, forward and backward; then what `auto` takes, at the largest size."""
    for cfg in PATTERNS:
        name = cfg.pattern
        for way in WAYS:
            reason = WAYS[way].missing(here.device)
            if reason is not None:
                yield Row(f"{name} by {way}", note=reason[:90])
                continue
            error = max(
                _errors(Sparse(pattern_of(cfg), WAYS[way], KERNELS["sdpa"]), here), key=lambda e: (e != e, e)
            )
            yield Row(f"{name} by {way}, values", passed=error <= TOLERANCE[dtype_of(here)], error=error)
    yield from _speed(here)


def _errors(one: Sparse, here: Setup) -> list[float]:
    """Of output, log-sum-exp and gradients, against the definition in float64."""
    n = math.prod(LITTLE) + N_TXT
    q, k, v, d_out = drawn(Size(n, n), here.device, dtype_of(here))
    with torch.enable_grad():
        wide = [x.double().requires_grad_() for x in (q, k, v)]
        out, lse = masked(one, LITTLE, *wide, rows=torch.arange(n, device=here.device))
        wanted = [out.detach(), lse.detach(), *torch.autograd.grad(out, wide, d_out.double())]
    with torch.no_grad():
        found = one.way.partial(one, LITTLE, q, k, v)
        grads = one.way.backward(one, LITTLE, d_out, q, k, v, found)
    return [relative(have, want) for have, want in zip((*found, *grads), wanted, strict=True)]


def masked(
    one: Sparse, grid: Grid, q: Tensor, k: Tensor, v: Tensor, *, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Output [B R N D] and log-sum-exp [B N R] of the queries `rows`: all scores, and of
    those that are left out none."""
    layout, n_txt = layout_of(one.pattern, grid), q.shape[1] - math.prod(grid)
    run = np.repeat(np.arange(len(layout.sizes) + 1), [*layout.sizes, n_txt])  # the text is one more
    keep = np.pad(layout.keep, (0, 1), constant_values=True)
    mask = torch.from_numpy(keep[run[rows.cpu().numpy()]][:, run]).to(q.device)  # [R S]
    scores = torch.einsum("bsnd,btnd->bnst", q[:, rows], k) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(~mask, -math.inf)
    return torch.einsum("bnst,btnd->bsnd", scores.softmax(-1), v), scores.logsumexp(-1)


def _speed(here: Setup) -> Iterator[Row]:
    width, height, frames = here.sizes[-1]
    latent, n_txt, dtype = here.flavor.latent, 200 if here.cuda else 7, dtype_of(here)
    grid = latent.grid(latent.shape(frames=frames, height=height, width=width))
    n = math.prod(grid) + n_txt
    tensors = drawn(Size(n, n, heads=here.heads), here.device, dtype)
    dense, top = pick_kernel("auto", device=here.device, dtype=dtype), ceiling(here.device)
    exact = timed(partial(_dense_step, dense, *tensors), here.device)
    yield Row(f"exact by {dense.name}, {n:,} tokens", ms=1000 * exact)
    rows = torch.linspace(0, n - 1, min(n, 64), device=here.device).long()
    for cfg in (SparseConfig("tiles"), SparseConfig("radial")):
        one = pick_sparse(cfg, dense=dense, device=here.device, dtype=dtype)
        assert one is not None
        with torch.no_grad():
            out, lse = one.way.partial(one, grid, *tensors[:3])
            want = masked(one, grid, *(x.float() for x in tensors[:3]), rows=rows)
            error = max(relative(out[:, rows], want[0]), relative(lse[:, :, rows], want[1]))
        step = partial(_sparse_step, one, grid, *tensors)
        seconds, gib, layout = timed(step, here.device), peak(here, step), layout_of(one.pattern, grid)
        flop = 14 * layout.pairs(n_txt) * here.heads * 128
        yield Row(
            f"{cfg.pattern} by {one.way.name}, {n:,} tokens", passed=error <= TOLERANCE[dtype], error=error,
            ms=1000 * seconds, tflops=flop / seconds / 1e12, mfu=flop / seconds / top, peak_gib=gib,
            note=f"{layout.density(n_txt):.0%} of the pairs, {exact / seconds:.2f}x exact",
        )


def _dense_step(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, d_out: Tensor) -> None:
    assert kernel.backward is not None
    with torch.no_grad():
        kernel.backward(d_out, q, k, v, kernel.partial(q, k, v))


def _sparse_step(one: Sparse, grid: Grid, q: Tensor, k: Tensor, v: Tensor, d_out: Tensor) -> None:
    with torch.no_grad():
        one.way.backward(one, grid, d_out, q, k, v, one.way.partial(one, grid, q, k, v))
