"""Sparse attention: a pattern of pairs (sparse_masks.py) and a way to compute it, as an operator of PyTorch
like exact attention.

It is NOT exact, and nothing takes it by itself. torch.compile passes the operator by, selective
recomputation keeps its result, and a count of FLOP knows how many pairs are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from hvtrain.config import SparseConfig
from hvtrain.errors import ConfigError
from hvtrain.models import sparse_flex
from hvtrain.models.dit import DiT, Grid, Rope, Tokens
from hvtrain.models.kernels import KERNELS, Grads, Kernel, Partial
from hvtrain.models.precision import under_autocast
from hvtrain.models.sparse_masks import Pattern, SlidingTiles, layout_of, pattern_of
from hvtrain.registry import Registry
from hvtrain.rng import generator

_NUMBERED: list[Sparse] = []  # an operator's arguments are numbers


@dataclass(frozen=True)
class Sparse:
    """A pattern, who computes it, and the kernel of exact attention beside it."""

    pattern: Pattern
    way: SparseWay
    dense: Kernel
    exact_layers: int = 0
    number: int = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "number", len(_NUMBERED))
        _NUMBERED.append(self)

    def describe(self) -> str:
        exact = f", the first {self.exact_layers} blocks exact" if self.exact_layers else ""
        return f"sparse ({self.pattern.describe()}, by {self.way.name}{exact}; NOT exact)"


@dataclass(frozen=True)
class SparseWay:
    """How it is computed: q, k, v [B S N D] of the grid's video tokens, in the pattern's order, and then
    of the text."""

    name: str
    partial: Callable[[Sparse, Grid, Tensor, Tensor, Tensor], Partial]
    # (.., dout, q, k, v, result)
    backward: Callable[[Sparse, Grid, Tensor, Tensor, Tensor, Tensor, Partial], Grads]
    missing: Callable[[torch.device], str | None]  # why it cannot run there, or None


WAYS: Registry[SparseWay] = Registry("sparse kernel", also=("auto",))


def pick_sparse(
    cfg: SparseConfig, *, dense: Kernel, device: torch.device, dtype: torch.dtype = torch.float32,
    training: bool = True
) -> Sparse | None:
    """What `sparse` of a config means on this device; None: exact attention."""
    if cfg.pattern == "none":
        return None
    name = cfg.kernel if cfg.kernel != "auto" else "flex" if device.type == "cuda" else "gather"
    found = Sparse(pattern_of(cfg), WAYS.find(name, key="sparse.kernel"), dense, cfg.exact_layers)
    reason = found.way.missing(device)
    if reason is None and name == "gather" and training and not dense.trains:
        reason = f"{dense.name} has no backward; set parallel.kernel to auto"
    if reason is None and name == "flex":
        reason = _trial(device, dtype)
    if reason:
        other = (
            "" if name == "gather"
            else "; sparse.kernel=gather computes the same with parallel.kernel, slower"
        )
        raise ConfigError(f"sparse.kernel: '{name}' cannot be used: {reason}{other}")
    return found


def check_sparse(cfg: SparseConfig, model: DiT, *, ring: int, kernel: str) -> None:
    """Where sparse attention does not apply. Raises ConfigError."""
    if cfg.pattern == "none":
        return
    reason = None
    if ring > 1:  # rules.py says it first
        reason = (
            f"parallel.ring is {ring}: around a ring no rank sees whole windows; share the sample by "
            "parallel.ulysses alone"
        )
    elif kernel == "xfuser":
        reason = "parallel.kernel is xfuser, which computes all pairs; set it to auto"
    elif not model.may_be_sparse:
        reason = f"the blocks of {type(model).__name__} do not say where their tokens lie"
    elif cfg.exact_layers >= len(model.blocks):
        reason = (
            f"sparse.exact_layers is {cfg.exact_layers} of {len(model.blocks)} blocks, which leaves nothing"
        )
    if reason:
        raise ConfigError(f"sparse.pattern '{cfg.pattern}' cannot be used: {reason}, or set it to none")


@dataclass
class PatternOrder:
    """models.dit.TokenOrder: once before the blocks and back after them, rotary tables alongside."""

    pattern: Pattern
    known: dict[tuple[Grid, torch.device], _Places | None] = field(default_factory=dict)

    def arrange(self, tokens: Tokens) -> Tokens:
        place = self._places(tokens.grid, tokens.img.device)
        if place is None:
            return replace(tokens, sparse=tokens.grid)
        return replace(
            tokens,
            img=tokens.img.index_select(1, place.order),
            rope=Rope(*(table.index_select(0, place.order) for table in tokens.rope)),
            per_token={name: x.index_select(1, place.order) for name, x in tokens.per_token.items()},
            sparse=tokens.grid,
        )

    def restore(self, img: Tensor, grid: Grid) -> Tensor:
        place = self._places(grid, img.device)
        return img if place is None else img.index_select(1, place.back)

    def _places(self, grid: Grid, device: torch.device) -> _Places | None:
        if (grid, device) not in self.known:
            order, found = self.pattern.order(grid), None
            if order is not None:
                found = _Places(*(torch.from_numpy(x).to(device) for x in (order, order.argsort())))
            self.known[grid, device] = found
        return self.known[grid, device]


class _Places(NamedTuple):
    order: Tensor
    back: Tensor


# --- the operator -------------------------------------------------------------------------------------------

_QKV = "Tensor q, Tensor k, Tensor v"
_WHERE = "SymInt[] grid, SymInt sparse"


def _forward(q: Tensor, k: Tensor, v: Tensor, grid: Sequence[int], sparse: int) -> tuple[Tensor, Tensor]:
    one = _NUMBERED[sparse]
    out, lse = one.way.partial(one, Grid(*grid), q, k, v)
    return out.contiguous(), lse.float().contiguous()


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grid: Sequence[int], sparse: int
) -> tuple[Tensor, Tensor, Tensor]:
    one = _NUMBERED[sparse]
    dq, dk, dv = (
        x.contiguous() for x in one.way.backward(one, Grid(*grid), dout, q, k, v, Partial(out, lse))
    )
    return dq, dk, dv


sparse_attention = torch.library.custom_op(
    "hvtrain::sparse_attention", _forward, mutates_args=(), schema=f"({_QKV}, {_WHERE}) -> (Tensor, Tensor)"
)
sparse_backward = torch.library.custom_op(
    "hvtrain::sparse_attention_backward", _backward, mutates_args=(),
    schema=f"(Tensor dout, {_QKV}, Tensor out, Tensor lse, {_WHERE}) -> (Tensor, Tensor, Tensor)",
)
OP, BACKWARD_OP = torch.ops.hvtrain.sparse_attention, torch.ops.hvtrain.sparse_attention_backward


@sparse_attention.register_fake
def _(q, k, v, grid, sparse):  # type: ignore[no-untyped-def]
    b, s, n, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(b, n, s, dtype=torch.float32)


@sparse_backward.register_fake
def _(dout, q, k, v, out, lse, grid, sparse):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.grid, ctx.sparse = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output)


def _differentiate(ctx: Any, dout: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return None, None, None, None, None
    return *sparse_backward(dout, *ctx.saved_tensors, ctx.grid, ctx.sparse), None, None


sparse_attention.register_autograd(_differentiate, setup_context=_keep)


def _product(q: tuple[int, ...], grid: Sequence[int], sparse: int) -> int:
    """FLOP of one matrix product over the pairs that are kept, of queries [B S N D]."""
    b, s, n, d = q
    layout = layout_of(_NUMBERED[sparse].pattern, Grid(*grid))
    return 2 * b * n * d * layout.pairs(s - layout.n_img)


@register_flop_formula(OP)
def _(q: Any, k: Any, v: Any, grid: Any, sparse: Any, *args: Any, **options: Any) -> int:
    return 2 * _product(q, grid, sparse)


@register_flop_formula(BACKWARD_OP)
def _(
    dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, grid: Any, sparse: Any, *args: Any, **options: Any
) -> int:
    return 5 * _product(q, grid, sparse)  # as of exact attention


def attend_sparse(sparse: Sparse, q: Tensor, k: Tensor, v: Tensor, *, grid: Grid) -> Tensor:
    """[B S N D], differentiable: of the grid's video tokens in the pattern's order, then of the text."""
    if under_autocast(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    return sparse_attention(q, k, v, list(grid), sparse.number)[0]


# --- gather: the exact kernel on what each run of tokens attends; nothing is masked -------------------------


class _Group(NamedTuple):
    """Queries that attend the same keys: places of video tokens."""

    queries: Tensor
    keys: Tensor


@lru_cache(maxsize=8)
def _groups(pattern: Pattern, grid: Grid, device: torch.device) -> list[_Group]:
    layout = layout_of(pattern, grid)
    run = np.repeat(np.arange(len(layout.keep)), layout.sizes)  # [S]
    rows, which = np.unique(layout.keep, axis=0, return_inverse=True)
    found = [
        (np.flatnonzero((which.ravel() == i)[run]), np.flatnonzero(row[run])) for i, row in enumerate(rows)
    ]
    return [_Group(*(torch.from_numpy(x).to(device) for x in both)) for both in found]


def _all_groups(sparse: Sparse, grid: Grid, q: Tensor) -> list[_Group]:
    """With the text, of `q`'s tokens: it is among all keys, and attends all."""
    groups, n = _groups(sparse.pattern, grid, q.device), grid.t * grid.h * grid.w
    if q.shape[1] == n:
        return groups
    whole = torch.arange(q.shape[1], device=q.device)
    return [_Group(g.queries, torch.cat([g.keys, whole[n:]])) for g in groups] + [_Group(whole[n:], whole)]


