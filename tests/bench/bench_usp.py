"""Sequence-parallel attention against one process, and what it sends: one core a rank, gloo.

    python -m tests.bench.bench_usp [--tokens 8192] [--heads 8] [--dim 64] [--ranks 2]

Joint attention of one layer (image tokens and 256 of text), forward and forward with backward, float32: one
rank, Ulysses and ring over the ranks, and yunchang's own attention where it runs. Every run has one thread a
rank; the fastest of the rounds counts. Bytes are counted at the collectives, beside what the algorithm must
send. Prints tables, asserts nothing.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from contextlib import contextmanager

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from hvtrain.models.attention import local_attend
from hvtrain.models.dit import Joint
from hvtrain.models.kernels import pick_kernel
from hvtrain.parallel.context import ParallelContext, start
from hvtrain.parallel.usp import usp_attend
from tests.parallel.ranks import run_ranks

TEXT = 256
Row = tuple[float, float, int, int]  # seconds forward, with backward; elements sent forward, backward


class Sent:
    """Elements that this rank sends, counted at torch's collectives."""

    def __init__(self) -> None:
        self.n = 0

    @contextmanager
    def counting(self):
        new = hasattr(dist, "all_gather_single")  # torch 2.13
        to_all = "all_gather_single" if new else "all_gather_into_tensor"
        to_one = "reduce_scatter_single" if new else "reduce_scatter_tensor"
        plain = {n: getattr(dist, n) for n in ("all_to_all_single", to_all, to_one, "P2POp")}

        def share(x: torch.Tensor, group: object) -> int:
            return x.numel() * (dist.get_world_size(group) - 1) // dist.get_world_size(group)

        def a2a(out, x, *a, group=None, **k):
            self.n += share(x, group)
            return plain["all_to_all_single"](out, x, *a, group=group, **k)

        def gather(out, x, group=None, **k):
            self.n += x.numel() * (dist.get_world_size(group) - 1)
            return plain[to_all](out, x, group=group, **k)

        def scatter(out, x, op=dist.ReduceOp.SUM, group=None, **k):
            self.n += share(x, group)
            return plain[to_one](out, x, op=op, group=group, **k)

        def p2p(op, tensor, *a, **k):
            self.n += tensor.numel() if op is dist.isend else 0
            return plain["P2POp"](op, tensor, *a, **k)

        for name, counted in zip(plain, (a2a, gather, scatter, p2p)):
            setattr(dist, name, counted)
        try:
            yield
        finally:
            for name, function in plain.items():
                setattr(dist, name, function)


def timed(run: Callable[[], Joint], inputs: list[torch.Tensor], ctx: ParallelContext, rounds: int) -> Row:
    sent = Sent()
    best = [float("inf"), float("inf")]
    counts = [0, 0]
    for _ in range(rounds):
        for i, backward in enumerate((False, True)):
            for x in inputs:
                x.grad = None
            ctx.barrier()
            sent.n, begun = 0, time.perf_counter()
            with sent.counting(), torch.set_grad_enabled(backward):
                out = run()
                if backward:
                    forward = sent.n
                    torch.autograd.backward(
                        [out.img, out.txt], [torch.ones_like(out.img), torch.ones_like(out.txt)]
                    )
            ctx.barrier()
            best[i] = min(best[i], ctx.all_reduce_max(time.perf_counter() - begun))
            counts[i] = sent.n - (forward if backward else 0)
    return best[0], best[1], counts[0], counts[1]


