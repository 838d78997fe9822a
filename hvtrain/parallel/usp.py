"""Exact joint attention over Ulysses x ring ranks (USP, arXiv:2405.07719), forward and backward, for any token count.

Image tokens are sharded, text tokens are replicated. Ulysses trades tokens for heads by all-to-all: each rank then
has all tokens of its ring shard for N/U heads, and takes the same heads of the text. Around the ring the image K/V
travel; text K/V join the rank's own block, so they are counted once. Text queries are few and are computed on every
ring rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from yunchang.ring.utils import RingComm

from hvtrain.models.attention import (
    Attention,
    join,
    local_attend,
    recall,
    rows_of_equal_length,
    split,
    stack_rows,
)
from hvtrain.models.dit import Joint, Rope, Tokens
from hvtrain.models.kernels import Kernel, Partial
from hvtrain.parallel.collectives import gather, heads_to_ranks, tokens_to_ranks
from hvtrain.parallel.context import ParallelContext, check_heads


@dataclass(frozen=True)
class ShardedSequence:
    """Splits the image tokens over the sequence-parallel ranks, padded to a multiple of them; text stays whole."""

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
        """This rank's slice. A plain slice is its own true adjoint: the gradient of other ranks' tokens is zero here."""
        n, size = x.shape[dim], self.ctx.sp
        chunk = -(-n // size)
        if chunk * size > n:
            x = F.pad(x, [0, 0] * (x.ndim - 1 - dim) + [0, chunk * size - n])
        # A copy: a view would keep the whole sequence in memory on every rank.
        return x.narrow(dim, self.ctx.sp_rank * chunk, chunk).clone()


@dataclass
class UspAttention(Attention):
    """models.dit.Attend over the ranks of ctx. Across, every rank attends with its own part of the queries."""

    ctx: ParallelContext = field(kw_only=True)

    def joint(self, q: Joint, k: Joint, v: Joint, *, txt_len: tuple[int, ...], n_img: int) -> Joint:
        return usp_attend(q, k, v, txt_len=txt_len, n_img=n_img, ctx=self.ctx, kernel=self.kernel)


def usp_attend(
    q: Joint, k: Joint, v: Joint, *, txt_len: tuple[int, ...], n_img: int, ctx: ParallelContext, kernel: Kernel
) -> Joint:
    """`local_attend` over the ranks of ctx: img is this rank's shard [B s N D], txt is whole, n_img counts all ranks."""
    q, k, v = (_autocast(x) for x in (q, k, v))
    text = q.txt
    if ctx.ulysses > 1:
        q, k, v = _split_heads(q, k, v, ctx)
    if ctx.ring > 1:
        spec = RingSpec(ctx.ring_group, ctx.ring_rank, ctx.ring, kernel, txt_len, n_img)
        out = Joint(*_Ring.apply(q.img, k.img, v.img, q.txt, k.txt, v.txt, spec))
    else:
        out = local_attend(q, k, v, txt_len=txt_len, n_img=n_img, kernel=kernel)
    if ctx.ulysses > 1:
        # No text, no message: a model whose image tokens attend to themselves alone has none to put together again.
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
    """Image q, k, v through one all-to-all (stacked on the batch axis); text keeps this rank's slice of the heads."""
    n_heads = q.img.shape[2]
    check_heads(n_heads, ctx.ulysses)
    mine = n_heads // ctx.ulysses
    img = heads_to_ranks(torch.cat([q.img, k.img, v.img]), ctx.ulysses_group).chunk(3)
    txt = (x.txt.narrow(2, ctx.ulysses_rank * mine, mine) for x in (q, k, v))
    q, k, v = (Joint(i, t) for i, t in zip(img, txt, strict=True))
    return q, k, v


class RingSpec(NamedTuple):
    group: dist.ProcessGroup | None
    rank: int
    size: int
    kernel: Kernel
    txt_len: tuple[int, ...]
    n_img: int  # valid image tokens of all ring ranks; the padding is at the end of the last ones

    def owner(self, step: int) -> int:
        """Whose K/V this rank holds at this step: blocks move to the next rank."""
        return (self.rank - step) % self.size

    def n_valid(self, owner: int, shard: int) -> int:
        return min(max(self.n_img - owner * shard, 0), shard)