def _gathered(sparse: Sparse, grid: Grid, q: Tensor, k: Tensor, v: Tensor) -> Partial:
    out, lse = torch.empty_like(q), q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
    for queries, keys in _all_groups(sparse, grid, q):
        part = sparse.dense.partial(q[:, queries], k[:, keys], v[:, keys])
        out[:, queries], lse[:, :, queries] = part.out.to(out), part.lse.to(lse)
    return Partial(out, lse)


def _gathered_backward(
    sparse: Sparse, grid: Grid, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, result: Partial
) -> Grads:
    backward = sparse.dense.backward
    assert backward is not None
    dq = torch.empty_like(q)
    dk, dv = torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
    for queries, keys in _all_groups(sparse, grid, q):
        part = Partial(result.out[:, queries], result.lse[:, :, queries])
        own = backward(dout[:, queries], q[:, queries], k[:, keys], v[:, keys], part)
        dq[:, queries] = own.q.to(dq)
        dk.index_add_(1, keys, own.k.float())
        dv.index_add_(1, keys, own.v.float())
    return Grads(dq, dk.to(k), dv.to(v))


# --- flex ---------------------------------------------------------------------------------------------------


def _flex(sparse: Sparse, grid: Grid, q: Tensor, k: Tensor, v: Tensor) -> Partial:
    n_txt = q.shape[1] - grid.t * grid.h * grid.w
    return sparse_flex.partial(q, k, v, sparse_flex.block_mask(sparse.pattern, grid, n_txt, q.device))


