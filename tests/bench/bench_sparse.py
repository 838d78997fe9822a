"""Sparse attention beside exact attention, forward and backward: python -m tests.bench.bench_sparse [--frames
129 ...]

On a GPU at 24 heads of 128 and the sizes asked for, by flex_attention; elsewhere tiny, by gather. The
error is that to gather, which masks nothing.
"""

from __future__ import annotations

import argparse
import math

import torch

from hvtrain.config import SparseConfig
from hvtrain.models import find
from hvtrain.models.kernels import pick_kernel
from hvtrain.models.measure import Size, drawn, timed
from hvtrain.models.sparse import WAYS, Sparse, pick_sparse
from hvtrain.models.sparse_masks import layout_of


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser()
    parser.add_argument("--width", type=int, default=1280 if cuda else 96)
    parser.add_argument("--height", type=int, default=720 if cuda else 64)
    parser.add_argument("--frames", type=int, default=129 if cuda else 9)
    parser.add_argument("--text", type=int, default=200 if cuda else 7)
    args = parser.parse_args()
    device, dtype = torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if cuda else torch.float32
    latent = find("hunyuan-video").flavor("t2v").latent
    grid = latent.grid(latent.shape(frames=args.frames, height=args.height, width=args.width))
    n = math.prod(grid) + args.text
    q, k, v, d_out = drawn(Size(n, n, heads=24 if cuda else 2), device, dtype)
    dense = pick_kernel("auto", device=device, dtype=dtype)
    assert dense.backward is not None
    with torch.no_grad():
        whole = dense.partial(q, k, v)
        exact = [
            timed(lambda: dense.partial(q, k, v), device),
            timed(lambda: dense.backward(d_out, q, k, v, whole), device)
        ]
        tokens = f"{n:,} tokens of {' x '.join(map(str, grid))} and text"
        print(f"{tokens}; {dense.name}: {1e3 * exact[0]:.1f} + {1e3 * exact[1]:.1f} ms")
        for pattern in ("tiles", "radial"):
            one = pick_sparse(SparseConfig(pattern), dense=dense, device=device, dtype=dtype)
            assert one is not None
            plain = Sparse(one.pattern, WAYS["gather"], dense)
            found, want = (x.way.partial(x, grid, q, k, v) for x in (one, plain))
            pairs = zip(
                (*found, *one.way.backward(one, grid, d_out, q, k, v, found)),
                (*want, *plain.way.backward(plain, grid, d_out, q, k, v, want)), strict=True,
            )
            error = max(float((a.float() - b.float()).abs().max() / b.float().abs().max()) for a, b in pairs)
            times = [
                timed(lambda: one.way.partial(one, grid, q, k, v), device),  # noqa: B023
                timed(lambda: one.way.backward(one, grid, d_out, q, k, v, found), device),  # noqa: B023
            ]
            gain = sum(exact) / sum(times)
            print(
                f"{one.describe()}: {layout_of(one.pattern, grid).density(args.text):.1%} of the pairs, "
                f"{1e3 * times[0]:.1f} + {1e3 * times[1]:.1f} ms, {gain:.2f}x exact attention, error "
                f"{error:.1e}"
            )


if __name__ == "__main__":
    main()
