"""Exact joint attention over Ulysses x ring ranks (USP, arXiv:2405.07719), forward and
backward, for any token count.

Image tokens are sharded, text tokens are replicated. Ulysses trades tokens for heads by all-to-all: each
rank then has all tokens of its ring shard for N/U heads, and takes the same heads of the text. Around the
ring the image K/V travel; text K/V join the rank's own block, so they are counted once. Text queries are
few and are computed on every ring rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from yunchang.ring.utils import RingComm

from hvtrain.models.attend_op import attention, attention_backward
from hvtrain.models.attention import (
    Attention,
    Fewer,
    join,
    local_attend,
    rows_of_equal_length,
    split,
    stack_rows,
)
from hvtrain.models.dit import Grid, Joint, Rope, Tokens
from hvtrain.models.kernels import Kernel, Partial, numbered
from hvtrain.parallel.collectives import gather, heads_to_ranks, tokens_to_ranks
from hvtrain.parallel.context import ParallelContext, check_heads
from hvtrain.parallel.recompute import KEPT


@dataclass(frozen=True)
class ShardedSequence:
    """Splits the image tokens over the sequence-parallel ranks, padded to a
    multiple of them; text stays whole."""

    ctx: ParallelContext

    def scatter(self, tokens: Tokens) -> Tokens:
        return replace(
            tokens,
            img=self._shard(tokens.img, 1),
            rope=Rope(*(self._shard(table, 0) for table in tokens.rope)),
            per_token={name: self._shard(x, 1) for name, x in tokens.per_token.items()},
        )

    def gather(self, img: Tensor, n_img: int) -> Tensor:
        return gather(img, 1, self.ctx.sp_group)[:, :n_img]

    def _shard(self, x: Tensor, dim: int) -> Tensor:
        """This rank's slice. A plain slice is its own true adjoint: the gradient of other
        ranks' tokens is zero here."""
        n, size = x.shape[dim], self.ctx.sp
        chunk = -(-n // size)
        if chunk * size > n:
            x = F.pad(x, [0, 0] * (x.ndim - 1 - dim) + [0, chunk * size - n])
        # A copy: a view would keep the whole sequence in memory on every rank.
        return x.narrow(dim, self.ctx.sp_rank * chunk, chunk).clone()


@dataclass
class UspAttention(Attention):
    """models.dit.Attend over the ranks of ctx. Across, every rank attends with
    its own part of the queries."""

    ctx: ParallelContext = field(kw_only=True)
    place: int = field(init=False)

    def __post_init__(self) -> None:
        self.place = _place(self.ctx)  # not in a block: torch.compile does not compare contexts

    def joint(
        self, q: Joint, k: Joint, v: Joint, *, txt_len: tuple[int, ...], n_img: int,
        sparse: Grid | None = None
    ) -> Joint:
        return usp_attend(
            q, k, v, txt_len=txt_len, n_img=n_img, ctx=self.ctx, kernel=self.kernel, fewer=self.fewer(sparse),
            place=self.place,
        )


def usp_attend(
    q: Joint, k: Joint, v: Joint, *, txt_len: tuple[int, ...], n_img: int, ctx: ParallelContext,
    kernel: Kernel, fewer: Fewer | None = None, place: int | None = None,
) -> Joint:
    """`local_attend` over the ranks of ctx: img is this rank's shard [B s N D], txt is whole, n_img counts
    all ranks. `fewer` is for Ulysses alone: around a ring a rank never holds all keys of its queries.
    `place`: ctx's number, where known."""
    assert fewer is None or ctx.ring == 1
    q, k, v = (_autocast(x) for x in (q, k, v))
    text = q.txt
    if ctx.ulysses > 1:
        q, k, v = _split_heads(q, k, v, ctx)
    if ctx.ring > 1:
        place = _place(ctx) if place is None else place
        img, txt, _ = (
            ring(q.img, k.img, v.img, q.txt, k.txt, v.txt, list(txt_len), n_img, kernel.number, place)
        )
        out = Joint(img, txt)
    else:
        out = local_attend(q, k, v, txt_len=txt_len, n_img=n_img, kernel=kernel, fewer=fewer)
    if ctx.ulysses > 1:
        # No text, no message: a model whose image tokens attend to themselves alone
        # has none to put together again.
        txt = gather(out.txt, 2, ctx.ulysses_group) if text.shape[1] else text
        out = Joint(tokens_to_ranks(out.img, ctx.ulysses_group), txt)
    return out


def _autocast(x: Joint) -> Joint:
    """What autocast would do inside the kernel, done before the wire: half the bytes."""
    device = x.img.device.type
    if not torch.is_autocast_enabled(device):
        return x
    dtype = torch.get_autocast_dtype(device)
    return Joint(x.img.to(dtype), x.txt.to(dtype))


def _split_heads(q: Joint, k: Joint, v: Joint, ctx: ParallelContext) -> tuple[Joint, Joint, Joint]:
    """Image q, k, v through one all-to-all (stacked on the batch axis); text keeps
    this rank's slice of the heads."""
    n_heads = q.img.shape[2]
    check_heads(n_heads, ctx.ulysses)
    mine = n_heads // ctx.ulysses
    img = heads_to_ranks(torch.cat([q.img, k.img, v.img]), ctx.ulysses_group).chunk(3)
    txt = (x.txt.narrow(2, ctx.ulysses_rank * mine, mine) for x in (q, k, v))
    q, k, v = (Joint(i, t) for i, t in zip(img, txt, strict=True))
    return q, k, v


@dataclass(frozen=True)
class RingSpec:
    ctx: ParallelContext
    kernel: Kernel
    txt_len: tuple[int, ...]
    n_img: int  # valid image tokens of all ring ranks; the padding is at the end of the last ones

    def owner(self, step: int) -> int:
        """Whose K/V this rank holds at this step: blocks move to the next rank."""
        return (self.ctx.ring_rank - step) % self.ctx.ring

    def n_valid(self, owner: int, shard: int) -> int:
        return min(max(self.n_img - owner * shard, 0), shard)

    @property
    def runs(self) -> list[tuple[slice, int]]:
        return rows_of_equal_length(self.txt_len)


_PLACES: list[ParallelContext] = []  # an operator's arguments are numbers


def _place(ctx: ParallelContext) -> int:
    if ctx not in _PLACES:
        _PLACES.append(ctx)
    return _PLACES.index(ctx)


def _ring(
    q_img: Tensor, k_img: Tensor, v_img: Tensor, q_txt: Tensor, k_txt: Tensor, v_txt: Tensor,
    txt_len: list[int], n_img: int, kernel: int, place: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention whose K/V blocks go round a ring, the next one in flight while this one is computed.
    Partial results merge by log-sum-exp in fp32. Gives the output of image [B s N D] and text [B L N D],
    and both's log-sum-exp [B N s+L]."""
    spec = RingSpec(_PLACES[place], numbered(kernel), tuple(txt_len), n_img)
    shard, pad = q_img.shape[1], q_txt.shape[1]
    n_q = spec.n_valid(spec.ctx.ring_rank, shard)
    results = _go_round(Joint(q_img, q_txt), torch.stack([k_img, v_img]), (k_txt, v_txt), spec)
    out = stack_rows([split(r.out, n_img=n_q, pad_img=shard, pad_txt=pad) for r in results])
    lse = [split(r.lse.transpose(1, 2).unsqueeze(-1), n_img=n_q, pad_img=shard, pad_txt=pad) for r in results]
    joined = torch.cat([torch.cat([part.img, part.txt], dim=1) for part in lse]).squeeze(-1).transpose(1, 2)
    return out.img.contiguous(), out.txt.clone(), joined.contiguous()  # no two of one tensor's memory


def _ring_backward(
    d_img: Tensor, d_txt: Tensor, q_img: Tensor, k_img: Tensor, v_img: Tensor, q_txt: Tensor, k_txt: Tensor,
    v_txt: Tensor, img: Tensor, txt: Tensor, lse: Tensor, txt_len: list[int], n_img: int, kernel: int,
    place: int,
) -> list[Tensor]:
    """Sends K/V round again and lets dK/dV (fp32) travel with them, one hop behind, until they are home."""
    spec = RingSpec(_PLACES[place], numbered(kernel), tuple(txt_len), n_img)
    ctx, runs, shard = spec.ctx, spec.runs, q_img.shape[1]
    n_q = spec.n_valid(ctx.ring_rank, shard)
    queries, d_outs, outs = (
        [join(x, rows, n_img=n_q, n_txt=n) for rows, n in runs]
        for x in (Joint(q_img, q_txt), Joint(d_img, d_txt), Joint(img, txt))
    )
    lses = [torch.cat([lse[rows, :, :n_q], lse[rows, :, shard : shard + n]], dim=-1) for rows, n in runs]
    d_q = [torch.zeros_like(q, dtype=torch.float32) for q in queries]
    d_kv_txt = torch.zeros_like(k_txt), torch.zeros_like(v_txt)
    kv, comm, d_comm = torch.stack([k_img, v_img]), RingComm(ctx.ring_group), RingComm(ctx.ring_group)
    arriving = kv  # dK/dV of the block at hand, from the ranks before this one; replaced in the first step
    for step in range(ctx.ring):
        more = step + 1 < ctx.ring
        if more:
            coming = comm.send_recv(kv)
            comm.commit()
        n_k = spec.n_valid(spec.owner(step), shard)
        d_kv = torch.zeros_like(kv, dtype=torch.float32)
        for i, (rows, n_txt) in enumerate(runs):
            keys, values = _block(kv, rows, n_k, (k_txt, v_txt), n_txt if step == 0 else 0)
            if not (keys.shape[1] and queries[i].shape[1]):
                continue
            dq, dk, dv = attention_backward(d_outs[i], queries[i], keys, values, outs[i], lses[i], kernel)
            d_q[i] += dq
            for which, grad in enumerate((dk, dv)):
                d_kv[which, rows, :n_k] = grad[:, :n_k]
                d_kv_txt[which][rows, : grad.shape[1] - n_k] = grad[:, n_k:]  # all of it in step 0
        if step:
            d_comm.wait()
            d_kv += arriving
        arriving = d_comm.send_recv(d_kv)
        d_comm.commit()
        if more:
            comm.wait()
            kv = coming
    d_comm.wait()
    dq = stack_rows([split(d, n_img=n_q, pad_img=shard, pad_txt=q_txt.shape[1]) for d in d_q])
    grads = (dq.img, *arriving, dq.txt, *d_kv_txt)
    return [g.to(q_img.dtype, memory_format=torch.contiguous_format, copy=True) for g in grads]


_WHERE = "SymInt[] txt_len, SymInt n_img, SymInt kernel, SymInt place"
_QKV = "Tensor q_img, Tensor k_img, Tensor v_img, Tensor q_txt, Tensor k_txt, Tensor v_txt"
ring = torch.library.custom_op(
    "hvtrain::ring", _ring, mutates_args=(), schema=f"({_QKV}, {_WHERE}) -> (Tensor, Tensor, Tensor)"
)
ring_backward = torch.library.custom_op(
    "hvtrain::ring_backward", _ring_backward, mutates_args=(),
    schema=f"(Tensor d_img, Tensor d_txt, {_QKV}, Tensor img, Tensor txt, Tensor lse, {_WHERE}) -> Tensor[]",
)
KEPT.append(torch.ops.hvtrain.ring.default)
# For who follows memory: what these take besides their results is seen in their bodies.
INSIDE = {torch.ops.hvtrain.ring: _ring, torch.ops.hvtrain.ring_backward: _ring_backward}


@ring.register_fake
def _(  # type: ignore[no-untyped-def]
    q_img, k_img, v_img, q_txt, k_txt, v_txt, txt_len, n_img, kernel, place
):
    b, s, n, _ = q_img.shape
    lse = q_img.new_empty(b, n, s + q_txt.shape[1], dtype=torch.float32)
    return q_img.new_empty(q_img.shape), q_txt.new_empty(q_txt.shape), lse


@ring_backward.register_fake
def _(d_img, d_txt, *args):  # type: ignore[no-untyped-def]
    return [x.new_empty(x.shape) for x in args[:6]]


def _keep(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.rest = inputs[6:]
    ctx.save_for_backward(*inputs[:6], *output)


def _differentiate(ctx: Any, d_img: Tensor, d_txt: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *ring_backward(d_img, d_txt, *ctx.saved_tensors, *ctx.rest), None, None, None, None


ring.register_autograd(_differentiate, setup_context=_keep)


def _go_round(q: Joint, kv: Tensor, kv_txt: tuple[Tensor, Tensor], spec: RingSpec) -> list[Partial]:
    """Each run of rows' attention over the blocks of all ranks, the output in q's dtype."""
    ctx, runs, shard = spec.ctx, spec.runs, q.img.shape[1]
    n_q = spec.n_valid(ctx.ring_rank, shard)
    queries = [join(q, rows, n_img=n_q, n_txt=n_txt) for rows, n_txt in runs]
    merged: list[Partial | None] = [None] * len(runs)
    comm = RingComm(ctx.ring_group)
    for step in range(ctx.ring):
        more = step + 1 < ctx.ring
        if more:
            coming = comm.send_recv(kv)
            comm.commit()
        n_k = spec.n_valid(spec.owner(step), shard)
        for i, (rows, n_txt) in enumerate(runs):
            keys, values = _block(kv, rows, n_k, kv_txt, n_txt if step == 0 else 0)
            if keys.shape[1] and queries[i].shape[1]:
                merged[i] = _merge(
                    merged[i], Partial(*attention(queries[i], keys, values, spec.kernel.number))
                )
        if more:
            comm.wait()
            kv = coming
    results = [m or _nothing(one) for m, one in zip(merged, queries, strict=True)]
    return [Partial(r.out.to(q.img.dtype), r.lse) for r in results]


def _block(
    kv: Tensor, rows: slice, n_img: int, txt: tuple[Tensor, Tensor], n_txt: int
) -> tuple[Tensor, Tensor]:
    """Keys and values of these samples: the valid image tokens of the block at
    hand, and n_txt of the text."""
    keys, values = (join(Joint(i, t), rows, n_img=n_img, n_txt=n_txt) for i, t in zip(kv, txt, strict=True))
    return keys, values


def _merge(a: Partial | None, b: Partial) -> Partial:
    """Attention over the union of two key sets, in fp32."""
    if a is None:
        return Partial(b.out.float(), b.lse.float())
    lse = torch.logaddexp(a.lse, b.lse)  # [B N S]
    weight_a, weight_b = (torch.exp(x.lse - lse).transpose(1, 2).unsqueeze(-1) for x in (a, b))
    return Partial(a.out * weight_a + b.out.float() * weight_b, lse)


def _nothing(q: Tensor) -> Partial:
    """No keys at all (a sample without text whose image lies elsewhere, and no queries): zeros."""
    b, s, n, _ = q.shape
    return Partial(torch.zeros_like(q, dtype=torch.float32), q.new_zeros(b, n, s, dtype=torch.float32))