def _flex_backward(
    sparse: Sparse, grid: Grid, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, result: Partial
) -> Grads:
    n_txt = q.shape[1] - grid.t * grid.h * grid.w
    return sparse_flex.backward(
        dout, q, k, v, result, sparse_flex.block_mask(sparse.pattern, grid, n_txt, q.device)
    )


WAYS |= {
    "gather": SparseWay("gather", _gathered, _gathered_backward, lambda device: None),
    "flex": SparseWay("flex", _flex, _flex_backward, sparse_flex.missing),
}


_LITTLE = Grid(4, 12, 16), 40  # whole blocks, masked ones and some that are passed by


@cache
def _trial(device: torch.device, dtype: torch.dtype) -> str | None:
    """Compute a little with flex_attention, forward and backward, and compare: what is wrong, or None.
    What it is called by for the backward is nobody's promise."""
    grid, n_txt = _LITTLE
    draw = generator(0, stream="sparse-trial")
    n = grid.t * grid.h * grid.w + n_txt
    q, k, v, d_out = (torch.randn(1, n, 2, 128, generator=draw).to(device, dtype) for _ in range(4))
    plain, flex = (

            Sparse(SlidingTiles((2, 4, 16), (1, 1, 1)), WAYS[name], KERNELS["sdpa"])
            for name in ("gather", "flex")

    )
    with torch.no_grad():
        want = plain.way.partial(plain, grid, q, k, v)
        wanted = [*want, *plain.way.backward(plain, grid, d_out, q, k, v, want)]
        try:
            have = flex.way.partial(flex, grid, q, k, v)
            found = [*have, *flex.way.backward(flex, grid, d_out, q, k, v, have)]
        except Exception as error:  # of any kind: it is not our code
            return f"a call of it fails: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    near = all(
        float((a.float() - b.float()).abs().max()) <= 0.1 * float(b.float().abs().max()) for a,
        b in zip(found, wanted)
    )
    return None if near else "it computes something else here"
