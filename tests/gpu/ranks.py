"""Ulysses and ring on one device: processes share it and talk through main memory, for NCCL
refuses two ranks of a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from hvtrain.models.attention import local_attend
from hvtrain.models.dit import Joint
from hvtrain.models.kernels import KERNELS
from hvtrain.models.measure import TOLERANCE
from hvtrain.parallel.context import start
from hvtrain.parallel.usp import UspAttention
from hvtrain.rng import generator
from tests.gpu.report import Row, Setup
from tests.gpu.work import dtype_of, trained
from tests.parallel.ranks import run_ranks

LAYOUTS = {2: [(2, 1), (1, 2)], 4: [(2, 2)]}  # processes: (Ulysses, ring)
N_IMG, PAD, TEXT = 517, 40, (40, 0)  # no multiple of the ranks; one sample without text
_IN_PLACE = (
    "all_to_all_single", "all_gather_single", "all_gather_into_tensor", "reduce_scatter_single",
    "reduce_scatter_tensor"
)


def shared_attention(here: Setup) -> Iterator[Row]:
    """Outputs and gradients of every kernel over 2 and 4 processes, against one."""
    names = [kernel.name for kernel in trained(here)]
    for world, layouts in LAYOUTS.items():
        found = run_ranks(world, errors_here, layouts, here.device.type, names, timeout_s=120)
        for at in found[0]:
            error = max((rank[at] for rank in found), key=lambda e: (e != e, e))
            yield Row(at, passed=error <= TOLERANCE[dtype_of(here)], error=error)


def errors_here(layouts: Sequence[tuple[int, int]], place: str, names: Sequence[str]) -> dict[str, float]:
    """On each rank."""
    through_main_memory()
    device = torch.device(place, 0) if place == "cuda" else torch.device(place)
    dtype = torch.bfloat16 if place == "cuda" else torch.float32
    draw = generator(0, stream="shared")
    sizes = (N_IMG, PAD)
    *whole, d_out = (
        [
            Joint(*(torch.randn(2, n, 4, 128, generator=draw).to(device, dtype) for n in sizes))
            for _ in range(4)
        ]
    )
    want = _computed(lambda *x: local_attend(*x, txt_len=TEXT, n_img=N_IMG), whole, d_out)
    found = {}
    for ulysses, ring in layouts:
        ctx = replace(start(ulysses, ring, device="cpu"), device=device)
        chunk = -(-N_IMG // ctx.sp)
        mine = slice(ctx.sp_rank * chunk, (ctx.sp_rank + 1) * chunk)

        def cut(x: Tensor, chunk: int = chunk, mine: slice = mine, size: int = ctx.sp) -> Tensor:
            return F.pad(x, (0, 0, 0, 0, 0, chunk * size - N_IMG))[:, mine]

        parts, gradient = [Joint(cut(x.img), x.txt) for x in whole], Joint(cut(d_out.img), d_out.txt / ctx.sp)
        for name in names:
            attend = UspAttention(KERNELS[name], ctx=ctx)
            got = _computed(lambda *x, a=attend: a.joint(*x, txt_len=TEXT, n_img=N_IMG), parts, gradient)
            for i in (1, 2, 3):  # each rank has its share of the text's gradients
                host = got[i].txt.float().cpu()
                dist.all_reduce(host)
                got[i] = Joint(got[i].img, host.to(device, dtype))
            pairs = [p for g, w in zip(got, want, strict=True) for p in ((g.img, cut(w.img)), (g.txt, w.txt))]
            worst = [
                float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-3)) for a,
                b in pairs
            ]
            found[f"{name}, Ulysses {ulysses} x ring {ring}"] = max(worst, key=lambda e: (e != e, e))
    return found


def _computed(attend: Callable[..., Joint], inputs: Sequence[Joint], d_out: Joint) -> list[Joint]:
    """The output, and the gradients of q, k and v."""
    leaves = [Joint(*(t.detach().clone().requires_grad_() for t in x)) for x in inputs]
    out = attend(*leaves)
    torch.autograd.backward(list(out), list(d_out))
    return [Joint(*(t.detach() for t in out)), *(Joint(*(t.grad for t in x)) for x in leaves)]  # type: ignore[arg-type]


# --- collectives of gloo, which knows main memory -----------------------------------------------------------


class _Arriving:
    """A message under way; what was received is put where it is wanted."""

    def __init__(self, request: Any, host: Tensor, wanted: Tensor | None) -> None:
        self.request, self.host, self.wanted = request, host, wanted

    def wait(self) -> None:
        self.request.wait()
        if self.wanted is not None:
            self.wanted.copy_(self.host)


def through_main_memory() -> None:
    """From now on this process's collectives take tensors of any device."""

    def staged(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(out: Tensor, mine: Tensor, *args: Any, **options: Any) -> None:
            host = torch.empty_like(out, device="cpu")
            real(host, mine.cpu(), *args, **options)
            out.copy_(host)

        return call

    for name in _IN_PLACE:
        if hasattr(dist, name):
            setattr(dist, name, staged(getattr(dist, name)))
    real = dist.batch_isend_irecv

    def batch(ops: Sequence[dist.P2POp]) -> list[_Arriving]:
        hosts = [
            op.tensor.cpu() if op.op is dist.isend else torch.empty_like(op.tensor, device="cpu")
            for op in ops
        ]
        requests = real([dist.P2POp(op.op, host, op.peer, op.group) for op, host in zip(ops, hosts)])
        sends = [op.op is dist.isend for op in ops]
        return [
            _Arriving(request, host, None if sent else op.tensor)
            for request, host, sent, op in zip(requests, hosts, sends, ops, strict=True)
        ]

    dist.batch_isend_irecv = batch