class _Ring(torch.autograd.Function):
    """Attention whose K/V blocks go round a ring, the next one in flight while this one is computed.

    Partial results merge by log-sum-exp in fp32. The backward sends K/V round again and lets dK/dV (fp32) travel with
    them, one hop behind, until they are home.
    """

    @staticmethod
    def forward(ctx, q_img, k_img, v_img, q_txt, k_txt, v_txt, spec: RingSpec):  # type: ignore[override]
        shard, n_q = q_img.shape[1], spec.n_valid(spec.rank, q_img.shape[1])
        runs = rows_of_equal_length(spec.txt_len)
        q, kv_txt = Joint(q_img, q_txt), (k_txt, v_txt)
        results = recall(lambda: _go_round(q, torch.stack([k_img, v_img]), kv_txt, spec))
        outs = [r.out for r in results]
        ctx.spec, ctx.runs = spec, runs
        ctx.save_for_backward(q_img, k_img, v_img, q_txt, k_txt, v_txt, *outs, *(r.lse for r in results))
        return tuple(stack_rows([split(o, n_img=n_q, pad_img=shard, pad_txt=q_txt.shape[1]) for o in outs]))

    @staticmethod
    def backward(ctx, d_img: Tensor, d_txt: Tensor):  # type: ignore[override]
        spec, runs = ctx.spec, ctx.runs
        q_img, k_img, v_img, q_txt, k_txt, v_txt, *rest = ctx.saved_tensors
        results = [Partial(*pair) for pair in zip(rest[: len(runs)], rest[len(runs) :], strict=True)]
        shard, n_q = q_img.shape[1], spec.n_valid(spec.rank, q_img.shape[1])
        queries = [join(Joint(q_img, q_txt), rows, n_img=n_q, n_txt=n) for rows, n in runs]
        d_outs = [join(Joint(d_img, d_txt), rows, n_img=n_q, n_txt=n) for rows, n in runs]
        d_q = [torch.zeros_like(q, dtype=torch.float32) for q in queries]
        d_kv_txt = torch.zeros_like(k_txt), torch.zeros_like(v_txt)
        kv, comm, d_comm = torch.stack([k_img, v_img]), RingComm(spec.group), RingComm(spec.group)
        arriving = kv  # dK/dV of the block at hand, from the ranks before this one; replaced in the first step
        for step in range(spec.size):
            more = step + 1 < spec.size
            if more:
                coming = comm.send_recv(kv)
                comm.commit()
            n_k = spec.n_valid(spec.owner(step), shard)
            d_kv = torch.zeros_like(kv, dtype=torch.float32)
            for i, (rows, n_txt) in enumerate(runs):
                keys, values = _block(kv, rows, n_k, (k_txt, v_txt), n_txt if step == 0 else 0)
                if not (keys.shape[1] and queries[i].shape[1]):
                    continue
                grads = spec.kernel.backward(d_outs[i], queries[i], keys, values, results[i])
                d_q[i] += grads.q
                for which, grad in enumerate((grads.k, grads.v)):
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
        return *(g.to(q_img.dtype) for g in grads), None


def _go_round(q: Joint, kv: Tensor, kv_txt: tuple[Tensor, Tensor], spec: RingSpec) -> list[Partial]:
    """Each run of rows' attention over the blocks of all ranks, the output in q's dtype."""
    shard, n_q = q.img.shape[1], spec.n_valid(spec.rank, q.img.shape[1])
    runs = rows_of_equal_length(spec.txt_len)
    queries = [join(q, rows, n_img=n_q, n_txt=n_txt) for rows, n_txt in runs]
    merged: list[Partial | None] = [None] * len(runs)
    comm = RingComm(spec.group)
    for step in range(spec.size):
        more = step + 1 < spec.size
        if more:
            coming = comm.send_recv(kv)
            comm.commit()
        n_k = spec.n_valid(spec.owner(step), shard)
        for i, (rows, n_txt) in enumerate(runs):
            keys, values = _block(kv, rows, n_k, kv_txt, n_txt if step == 0 else 0)
            if keys.shape[1] and queries[i].shape[1]:
                merged[i] = _merge(merged[i], spec.kernel.partial(queries[i], keys, values))
        if more:
            comm.wait()
            kv = coming
    results = [m or _nothing(one) for m, one in zip(merged, queries, strict=True)]
    return [Partial(r.out.to(q.img.dtype), r.lse) for r in results]


def _block(kv: Tensor, rows: slice, n_img: int, txt: tuple[Tensor, Tensor], n_txt: int) -> tuple[Tensor, Tensor]:
    """Keys and values of these samples: the valid image tokens of the block at hand, and n_txt of the text."""
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
