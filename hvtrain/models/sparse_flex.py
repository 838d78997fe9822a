"""Sparse attention by PyTorch's flex_attention: forward with its log-sum-exp, and a backward that takes
the result, as exact kernels have. Its kernels are generated when they are first called, which takes a
minute."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from hvtrain.models.dit import Grid
from hvtrain.models.kernels import Grads, Partial
from hvtrain.models.sparse_masks import Pattern, layout_of

BLOCK = 128  # tokens of a block of flex_attention, which is computed whole, masked or passed by
_SINCE = (2, 13)  # the backward as it is called here


def missing(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"it needs a CUDA device, this is {device.type}, where flex_attention has no backward"
    if tuple(map(int, torch.__version__.split(".")[:2])) < _SINCE:
        return f"it needs PyTorch {'.'.join(map(str, _SINCE))} or newer, this is {torch.__version__}"
    if importlib.util.find_spec("triton") is None:
        return "the Python package 'triton' is not installed"
    return None


class Blocks:
    """What becomes of each pair of blocks, [n n] bool: whole ones are computed without looking at single
    tokens."""

    def __init__(self, pattern: Pattern, grid: Grid, n_txt: int) -> None:
        bounds, keep = layout_of(pattern, grid)
        sizes = np.diff(bounds)
        self.run = np.repeat(np.arange(len(sizes) + 1), [*sizes, n_txt])  # [S]: the text is one more run
        self.keep = np.pad(keep, (0, 1), constant_values=True)
        ends = np.arange(1, -(-len(self.run) // BLOCK) + 1) * BLOCK
        first, last = self.run[::BLOCK], self.run[ends.clip(max=len(self.run)) - 1] + 1
        # kept pairs of runs before it
        corner = np.pad(self.keep.astype(int).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
        kept = corner[np.ix_(last, last)] - corner[np.ix_(first, last)] - corner[np.ix_(last, first)]
        kept += corner[np.ix_(first, first)]
        inside = ends <= len(self.run)  # the last block may reach beyond the tokens
        self.whole = (kept == np.outer(last - first, last - first)) & np.outer(inside, inside)
        self.some = (kept > 0) & ~self.whole

    @property
    def density(self) -> float:
        """Of all blocks, those that are computed."""
        return float((self.whole | self.some).mean())


@lru_cache(maxsize=16)
def block_mask(pattern: Pattern, grid: Grid, n_txt: int, device: torch.device) -> BlockMask:
    blocks = Blocks(pattern, grid, n_txt)
    run, keep = (torch.from_numpy(x).to(device) for x in (blocks.run, blocks.keep))

    def kept(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return keep[run[q], run[k]]

    n = len(blocks.run)
    some, whole = ([x.to(device) for x in _ordered(which)] for which in (blocks.some, blocks.whole))
    return BlockMask.from_kv_blocks(
        some[0], some[1], whole[0], whole[1], BLOCK_SIZE=BLOCK, mask_mod=kept, seq_lengths=(n, n)
    )


def _ordered(which: np.ndarray) -> tuple[Tensor, Tensor]:
    """[n n] bool to how many of each row, and their columns first: [1 1 n] and [1 1 n n], int32."""
    columns = np.argsort(~which, axis=1, kind="stable")
    n, first = (torch.from_numpy(x.astype(np.int32))[None, None] for x in (which.sum(1), columns))
    return n, first


@cache
def _compiled(function: Callable) -> Any:
    return torch.compile(function)


def partial(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Partial:
    out, lse = _compiled(_forward)(*_heads_first(q, k, v), mask)
    return Partial(out.transpose(1, 2), lse)


def backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, result: Partial, mask: BlockMask) -> Grads:
    dout, q, k, v, out = _heads_first(dout, q, k, v, result.out)
    return Grads(*_heads_first(*_compiled(_grads)(dout, q, k, v, out, result.lse, mask)))


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    """And back. Inside an operator tensors still say that they are learnt, which here nobody may heed."""
    return [x.detach().transpose(1, 2) for x in tensors]


def _forward(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> tuple[Tensor, Tensor]:
    out, aux = flex_attention(q, k, v, block_mask=mask, return_aux=AuxRequest(lse=True))
    assert aux.lse is not None
    return out, aux.lse


def _same(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return score


_OPTIONS = {
    "BACKEND": "AUTO", "PRESCALE_QK": False, "ROWS_GUARANTEED_SAFE": False, "BLOCKS_ARE_CONTIGUOUS": False,
    "WRITE_DQ": True, "OUTPUT_LOGSUMEXP": True, "OUTPUT_MAX": False,
}


def _grads(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: BlockMask
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator behind flex_attention's backward, whose log-sum-exp is of base 2."""
    grads = torch.ops.higher_order.flex_attention_backward(
        q, k, v, out, lse / math.log(2), dout, None, _same, None, mask.as_tuple(), q.shape[-1] ** -0.5,
        _OPTIONS, (), ()
    )
    return grads[0], grads[1], grads[2]
