"""What `hvtrain doctor` has all processes do together: collectives with their bandwidth, sequence-parallel
attention against one process, and a directory that all of them must see."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from hvtrain.models.attention import local_attend
from hvtrain.models.dit import Joint
from hvtrain.models.kernels import KERNELS, pick_kernel
from hvtrain.models.measure import wrongs
from hvtrain.parallel.context import ParallelContext, start
from hvtrain.parallel.usp import usp_attend
from hvtrain.rng import generator

REPEATS = 5
TOLERANCE = 2e-2  # bfloat16 attention on GPUs; in float32 on CPUs it is 1e-5


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    passed: bool
    found: str
    mend: str = ""

    def line(self) -> str:
        return f"{'pass' if self.passed else 'FAIL':8}{self.name:22}{self.found}" + (
            "" if self.passed else f"  -> {self.mend}"
        )


def run(folder: str | None) -> int:
    """Prints on rank 0; 1 if a check failed. Collective."""
    ctx = start()
    failed = 0
    for check in _checks(ctx, folder):
        failed += not check.passed
        if ctx.is_main:
            print(check.line(), flush=True)
    ctx.barrier()
    return 1 if failed else 0


def _kernels(ctx: ParallelContext) -> Check:
    """Every attention kernel that runs here, against float64, at the lengths and scores where
    kernels are known to go wrong."""
    dtype = torch.bfloat16 if ctx.device.type == "cuda" else torch.float32
    here = [k for k in KERNELS.values() if k.trains and k.missing(ctx.device, dtype) is None]
    wrong = [
        f"{k.name} at {where}: {found.worst:.2g}" for k in here for where,
        found in wrongs(k, ctx.device, dtype)
    ]
    found = "; ".join(wrong) or f"{', '.join(k.name for k in here)}: right at all lengths"
    return Check(
        "attention kernels", not wrong, found, "set parallel.kernel to another; auto passes these by"
    )


def _checks(ctx: ParallelContext, folder: str | None) -> Iterator[Check]:
    hosts = ctx.gather_objects(socket.gethostname())
    n_hosts, backend = len(set(hosts)), "NCCL" if ctx.device.type == "cuda" else "gloo"
    yield Check("processes", True, f"{ctx.world} on {n_hosts} machine(s), {backend}, {ctx.device.type}")
    yield _kernels(ctx)
    mb = 256 if ctx.device.type == "cuda" else 16
    if ctx.world > 1:
        yield _collective("all-reduce", ctx, mb, _all_reduce)
        yield _collective("all-to-all", ctx, mb, _all_to_all)
        for name, degrees in (("Ulysses", (ctx.world, 1)), ("ring", (1, ctx.world))):
            yield _parity(name, degrees)
    if folder is not None:
        yield from _directory(ctx, Path(folder))


def _collective(
    name: str, ctx: ParallelContext, mb: int, act: Callable[[ParallelContext, torch.Tensor], bool]
) -> Check:
    x = torch.full((mb * 2**18 // ctx.world * ctx.world,), float(ctx.rank + 1), device=ctx.device)
    right = act(ctx, x.clone())
    times = []
    for _ in range(REPEATS):
        ctx.barrier()
        begun = time.perf_counter()
        act(ctx, x.clone())
        if ctx.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(ctx.all_reduce_max(time.perf_counter() - begun))
    rate = x.numel() * 4 / min(times) / 1e9
    wrong = ctx.any(not right)
    return Check(
        name, not wrong, f"{rate:.2f} GB/s of {mb} MiB" + (", wrong values" if wrong else ""),
        "the network delivers wrong data: set NCCL_DEBUG=INFO, ask the administrator",
    )


def _all_reduce(ctx: ParallelContext, x: torch.Tensor) -> bool:
    dist.all_reduce(x)
    return bool((x == ctx.world * (ctx.world + 1) / 2).all())


def _all_to_all(ctx: ParallelContext, x: torch.Tensor) -> bool:
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x)
    wanted = torch.arange(
        1, ctx.world + 1, device=x.device, dtype=x.dtype
    ).repeat_interleave(len(x) // ctx.world)
    return bool((out == wanted).all())


def _parity(name: str, degrees: tuple[int, int]) -> Check:
    """Attention over all processes against the same in one, on equal random numbers."""
    ctx = start(*degrees)
    dtype = torch.bfloat16 if ctx.device.type == "cuda" else torch.float32
    kernel = pick_kernel("auto", device=ctx.device, dtype=dtype, training=False)
    draw = generator(0, stream="selftest")
    n_img, n_txt, heads, dim = 64 * ctx.world + 3, 16, ctx.world * 2, 64
    whole = [
        Joint(*(torch.randn(1, n, heads, dim, generator=draw).to(ctx.device, dtype) for n in (n_img, n_txt)))
        for _ in range(3)
    ]
    alone = local_attend(*whole, txt_len=(n_txt,), n_img=n_img, kernel=kernel)
    chunk = -(-n_img // ctx.sp)
    pad = (0, 0, 0, 0, 0, chunk * ctx.sp - n_img)
    mine = [
        Joint(torch.nn.functional.pad(x.img, pad)[:, ctx.sp_rank * chunk : (ctx.sp_rank + 1) * chunk], x.txt)
        for x in whole
    ]
    out = usp_attend(*mine, txt_len=(n_txt,), n_img=n_img, ctx=ctx, kernel=kernel)
    wanted = torch.nn.functional.pad(alone.img, pad)[:, ctx.sp_rank * chunk : (ctx.sp_rank + 1) * chunk]
    error = max((out.img - wanted).abs().max().item(), (out.txt - alone.txt).abs().max().item())
    error = ctx.all_reduce_max(error)
    return Check(
        f"{name} {ctx.sp} = one", error < TOLERANCE, f"largest error {error:.1e}, {kernel.name}",
        "sequence-parallel attention is wrong here: please report it, with the output of `hvtrain doctor`",
    )


def _directory(ctx: ParallelContext, folder: Path) -> Iterator[Check]:
    """Every process writes a file that every other must find."""
    own = folder / f".hvtrain-doctor-{ctx.rank}"
    problem = ""
    begun = time.perf_counter()
    try:
        own.write_bytes(bytes(16 << 20))
    except OSError as error:
        problem = f"rank {ctx.rank} cannot write: {error.strerror}"
    rate = 16 * 2**20 / (time.perf_counter() - begun) / 1e9
    ctx.barrier()
    seen = [(folder / f".hvtrain-doctor-{rank}").exists() for rank in range(ctx.world)]
    if not problem and not all(seen):
        problem = f"rank {ctx.rank} does not see what rank {seen.index(False)} wrote"
    problems = [p for p in ctx.gather_objects(problem) if p]
    slowest = -ctx.all_reduce_max(-rate)
    ctx.barrier()
    own.unlink(missing_ok=True)
    yield Check(
        "shared directory", not problems,
        problems[0] if problems else f"{folder}: seen by all, {slowest:.2f} GB/s written",
        "use a file system that all nodes mount, and that you may write",
    )