def ours(ulysses: int, ring: int, tokens: int, heads: int, dim: int, rounds: int) -> Row:
    ctx = start(ulysses, ring)
    g = torch.Generator().manual_seed(0)
    shard = -(-tokens // ctx.sp)
    parts = [
        Joint(*(torch.randn(1, n, heads, dim, generator=g).requires_grad_() for n in (shard, TEXT)))
        for _ in range(3)
    ]
    kernel = pick_kernel("auto", device=ctx.device)
    if ctx.sp > 1:
        def run() -> Joint:
            return usp_attend(*parts, txt_len=(TEXT,), n_img=tokens, ctx=ctx, kernel=kernel)
    else:
        def run() -> Joint:
            return local_attend(*parts, txt_len=(TEXT,), n_img=tokens, kernel=kernel)
    return timed(run, [x for part in parts for x in part], ctx, rounds)


def yunchang_ulysses(tokens: int, heads: int, dim: int, rounds: int) -> Row | str:
    """yunchang's own attention; its text would be part of the sequence, so it is counted in."""
    from yunchang import UlyssesAttention
    from yunchang.kernels import AttnType

    def prepare(ctx: ParallelContext) -> Callable:
        return UlyssesAttention(ctx.ulysses_group, attn_type=AttnType.TORCH_EFFICIENT)

    return _peer(prepare, tokens, heads, dim, rounds)


def diffusers_ulysses(tokens: int, heads: int, dim: int, rounds: int) -> Row | str:
    """diffusers' context parallelism with its native backend; text as above."""

    def prepare(ctx: ParallelContext) -> Callable:
        from diffusers import ContextParallelConfig
        from diffusers.models._modeling_parallel import ParallelConfig
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        mesh = dist.device_mesh.init_device_mesh("cpu", (1, ctx.sp), mesh_dim_names=("ring", "ulysses"))
        parallel = ParallelConfig(context_parallel_config=ContextParallelConfig(ulysses_degree=ctx.sp))
        parallel.setup(ctx.rank, ctx.world, ctx.device, mesh=mesh)
        return lambda *x: dispatch_attention_fn(*x, backend="native", parallel_config=parallel)

    return _peer(prepare, tokens, heads, dim, rounds)


def _peer(
    prepare: Callable[[ParallelContext], Callable], tokens: int, heads: int, dim: int, rounds: int
) -> Row | str:
    try:
        ctx = start(int(os.environ["WORLD_SIZE"]), 1)
        x = [torch.randn(1, (tokens + TEXT) // ctx.sp, heads, dim).requires_grad_() for _ in range(3)]
        attend = prepare(ctx)

        def run() -> Joint:
            out = attend(*x)
            return Joint(out, out[:, :0])

        return timed(run, x, ctx, rounds)
    except Exception as error:  # whatever it is, the table says it
        return (
            f"{type(error).__name__} {str(error).splitlines()[0][:40]}"
            if str(error) else type(error).__name__
        )


def minimum(kind: str, tokens: int, heads: int, dim: int, ranks: int) -> int:
    """Elements a rank must send forward: Ulysses 4 S D (P-1)/P^2 (q, k, v and the output);
    ring 2 S D (P-1)/P (k and v)."""
    width = heads * dim
    if kind == "ulysses":
        return 4 * tokens * width * (ranks - 1) // ranks**2
    return 2 * tokens * width * (ranks - 1) // ranks


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in (("tokens", 8192), ("heads", 8), ("dim", 64), ("ranks", 2), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    a = parser.parse_args()
    size = (a.tokens, a.heads, a.dim, a.rounds)
    alone = run_ranks(1, ours, 1, 1, *size)[0]
    table = Table(
        title=f"{a.tokens} + {TEXT} tokens, {a.heads} heads of {a.dim}, float32, {a.ranks} ranks of one core"
    )
    columns = (
        "", "forward s", "speed-up", "with backward s", "speed-up", "sent forward", "minimum", "ratio",
        "sent backward"
    )
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    table.add_row("one process", f"{alone[0]:.2f}", "", f"{alone[1]:.2f}")
    rows = {
        "hvtrain ulysses": run_ranks(a.ranks, ours, a.ranks, 1, *size)[0],
        "hvtrain ring": run_ranks(a.ranks, ours, 1, a.ranks, *size)[0],
        "diffusers ulysses": run_ranks(a.ranks, diffusers_ulysses, *size)[0],
        "yunchang ulysses": run_ranks(a.ranks, yunchang_ulysses, *size)[0],
    }
    for name, row in rows.items():
        if isinstance(row, str):
            table.add_row(name, f"does not run here: {row}")
            continue
        kind = name.split()[1]
        least = minimum(kind, a.tokens, a.heads, a.dim, a.ranks)
        sent = (
            (f"{row[2]:,}", f"{least:,}", f"{row[2] / least:.3f}", f"{row[3]:,}")
            if row[2] else ("not counted",)
        )
        table.add_row(
            name, f"{row[0]:.2f}", f"{alone[0] / row[0]:.2f}", f"{row[1]:.2f}", f"{alone[1] / row[1]:.2f}",
            *sent
        )
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
