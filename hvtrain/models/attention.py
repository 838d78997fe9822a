"""Attention over the valid tokens, joint or across: exact, unless a run asks for less by name (sparse.py).

No mask is ever built: padding is cut off before the kernel and put back as zeros, so cost and memory
are those of the valid tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hvtrain.models.attend_op import attend
from hvtrain.models.dit import Grid, Joint
from hvtrain.models.kernels import KERNELS, Kernel
from hvtrain.models.sparse import Sparse, attend_sparse


class Fewer(NamedTuple):
    """Not all pairs of this grid's tokens."""

    sparse: Sparse
    grid: Grid


@dataclass
class Attention:
    """models.dit.Attend on one device."""

    kernel: Kernel = KERNELS["sdpa"]
    sparse: Sparse | None = None  # where tokens are in its order

    def joint(
        self, q: Joint, k: Joint, v: Joint, *, txt_len: tuple[int, ...], n_img: int,
        sparse: Grid | None = None
    ) -> Joint:
        return local_attend(
            q, k, v, txt_len=txt_len, n_img=n_img, kernel=self.kernel, fewer=self.fewer(sparse)
        )

    def fewer(self, grid: Grid | None) -> Fewer | None:
        return None if grid is None or self.sparse is None else Fewer(self.sparse, grid)

    def cross(self, q: Tensor, k: Tensor, v: Tensor, *, lengths: tuple[int, ...]) -> Tensor:
        outs = []
        for rows, n in rows_of_equal_length(lengths):
            outs.append(
                attend(self.kernel, q[rows], k[rows, :n], v[rows, :n]) if n else _no_keys(q[rows], k, v)
            )
        return outs[0] if len(outs) == 1 else torch.cat(outs)


def _no_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Zeros, to which q, k and v belong all the same: their layers get gradients, of zero, on this rank as on
    those whose samples have keys. Engines that reduce gradients as they come would wait for them."""
    return torch.zeros_like(q) + sum(x[:, :0].sum() for x in (q, k, v))


def local_attend(
    q: Joint, k: Joint, v: Joint, *, txt_len: tuple[int, ...], n_img: int, kernel: Kernel | None = None,
    fewer: Fewer | None = None,
) -> Joint:
    """Joint attention of image and text on one device; padded positions (image beyond n_img, text beyond
    txt_len) are neither read nor written: their output is zero."""
    kernel = kernel or KERNELS["sdpa"]
    parts = []
    for rows, n_txt in rows_of_equal_length(txt_len):
        joined = (join(x, rows, n_img=n_img, n_txt=n_txt) for x in (q, k, v))
        out = (
            attend(kernel, *joined)
            if fewer is None else attend_sparse(fewer.sparse, *joined, grid=fewer.grid)
        )
        parts.append(split(out, n_img=n_img, pad_img=q.img.shape[1], pad_txt=q.txt.shape[1]))
    return stack_rows(parts)


def rows_of_equal_length(txt_len: tuple[int, ...]) -> list[tuple[slice, int]]:
    """Runs of neighbouring samples with the same number of text tokens: each is
    one rectangular kernel call."""
    runs: list[tuple[slice, int]] = []
    for row, length in enumerate(txt_len):
        if runs and runs[-1][1] == length:
            runs[-1] = (slice(runs[-1][0].start, row + 1), length)
        else:
            runs.append((slice(row, row + 1), length))
    return runs


def join(x: Joint, rows: slice, *, n_img: int, n_txt: int) -> Tensor:
    """[b, n_img + n_txt, N, D]: the valid tokens of these samples, image first."""
    if n_txt == 0:
        return x.img[rows, :n_img]
    return torch.cat([x.img[rows, :n_img], x.txt[rows, :n_txt]], dim=1)


def split(out: Tensor, *, n_img: int, pad_img: int, pad_txt: int) -> Joint:
    """Undo `join`, padding the image to pad_img and the text to pad_txt tokens with zeros."""
    img, txt = out[:, :n_img], out[:, n_img:]
    return Joint(_padded(img, pad_img), _padded(txt, pad_txt))


def _padded(x: Tensor, n: int) -> Tensor:
    missing = n - x.shape[1]
    return F.pad(x, (0, 0, 0, 0, 0, missing)) if missing else x  # padding by nothing would copy


def stack_rows(parts: list[Joint]) -> Joint:
    if len(parts) == 1:
        return parts[0]
    return Joint(torch.cat([p.img for p in parts]), torch.cat([p.txt for p in parts]))
